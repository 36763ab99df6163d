"""The challenge's submission: masks as runs of pixels, one row a photo, in a CSV file.

    img,rle_mask
    0004d4463b50_01.jpg,495836 51 497738 73 ...

Each pair of numbers is where a run of the object begins and how long it is; pixels count from 1,
left to right, then top to bottom. A mask of nothing has no runs.
"""

import csv
import errno
import hashlib
import io
import json
import os
import threading
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np

from files import BadInput, shown, write_aside

HEADER = ["img", "rle_mask"]


def encode(mask):
    """The runs of a mask (H, W), any type, object where it is not 0, as text."""
    pixels = np.asarray(mask).astype(bool, copy=False).ravel()
    edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1  # where one run or gap ends
    ends = [0] if pixels[:1].any() else [], [pixels.size] if pixels[-1:].any() else []
    edges = np.concatenate([ends[0], edges, ends[1]]).astype(np.int64)  # starts and ends in turn
    runs = np.stack([edges[::2] + 1, edges[1::2] - edges[::2]], axis=1)
    return " ".join(map(str, runs.ravel().tolist()))


def decode(text, height, width):
    """The mask of runs that `encode` gave: (height, width), uint8, 0 and 1.

    Raises ValueError for what is no list of runs, in order, within the mask.
    """
    numbers = np.array([int(word) for word in text.split()], np.int64)
    if numbers.size % 2:
        raise ValueError(f"{numbers.size} numbers, and runs are pairs")
    starts = numbers[::2] - 1
    ends = starts + numbers[1::2]
    edges = np.stack([starts, ends], axis=1).ravel()
    if edges.size and (edges[0] < 0 or edges[-1] > height * width or (np.diff(edges) < 0).any()):
        raise ValueError(f"runs out of order, or outside a mask of {height}x{width}")
    steps = np.zeros(height * width + 1, np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, ends, -1)
    return steps[:-1].cumsum(dtype=np.int8).astype(np.uint8).reshape(height, width)


class Submission:
    """A submission in the making: rows in any order, of which a kill takes none away.

    Rows are kept, a line of JSON each, in a hidden file beside the submission's place; `finish`
    writes the submission itself, in the photos' order. In memory is only where each row begins.

    Args:
        path: the CSV file to be.
        names: the photos' file names, in the rows' order.
        made_by: text that says how masks are made: rows made otherwise are not gone on with.
        afresh: start from nothing, also where there is a submission or a part of one.

    Raises BadInput where the files cannot be written, where another process is at it, and where
    there is a submission that lacks some of the photos and none of its rows to go on with.
    """

    def __init__(self, path, names, made_by, afresh=False):
        self.path, self.names = Path(path), names
        if self.path.suffix.lower() != ".csv" or self.path.is_dir():
            raise BadInput(
                f"{shown(path)}: no CSV file: name one that ends in .csv with --submission"
            )
        key = hashlib.sha256(made_by.encode()).hexdigest()[:16]
        self.rows_path = self.path.with_name(f".{self.path.name}.{key}.rows")
        self.begins = {}  # {photo's file name: where its row begins}
        self.lock = threading.Lock()
        self.exists = not afresh and self.path.exists() and not self.rows_path.exists()
        if self.exists:
            return self.check_whole()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what cannot be written is known at once.
            self.file = self.rows_path.open("ab", buffering=0)
            self.lock_file()
            if afresh:
                self.file.truncate(0)
            self.read_rows()
        except OSError as error:
            raise self.unwritable(error) from error

    def check_whole(self):
        """Raises BadInput unless the submission that is there has a row for each photo."""
        csv.field_size_limit(2**30)
        try:
            with self.path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                there = {row[0] for row in csv.reader(file) if row}
        except (OSError, csv.Error) as error:
            raise BadInput(
                f"{shown(self.path)}: cannot be read ({error}): name another file"
            ) from None
        lacking = sum(name not in there for name in self.names)
        if lacking:
            raise BadInput(
                f"{shown(self.path)}: is there already, without {lacking} of these photos: add "
                "--overwrite, or name another file"
            )

    def lock_file(self):
        """Hold the rows for this process alone, until the file is closed."""
        if fcntl is not None:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.close()
                raise BadInput(
                    f"{shown(self.path)}: another process is making it: wait for it"
                ) from None

    def read_rows(self):
        """Find the rows of an earlier run, and cut off what a kill left unfinished."""
        end = 0
        with self.rows_path.open("rb") as file:
            for line in file:
                try:
                    name, _ = json.loads(line)
                except (ValueError, TypeError):
                    break
                if line.endswith(b"\n"):
                    self.begins[name] = end
                    end += len(line)
        self.file.truncate(end)

    def __contains__(self, name):
        return self.exists or name in self.begins

    def add(self, name, mask):
        """Take in the mask (H, W) of the photo with this file name; from any thread."""
        line = json.dumps([name, encode(mask)]).encode() + b"\n"
        try:
            with self.lock:
                begin = self.file.seek(0, os.SEEK_END)
                if self.file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.begins[name] = begin
        except OSError as error:
            raise self.unwritable(error) from error

    def finish(self):
        """Write all rows, in the photos' order, whole or not at all.

        Photos without a row have none in the file. Then the rows are kept, so that another run has
        only the others to make.
        """
        if self.exists:
            return
        with write_aside(self.path) as file, self.rows_path.open("rb") as rows:
            # File names that are no UTF-8 go out as they came in.
            text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(HEADER)
            for name in self.names:
                if name in self.begins:
                    rows.seek(self.begins[name])
                    writer.writerow(json.loads(rows.readline()))
            text.detach()
        if all(name in self.begins for name in self.names):
            self.rows_path.unlink()

    def close(self):
        """What was added stays, for another run to go on with."""
        if not self.exists:
            self.file.close()
            if not self.begins:
                self.rows_path.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def unwritable(self, error):
        return BadInput(
            f"{shown(self.rows_path)}: cannot be written ({error.strerror}): "
            "free some space or choose another --submission"
        )
