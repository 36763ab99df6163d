"""From files on disk to batches: split, cache, transforms, data sets, loaders.

find_pairs -> split_by_car -> Cache -> CarvanaDataset -> get_loaders -> batches
"""

import contextlib
import glob
import hashlib
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from augment import get_eval_transform, get_train_transform
from distributed import rank, world_size
from files import (
    BadInput,
    check_header,
    find_pairs,
    for_all_pairs,
    read_mask,
    read_pair,
    read_photo,
    shown,
    write_aside,
)

VAL_FRACTION = 0.1  # share of the cars held out where there is no validation folder
CACHE_FORMAT = 1  # raise it when what read_pair returns changes

__all__ = [  # the last four from files.py and augment.py, for others to find here
    "CarvanaDataset",
    "get_loaders",
    "split_by_car",
    "read_mask",
    "read_photo",
    "get_eval_transform",
    "get_train_transform",
]


# The split ----------------------------------------------------------------------------------------


def car_and_view(name):
    """("0cdf5b5d0ce1", "01") of a photo named so; any other name stands for itself, without view.

    The challenge's photos are named `<12 hex digits>_<01..16>`.
    """
    found = re.fullmatch(r"([0-9a-f]{12})_(0[1-9]|1[0-6])", name.lower())
    return found.groups() if found else (name.lower(), None)


def car_id(name):
    return car_and_view(name)[0]


