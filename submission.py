"""The challenge's submission: masks as runs of pixels, one row a photo, in a CSV file.

    img,rle_mask
    0004d4463b50_01.jpg,495836 51 497738 73 ...

Each pair of numbers is where a run of the object begins and how long it is; pixels count from 1,
left to right, then top to bottom. A mask of nothing has no runs.
"""

import csv
import glob
import hashlib
import io
import json
import os
import threading
from pathlib import Path

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
        made_by: text that says how masks are made: rows made otherwise are not gone on with.
        afresh: start from nothing, also where there is a submission or a part of one.

    Raises BadInput where the files cannot be written.
    """

    def __init__(self, path, made_by, afresh=False):
        self.path = Path(path)
        key = hashlib.sha256(made_by.encode()).hexdigest()[:16]
        self.rows_path = self.path.with_name(f".{self.path.name}.{key}.rows")
        self.exists = not afresh and self.path.exists() and not self.rows_path.exists()
        self.begins = {}  # {photo's file name: where its row begins}
        self.lock = threading.Lock()
        if self.exists:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.rows_path.open("w+b" if afresh else "a+b")
        except OSError as error:
            raise self.unwritable(error) from error
        self.read_rows()

    def read_rows(self):
        """Find the rows of an earlier run, and cut off what a kill left unfinished."""
        self.file.seek(0)
        end = 0
        for line in self.file:
            try:
                name, _ = json.loads(line)
            except ValueError:
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
                self.begins[name] = self.file.seek(0, os.SEEK_END)
                self.file.write(line)
                self.file.flush()
        except OSError as error:
            raise self.unwritable(error) from error

    def finish(self, names, complete=True):
        """Write the rows of these photos, in this order, whole or not at all.

        Photos without a row have none in the file. The rows are kept unless it is complete, so that
        another run has only the others to make.
        """
        if self.exists:
            return
        with write_aside(self.path) as file:
            # File names that are no UTF-8 go out as they came in.
            text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(HEADER)
            for name in names:
                if name in self.begins:
                    self.file.seek(self.begins[name])
                    writer.writerow(json.loads(self.file.readline()))
            text.detach()
        if complete:
            self.close()
            for rows in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.rows"):
                rows.unlink()

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
