"""The cache: photos and masks decoded once, at the size of training, read by memory map ever after.

Pair after pair in one .npy file, uint8: the photo's pixels, then the mask's.
"""

import contextlib
import glob
import hashlib
import math
import os
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from support.errors import BadInput
from support.images import Labels, check_values, photo_size
from support.pairs import for_all, read_pair
from support.writing import write_aside

BINARY = Labels()
CACHE_FORMAT = 2  # raise it when what read_pair returns changes


def stable_hash(text):
    """64 bits that depend on the text alone: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "big")


class Cache:
    """The cache of these pairs at one size, (height, width), or with None each at its own; `path`
    is its file, there or not.

    The file's name holds a hash of all that determines its content: files' names, sizes, times. It
    is mapped where it is used: a map held by a dataset would be pickled whole to spawned workers.
    """

    def __init__(self, pairs, size, channels, image_dir, cache_dir=None, labels=BINARY):
        self.pairs, self.size, self.channels, self.labels = pairs, size, channels, labels
        sizes = [size or photo_size(pair.photo) for pair in pairs]
        lengths = [height * width * (channels + 1) for height, width in sizes]
        self.places = {}  # {photo: (where its pixels start, its size)}
        for pair, start, own_size in zip(pairs, accumulate([0, *lengths[:-1]]), sizes, strict=True):
            self.places[pair.photo] = (start, own_size)
        self.table = None
        image_dir = Path(image_dir).resolve()
        mask_dir = Path(pairs[0].mask).resolve().parent
        self.folder = Path(cache_dir) if cache_dir else image_dir.parent / ".cache"
        place = stable_hash(f"{image_dir}\n{mask_dir}") >> 32  # a cache folder may serve several
        shape = f"{size[0]}x{size[1]}x{channels}" if size else f"own-sizes-x{channels}"
        self.prefix = f"{image_dir.name}-{place:08x}-{shape}-"
        key = hashlib.blake2b(repr((CACHE_FORMAT, labels)).encode(), digest_size=8)
        for path in (path for pair in pairs for path in (pair.photo, pair.mask)):
            stat = os.stat(path)
            key.update(repr((os.path.abspath(path), stat.st_size, stat.st_mtime_ns)).encode())
        self.path = self.folder / f"{self.prefix}{key.hexdigest()}.npy"
        self.shape = (len(pairs), lengths[0]) if size else (sum(lengths),)

    @property
    def exists(self):
        """Whether the file is there, and whole: a disk may have broken since."""
        whole = 128 + math.prod(self.shape)  # with NumPy's header
        return self.path.exists() and self.path.stat().st_size >= whole

    def build(self):
        """Decode all pairs, unless that is done. Raises BadInput with all files that are bad."""
        if self.exists:
            return
        remedy = "free some space, or use --cache-dir or --no-cache"
        with write_aside(self.path, remedy) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            what = self.pairs, self.size, self.channels, "decoding each photo once", self.labels
            for photo, mask in decode_all(*what):
                file.write(photo.tobytes() + mask.tobytes())
        for stale in set(self.folder.glob(f"{glob.escape(self.prefix)}*.npy")) - {self.path}:
            with contextlib.suppress(OSError):
                stale.unlink()

    def read(self, pair):
        """(photo, mask), just as read_pair(pair, size, channels, labels) gives them."""
        if self.table is None:
            self.table = np.load(self.path, mmap_mode="r").view(np.ndarray).reshape(-1)
        start, (height, width) = self.places[pair.photo]
        middle = start + height * width * self.channels
        photo = self.table[start:middle].reshape(height, width, self.channels)
        return photo, self.table[middle : middle + height * width].reshape(height, width)

    def __getstate__(self):
        return self.__dict__ | {"table": None}


def decode_all(pairs, size, channels, description, labels=BINARY):
    """Yield each pair as read_pair gives it; at the end BadInput, where the masks' values are those
    of classes that `labels` does not know, or no mask shows an object."""
    empty, counts = True, []
    read = partial(read_pair, size=size, channels=channels, labels=labels, counts=counts)
    try:
        for photo, mask in for_all(read, pairs, description):
            empty = empty and not labels.objects(mask).any()
            yield photo, mask
    except BadInput:
        check_values(counts, labels, os.path.dirname(pairs[0].mask))  # which says more of classes
        raise
    check_values(counts, labels, os.path.dirname(pairs[0].mask))
    if empty:
        remedy = "save them anew, 255 for the object"
        if labels != BINARY:
            remedy = "check --classes, --mask-value and --ignore against their values"
        folder = os.path.dirname(pairs[0].mask)
        raise BadInput(folder, "no mask has a pixel of an object", remedy)
