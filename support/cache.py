"""The cache: photos and masks decoded once, at the size of training, then read by memory map.

One .npy file, uint8, holds pair after pair: the photo's pixels, then the mask's.
"""

import contextlib
import glob
import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np

from support.errors import BadInput
from support.images import photo_size
from support.mask_values import check_values
from support.masks import BINARY
from support.pairs import for_all, read_pair
from support.writing import write_aside

CACHE_FORMAT = 2  # to raise when what read_pair returns changes
NPY_HEADER = 128  # bytes


def stable_hash(text):
    """64 bits that depend on the text alone: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "big")


class Cache:
    """The cache of some pairs in one file, `path`, which need not exist yet.

    Args:
        pairs: a list of Pair.
        size: (height, width) of all photos, or None for each photo's own.
        channels: 3 for RGB, 1 for grey.
        image_dir: the photos' folder.
        cache_dir: where the file lies; None: in `.cache` beside the photos' folder.
        labels: what the values in mask files mean.

    The file's name holds a hash of all that determines its content: the files' names, sizes and
    times, and the labels. It is mapped on first use, since a map held by a dataset would be pickled
    whole for spawned workers. Raises BadInput for a photo that cannot be read.
    """

    def __init__(self, pairs, size, channels, image_dir, cache_dir=None, labels=BINARY):
        self.pairs = pairs
        self.size = size
        self.channels = channels
        self.labels = labels
        self.places = {}  # {photo: (where its pixels start, its size)}
        self.length = 0  # bytes of all pairs
        for pair in pairs:
            height, width = size or photo_size(pair.photo)
            self.places[pair.photo] = (self.length, (height, width))
            self.length += height * width * (channels + 1)
        self.table = None  # the map

        image_dir = Path(image_dir).resolve()
        self.folder = Path(cache_dir) if cache_dir else image_dir.parent / ".cache"
        shape = f"{size[0]}x{size[1]}x{channels}" if size else f"own-sizes-x{channels}"
        self.prefix = f"{image_dir.name}-{self.purpose(image_dir):08x}-{shape}-"
        self.path = self.folder / f"{self.prefix}{self.content_hash()}.npy"

    def purpose(self, image_dir):
        """32 bits of what a cache is for: the photos' folder, which masks, and the labels."""
        name, mask = self.pairs[0].name, self.pairs[0].mask
        facts = [image_dir, Path(mask).resolve().parent]
        mask_name = os.path.basename(mask)
        if Path(mask).stem.lower() not in (name.lower(), f"{name.lower()}_mask"):
            # Of a --mask-suffix: other masks may lie in the same folder.
            facts.append(mask_name.removeprefix(os.path.commonprefix([name, mask_name])))
        if self.labels != BINARY:
            facts.append(self.labels)
        return stable_hash("\n".join(map(str, facts))) >> 32

    def content_hash(self):
        """A hash of all that determines the content, but for the size of the photos."""
        key = hashlib.blake2b(repr((CACHE_FORMAT, self.labels)).encode(), digest_size=8)
        for pair in self.pairs:
            for path in (pair.photo, pair.mask):
                stat = os.stat(path)
                facts = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
                key.update(repr(facts).encode())
        return key.hexdigest()

    @property
    def exists(self):
        """Whether the file is there and whole, which a disk failure may have changed."""
        return self.path.exists() and self.path.stat().st_size >= NPY_HEADER + self.length

    def build(self):
        """Decode all pairs, unless that is done, and remove caches of the same purpose whose files
        have changed since. Raises BadInput with all files that are bad."""
        if self.exists:
            return
        title = "decoding each photo once"
        decoded = decode_all(self.pairs, self.size, self.channels, title, self.labels)
        remedy = "free some space, or use --cache-dir or --no-cache"
        with write_aside(self.path, remedy) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.length,)}
            np.lib.format.write_array_header_1_0(file, header)
            for photo, mask in decoded:
                file.write(photo.tobytes() + mask.tobytes())
        for stale in set(self.folder.glob(f"{glob.escape(self.prefix)}*.npy")) - {self.path}:
            with contextlib.suppress(OSError):
                stale.unlink()

    def read(self, pair):
        """(photo, mask), just as read_pair(pair, size, channels, labels) gives them."""
        if self.table is None:
            # A row for each pair in caches that earlier versions wrote.
            self.table = np.load(self.path, mmap_mode="r").view(np.ndarray).reshape(-1)
        start, (height, width) = self.places[pair.photo]
        middle = start + height * width * self.channels
        end = middle + height * width
        photo = self.table[start:middle].reshape(height, width, self.channels)
        return photo, self.table[middle:end].reshape(height, width)

    def __getstate__(self):
        return self.__dict__ | {"table": None}


def decode_all(pairs, size, channels, description, labels=BINARY):
    """Yield each pair as read_pair gives it. At the end raises BadInput with all files that are
    bad, or if the masks seem to hold classes that `labels` does not name, or show no object."""
    is_empty = True
    counts = []
    mask_dir = os.path.dirname(pairs[0].mask)
    read = partial(read_pair, size=size, channels=channels, labels=labels, counts=counts)
    try:
        for photo, mask in for_all(read, pairs, description):
            is_empty = is_empty and not labels.objects(mask).any()
            yield photo, mask
    except BadInput:
        check_values(counts, labels, mask_dir)  # which explains many bad masks at once
        raise
    check_values(counts, labels, mask_dir)
    if is_empty:
        remedy = "save them with 255 for the object"
        if labels != BINARY:
            remedy = "check --classes, --mask-value and --ignore against their values"
        raise BadInput(mask_dir, "no mask has a pixel of an object", remedy)


def decode_once(pairs, image_dir, size, channels, labels, cache, cache_dir):
    """Decode all pairs once, so that all bad files are known together.

    Returns the Cache that holds them, or None without `cache`. Raises BadInput.
    """
    if not cache:
        for _ in decode_all(pairs, size, channels, "checking each photo", labels):
            pass
        return None
    decoded = Cache(pairs, size, channels, image_dir, cache_dir, labels)
    decoded.build()
    return decoded