def stable_hash(text):
    """64 bits that depend on the text alone: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "big")


def split_by_car(pairs, fraction=VAL_FRACTION):
    """(training pairs, validation pairs): a car is in one of them, with all its views.

    A car is held out where the hash of its id is below `fraction`, so neither the seed nor photos
    added later move it. Each side gets at least one car. Raises BadInput where there is only one.
    """
    place = {car: stable_hash(car) / 2**64 for car in {car_id(pair.name) for pair in pairs}}
    if len(place) < 2:
        raise BadInput(
            f"{shown(pairs[0].photo)}: the only car or photo there is, and validation needs "
            "another: "
            "add photos, or a folder of validation photos"
        )
    first, *_, last = sorted(place, key=place.get)
    held_out = ({car for car in place if place[car] < fraction} | {first}) - {last}
    validation = [pair for pair in pairs if car_id(pair.name) in held_out]
    return [pair for pair in pairs if car_id(pair.name) not in held_out], validation


# The cache: decoded once, read by memory map ever after -------------------------------------------


class Cache:
    """Photos and masks at one size, uint8, in one .npy file: a row a pair, photo first, then mask.

    The file is mapped where it is used: a map held by a dataset would be pickled whole to spawned
    workers.
    """

    def __init__(self, path, pairs, size, channels):
        self.path, self.size, self.channels = path, size, channels
        self.rows = {pair.photo: row for row, pair in enumerate(pairs)}
        self.table = None

    def read(self, pair):
        """(photo, mask), just as read_pair(pair, size, channels) gives them."""
        if self.table is None:
            self.table = np.load(self.path, mmap_mode="r").view(np.ndarray)
        height, width = self.size
        row, end = self.table[self.rows[pair.photo]], height * width * self.channels
        return row[:end].reshape(height, width, self.channels), row[end:].reshape(height, width)

    def __getstate__(self):
        return self.__dict__ | {"table": None}


def build_cache(pairs, size, channels, image_dir, cache_dir=None):
    """Decode all pairs into a cache file, unless one is there that fits; return a Cache.

    A file fits if its name does: it holds a hash of all that determines the content, the files'
    names, sizes and modification times among them. Raises BadInput with all files that are bad.
    """
    image_dir = Path(image_dir).resolve()
    mask_dir = Path(pairs[0].mask).resolve().parent
    folder = Path(cache_dir) if cache_dir else image_dir.parent / ".cache"
    place = stable_hash(f"{image_dir}\n{mask_dir}") >> 32  # a cache folder may serve several
    prefix = f"{image_dir.name}-{place:08x}-{size[0]}x{size[1]}x{channels}-"
    key = hashlib.blake2b(digest_size=8)
    for pair in pairs:
        for path in (pair.photo, pair.mask):
            stat = os.stat(path)
            facts = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns, CACHE_FORMAT)
            key.update(repr(facts).encode())
    path = folder / f"{prefix}{key.hexdigest()}.npy"

    height, width = size
    shape = (len(pairs), height * width * (channels + 1))
    if not path.exists() or path.stat().st_size < math.prod(shape):  # as after a broken disk
        remedy = "free some space, or use --cache-dir or --no-cache"
        check_free_space(path, math.prod(shape), remedy)
        with write_aside(path, remedy) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for photo, mask in decode_all(pairs, size, channels, "decoding each photo once"):
                file.write(photo.tobytes())
                file.write(mask.tobytes())
        for stale in set(folder.glob(f"{glob.escape(prefix)}*.npy")) - {path}:
            with contextlib.suppress(OSError):
                stale.unlink()
    return Cache(path, pairs, size, channels)


def check_free_space(path, size, remedy):
    """Raises BadInput where the disk that `path` will be on has no room for `size` bytes."""
    there = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise BadInput(
            f"{shown(path)}: needs {size / 2**30:.2f} GiB, and only {free / 2**30:.2f} are free: "
            f"{remedy}"
        )


# Datasets and loaders -----------------------------------------------------------------------------


class CarvanaDataset(Dataset):
    """Photos and masks as tensors.

    Args:
        image_dir, mask_dir: folders; see find_pairs.
        transform: albumentations' Compose, applied to the photo (H, W, C) and the mask (H, W), both
            uint8; None for evaluation's, at `size` or else at the photo's own size.
        size: (height, width) that photos are decoded to before the transform; None: full size.
        channels: 3 for RGB, 1 for grey.
        seed: with the epoch and the photo's name it determines all that is random.
        pairs: a part of what find_pairs finds, such as one side of split_by_car.
        cache: a Cache of those pairs at that size.

    Item `i`, or `(epoch, i)`: image (C, H, W), float32 and normalized, and mask (1, H, W), float32
    of 0 and 1. Raises BadInput for files that are bad.
    """

    def __init__(
        self,
        image_dir,
        mask_dir,
        transform=None,
        size=None,
        channels=3,
        seed=0,
        pairs=None,
        cache=None,
    ):
        self.pairs = find_pairs(image_dir, mask_dir) if pairs is None else pairs
        self.transform = transform or (get_eval_transform(*size) if size else None)
        self.size = size
        self.channels = channels
        self.seed = seed
        self.cache = cache

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, key):
        # The epoch comes with the index: a worker that lives on would not see an attribute change.
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pair = self.pairs[index]
        if self.cache is not None:
            photo, mask = self.cache.read(pair)
        else:
            check_header(pair)  # the files may have changed since the start
            photo, mask = read_pair(pair, self.size, self.channels)
        transform = self.transform or get_eval_transform(*mask.shape)
        if hasattr(transform, "set_random_state"):
            # One stream for all steps. (set_random_seed would start the same stream in each of
            # them, and the vertical flip would come only with the horizontal one.)
            seed = stable_hash(f"{self.seed} {epoch} {pair.name}")
            transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        # Copied, since arrays from Pillow and from the map are read-only.
        result = transform(image=np.array(photo), mask=np.array(mask))
        image, mask = result["image"], np.asarray(result["mask"], np.float32)
        if isinstance(image, np.ndarray):  # a transform of the caller's without ToTensorV2
            image = torch.from_numpy(image).permute(2, 0, 1)
        return image.float(), torch.from_numpy(mask.reshape(1, *mask.shape[-2:]))

    @property
    def names(self):
        return [pair.name for pair in self.pairs]


class EpochSampler(Sampler):
    """Yields (epoch, index), in an order that is a function of the seed and the epoch.

    Of several processes each takes every n-th, so that their batches together are those of a single
    process with a batch n times as large. The first few come again where it does not come out even,
    and do not count (see distributed.without_repeats).
    """

    def __init__(self, length, seed):
        self.length, self.seed, self.epoch, self.start = length, seed, 0, 0

    def set_epoch(self, epoch, start=0):
        """Draw this epoch's order from now on, without its first `start` photos."""
        self.epoch, self.start = epoch, start

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        order = np.resize(order, self.start + len(self) * world_size())
        own = order[self.start + rank() :: world_size()]
        return ((self.epoch, index) for index in own.tolist())

    def __len__(self):
        return -(-(self.length - self.start) // world_size())


def make_loader(dataset, batch_size, num_workers=0, pin_memory=False, sampler=None):
    """A DataLoader whose workers live on from epoch to epoch and leave signals to the script."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # so that starting workers leaves the main process's RNG alone
    )


def init_worker(_):
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SIGTERM too may be sent to all processes of a run: there is time for its last step.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    cv2.setNumThreads(0)  # workers are what uses the other cores


def end_with_parent():
    """End this process as soon as its run has ended, also by SIGKILL.

    PyTorch looks only now and then, and where the run ended while its worker was starting, never.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


def end_workers(*loaders):
    """End the processes of loaders that are not needed any more.

    Where an exception keeps their queues alive, PyTorch would wait for them in vain when it exits.
    """
    for loader in loaders:
        iterator = getattr(loader, "_iterator", None)  # PyTorch has no public name for it
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()


def get_loaders(
    train_dir,
    train_maskdir,
    val_dir,
    val_maskdir,
    batch_size,
    train_transform=None,
    val_transform=None,
    num_workers=0,
    pin_memory=True,
    size=None,
    channels=3,
    seed=0,
    val_fraction=VAL_FRACTION,
    cache=True,
    cache_dir=None,
    augment="classic",
):
    """(training loader, validation loader); the first one's `sampler.set_epoch` starts an epoch.

    With `size`, (height, width), photos are decoded once into a cache beside them (or in
    `cache_dir`), and a transform left out is the default one, with the augmentation `augment`;
    without, the transforms are applied to the photos at full size. Where `val_dir` is None,
    validation is drawn from the training photos by car. Raises BadInput with all files that are
    bad.
    """
    all_pairs = find_pairs(train_dir, train_maskdir)
    if val_dir is not None:
        train_pairs, val_pairs = all_pairs, find_pairs(val_dir, val_maskdir)
    else:
        train_pairs, val_pairs = split_by_car(all_pairs, val_fraction)

    train_cache = val_cache = first_pass(all_pairs, size, channels, train_dir, cache, cache_dir)
    if val_dir is not None:
        val_cache = first_pass(val_pairs, size, channels, val_dir, cache, cache_dir)

    if size is not None:
        train_transform = train_transform or get_train_transform(*size, augment=augment)
    shared = {"size": size, "channels": channels, "seed": seed}
    train_dataset = CarvanaDataset(
        train_dir, train_maskdir, train_transform, pairs=train_pairs, cache=train_cache, **shared
    )
    val_dataset = CarvanaDataset(
        val_dir, val_maskdir, val_transform, pairs=val_pairs, cache=val_cache, **shared
    )
    sampler = EpochSampler(len(train_dataset), seed)
    val_part = range(rank(), len(val_dataset), world_size())  # see distributed.interleave
    return (
        make_loader(train_dataset, batch_size, num_workers, pin_memory, sampler),
        make_loader(val_dataset, batch_size, num_workers, pin_memory, val_part),
    )


def first_pass(pairs, size, channels, image_dir=None, cache=True, cache_dir=None):
    """Decode everything once, before it is needed, so that all bad files are known together.

    Returns a Cache, or None where there is to be none. Raises BadInput with all files that are bad.
    """
    if size is None:
        return None
    if cache:
        return build_cache(pairs, size, channels, image_dir, cache_dir)
    for _ in decode_all(pairs, size, channels, "checking each photo"):
        pass
    return None


def decode_all(pairs, size, channels, description):
    """Yield each pair as read_pair gives it, in order; raises BadInput once all are known.

    For files that are bad, all together, and where not one mask shows an object.
    """
    empty = True
    read = lambda pair: read_pair(pair, size, channels)  # noqa: E731
    for photo, mask in for_all_pairs(read, pairs, description):
        empty = empty and not mask.any()
        yield photo, mask
    if empty:
        raise BadInput(
            f"{shown(os.path.dirname(pairs[0].mask))}: no mask has a pixel of an object: save them "
            "anew, 0 for the background and 255 for the object"
        )
