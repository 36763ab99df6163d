"""The challenge's submission: masks as runs of pixels, one row a photo, in a CSV file.

    img,rle_mask
    0004d4463b50_01.jpg,495836 51 497738 73 ...

Each pair of numbers is where a run of the object begins and how long it is; pixels count from 1,
left to right, then top to bottom. A mask of nothing has no runs.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from support.cache import stable_hash
from support.errors import BadInput


def encode(mask):
    """The runs of a mask (H, W), any type, object where it is not 0, as text."""
    pixels = np.pad(np.asarray(mask).astype(bool, copy=False).ravel(), 1)
    starts, ends = (np.flatnonzero(pixels[1:] != pixels[:-1]) + 1).reshape(-1, 2).T
    return " ".join(map(str, np.stack([starts, ends - starts], axis=1).ravel().tolist()))


def decode(text, height, width):
    """The mask of runs that `encode` gave: (height, width), uint8, 0 and 1.

    Raises ValueError for what is no list of runs, in order, within the mask.
    """
    starts, lengths = np.array(text.split(), np.int64).reshape(-1, 2).T
    edges = np.stack([starts - 1, starts - 1 + lengths], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)  # of gaps and runs in turn
    return (np.arange(counts.size) % 2).astype(np.uint8).repeat(counts).reshape(height, width)


class Submission:
    """A submission in the making, of which a kill takes no row away.

    Rows are added to `<path>.<key>.partial`, which `finish` renames to `path`. The key is a hash of
    the photos and of `made_by`, what their masks depend on: only such rows are gone on with. Raises
    BadInput where there is a submission that lacks some of the photos, unless `overwrite`.
    """

    def __init__(self, path, photos, made_by, overwrite=False):
        self.path, self.names, self.end = Path(path), set(), 0
        key = stable_hash(repr((list(map(os.path.abspath, photos)), made_by)))
        self.partial = Path(f"{path}.{key:016x}.partial")
        if not overwrite:
            self.names, self.end = read_rows(self.partial)
        if self.path.exists() and not (self.names or overwrite):
            self.names, _ = read_rows(self.path)
            if any(photo not in self for photo in photos):
                raise BadInput(path, "lacks some of the photos", "add --overwrite to make it anew")

    def __contains__(self, photo):
        return name_of(photo) in self.names

    def add(self, photo, runs):
        """Add a photo's row; `runs` is what `encode` gave for its mask. Raises BadInput."""
        row = name_of(photo) + b"," + runs.encode() + b"\n"
        row = row if self.end else b"img,rle_mask\n" + row
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.partial.open("ab") as file:
                file.truncate(self.end)  # a row before it may be left unfinished
                file.write(row)
        except OSError as error:
            remedy = "free some space or choose another --submission"
            raise BadInput(self.path, f"cannot be written ({error.strerror})", remedy) from None
        self.names.add(name_of(photo))
        self.end += len(row)

    def finish(self):
        """Give the rows the submission's name."""
        if self.end:
            os.replace(self.partial, self.path)


def read_rows(path):
    """(names of the photos that have a row; the file's bytes, without a row left unfinished)."""
    names, end = set(), 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                names.add(line.rpartition(b",")[0])
                end += len(line)
    return names, end


def name_of(photo):
    """A photo's name as in the file."""
    name = os.path.basename(photo).replace('"', '""')
    return os.fsencode(f'"{name}"' if "," in name or '"' in name else name)
