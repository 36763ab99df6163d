"""The challenge's submission: masks as runs of pixels, one row per photo, in a CSV file.

    img,rle_mask
    0004d4463b50_01.jpg,495836 51 497738 73 ...

Each pair of numbers is the first pixel of a run of the object and the run's length; pixels count
from 1, left to right, then top to bottom. An empty mask has no runs.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from support.cache import stable_hash
from support.errors import BadInput

HEADER = b"img,rle_mask\n"


def encode(mask):
    """The runs of a mask (H, W), of any dtype, as text; the object is where it is not 0."""
    pixels = np.pad(np.asarray(mask).astype(bool, copy=False).ravel(), 1)
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts, ends = changes.reshape(-1, 2).T
    return " ".join(map(str, np.stack([starts, ends - starts], axis=1).ravel().tolist()))


def decode(text, height, width):
    """The mask of runs that `encode` returned: (height, width), uint8, 0 and 1.

    Raises ValueError for text that is not a list of runs, in order, within the mask.
    """
    starts, lengths = np.array(text.split(), np.int64).reshape(-1, 2).T
    edges = np.stack([starts - 1, starts - 1 + lengths], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)  # of gaps and runs in turn
    return (np.arange(counts.size) % 2).astype(np.uint8).repeat(counts).reshape(height, width)


class Submission:
    """A submission that is being written; a kill loses none of its rows.

    Rows are appended to `<path>.<key>.partial`, which `finish` renames to `path`. The key is a hash
    of the photos and of `made_by`, which their masks depend on: only rows made in the same way are
    kept. Raises BadInput if the submission exists but lacks some photos, unless `overwrite`.

    Attributes:
        path: the submission's file.
        partial: the file of the rows so far.
        names: of the photos that have a row, as bytes.
    """

    def __init__(self, path, photos, made_by, overwrite=False):
        self.path = Path(path)
        key = stable_hash(repr(([os.path.abspath(photo) for photo in photos], made_by)))
        self.partial = Path(f"{path}.{key:016x}.partial")
        self.names = set()
        self._length = 0  # of the partial file, without a row left unfinished
        if self.path.is_dir():
            raise BadInput(path, "is a folder", "name a file with --submission")
        if overwrite:
            return
        self.names, self._length = read_rows(self.partial)
        if self.path.exists() and not self.names:
            self.names, _ = read_rows(self.path)
            if any(photo not in self for photo in photos):
                raise BadInput(path, "lacks some of the photos", "add --overwrite to replace it")

    def __contains__(self, photo):
        return name_of(photo) in self.names

    def add(self, photo, runs):
        """Add a photo's row; `runs` is what `encode` returned for its mask. Raises BadInput."""
        row = name_of(photo) + b"," + runs.encode() + b"\n"
        if self._length == 0:
            row = HEADER + row
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.partial.open("ab") as file:
                file.truncate(self._length)  # the row before may have been left unfinished
                file.write(row)
        except OSError as error:
            remedy = "free some space or choose another --submission"
            raise BadInput(self.path, f"cannot be written ({error.strerror})", remedy) from None
        self.names.add(name_of(photo))
        self._length += len(row)

    def finish(self):
        """Rename the file of the rows to the submission's name."""
        if self._length:
            os.replace(self.partial, self.path)


def read_rows(path):
    """(names of the photos that have a row, bytes of all whole rows) of a file; none if it is not
    there."""
    names = set()
    length = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                names.add(line.rpartition(b",")[0])
                length += len(line)
    return names, length


def name_of(photo):
    """A photo's name as it stands in the file, bytes."""
    name = os.path.basename(photo).replace('"', '""')
    return os.fsencode(f'"{name}"' if "," in name or '"' in name else name)
