"""From files on disk to batches: transforms, split by car, data set, loaders.

find_pairs -> split_by_car -> Cache -> CarvanaDataset -> get_loaders -> batches
"""

import atexit
import math
import os
import random
import re
import weakref
from functools import partial

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before its import, or each start asks the network

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.data import Dataset, Sampler, get_worker_info

from support.cache import decode_once, stable_hash
from support.distributed import rank, world_size
from support.errors import BadInput
from support.images import photo_size, random_crop
from support.loading import make_loader, to_channels
from support.masks import BINARY
from support.pairs import check_header, find_pairs, read_pair

VAL_FRACTION = 0.1  # share of the cars that is held out if there is no validation folder

# Transforms ---------------------------------------------------------------------------------------

# The classic normalization, which gives photos from 0 to 1.
MEAN = 0.0
STD = 1.0
MAX_PIXEL_VALUE = 255.0
NORMALIZATION = {"mean": MEAN, "std": STD, "max_pixel_value": MAX_PIXEL_VALUE}

# What `--augment` does to a photo and its mask: lists to read and to edit.
AUGMENTATIONS = {
    # The tutorials' recipe: rotated by up to 35 degrees, mirrored, sometimes upside down.
    "classic": [A.Rotate(limit=35, p=1.0), A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.1)],
    # For objects that always stand upright, as cars do, and for short trainings.
    "flip": [A.HorizontalFlip(p=0.5)],
    # For few photos: also shifted, scaled, in other light and colours, noisy or blurred.
    "strong": [
        A.HorizontalFlip(p=0.5),
        A.Affine(
            scale=(0.8, 1.25),
            translate_percent=(-0.1, 0.1),
            rotate=(-5, 5),
            border_mode=cv2.BORDER_REFLECT_101,
            p=0.8,
        ),
        A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, p=0.8),
        A.OneOf([A.GaussNoise(std_range=(0.01, 0.05)), A.GaussianBlur(blur_limit=(3, 5))], p=0.2),
    ],
}


def get_eval_transform(
    height=None,
    width=None,
    mean=MEAN,
    std=STD,
    max_pixel_value=MAX_PIXEL_VALUE,
    augmentation=(),
):
    """What evaluation and prediction do to a photo (H, W, C) and its mask (H, W), both uint8.

    Without height and width both keep their size.
    """
    # Masks are shrunk by area: OpenCV's nearest neighbour shifts them by up to half a step.
    resize = [A.Resize(height, width, mask_interpolation=cv2.INTER_AREA)] if height else []
    normalize = A.Normalize(mean, std, max_pixel_value)
    return A.Compose([*resize, *augmentation, normalize, ToTensorV2()])


def get_train_transform(height, width, augment="classic", **normalization):
    """What training does: the same, with one of AUGMENTATIONS."""
    return get_eval_transform(height, width, **normalization, augmentation=AUGMENTATIONS[augment])


def is_deterministic(transform):
    """Whether a transform only resizes and normalizes, as evaluation's does."""
    steps = (A.Resize, A.Normalize, ToTensorV2)
    return isinstance(transform, A.Compose) and all(isinstance(step, steps) for step in transform)


# The split ----------------------------------------------------------------------------------------


def car_id(name, group=None):
    """The id of the car, or other group, that a photo's name belongs to, in lower case.

    With `group`, a regular expression, it is what its first group finds in the name; otherwise the
    car of `<12 hex digits>_<01..16>`, as the challenge names its photos; else the name itself.
    """
    found = re.search(group, name) if group else None
    found = found or re.fullmatch(r"([0-9a-f]{12})_(0[1-9]|1[0-6])", name.lower())
    return (found and found[1] or name).lower()


def split_by_car(pairs, fraction=VAL_FRACTION, group=None):
    """(training pairs, validation pairs): each car is in one of them, with all its views.

    A car is held out if the hash of its id is below `fraction`, so neither the seed nor photos
    added later move it. Each side gets at least one car. Raises BadInput if there is only one.
    """
    car_of = {pair: car_id(pair.name, group) for pair in pairs}
    place_of = {car: stable_hash(car) / 2**64 for car in set(car_of.values())}
    if len(place_of) < 2:
        only = "the only car or photo there is, and validation needs another"
        raise BadInput(pairs[0].photo, only, "add photos, or a folder of validation photos")
    first, *_, last = sorted(place_of, key=place_of.get)
    below = {car for car, place in place_of.items() if place < fraction}
    held_out = (below | {first}) - {last}
    training = [pair for pair in pairs if car_of[pair] not in held_out]
    validation = [pair for pair in pairs if car_of[pair] in held_out]
    return training, validation


# The data set -------------------------------------------------------------------------------------


class CarvanaDataset(Dataset):
    """Photos and masks as tensors.

    Args:
        image_dir, mask_dir: folders; see find_pairs.
        transform: albumentations' Compose, applied to the photo (H, W, C) and the mask (H, W), both
            uint8; None for evaluation's, which has no randomness, at `size` or else at the photo's
            own size.
        size: (height, width) that photos are decoded to before the transform; None: full size.
        channels: 3 for RGB, 1 for grey.
        seed: determines, with the epoch and the photo's name, what is random about `(epoch, i)`.
        pairs: a part of what find_pairs finds, such as one side of split_by_car.
        cache: a Cache that holds those pairs at that size.
        labels: what the values in the masks' files mean.
        crop: side of the square, in pixels, that is cut out at random before the transform.

    An item is an image (C, H, W), float32 and normalized, and a mask (K, H, W) for K classes,
    float32, see to_channels. Item `i` is augmented differently each time, by PyTorch's random
    numbers; item `(epoch, i)` is always the same. Raises BadInput for bad files.
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
        labels=BINARY,
        crop=None,
    ):
        self.pairs = find_pairs(image_dir, mask_dir) if pairs is None else pairs
        self.transform = transform or get_eval_transform(*(size or (None, None)))
        # Evaluation takes no random numbers: a resumed run could not know how many.
        self.is_random = bool(crop) or not is_deterministic(self.transform)
        self.size = size
        self.channels = channels
        self.seed = seed
        self.cache = cache
        self.labels = labels
        self.crop = crop

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, key):
        # The epoch comes with the index: a worker that lives on would not see an attribute change.
        epoch, index = key if isinstance(key, tuple) else (None, key)
        photo, mask = self.read(self.pairs[index])
        if self.is_random:
            numpy_random, python_random = self.random_generators(epoch, index)
            if self.crop:
                photo, mask = random_crop(photo, mask, self.crop, python_random)
            if hasattr(self.transform, "set_random_state"):
                # One stream for all steps: set_random_seed would start the same one in each.
                self.transform.set_random_state(numpy_random, python_random)
        # Copied, since arrays from Pillow and from the memory map are read-only.
        result = self.transform(image=np.array(photo), mask=np.array(mask))
        image = result["image"]
        if isinstance(image, np.ndarray):  # the caller's transform has no ToTensorV2
            image = torch.from_numpy(image).permute(2, 0, 1)
        return image.float(), to_channels(result["mask"], self.labels)

    def random_generators(self, epoch, index):
        """NumPy's and Python's generators for what is random about an item in an epoch.

        Without an epoch (None) they are seeded by PyTorch's own generator. A DataLoader seeds that
        differently in each of its workers.
        """
        if epoch is None:
            seed = torch.randint(2**63 - 1, ()).item()
        else:
            text = f"{self.seed} {epoch} {self.pairs[index].name}"
            # With crops, a photo comes several times an epoch.
            seed = stable_hash(f"{text} {index}" if self.crop else text)
        return np.random.default_rng(seed), random.Random(seed)

    def read(self, pair):
        """(photo, mask) as they are before the transform; see support.pairs.read_pair."""
        if self.cache is not None:
            return self.cache.read(pair)
        check_header(pair)  # the files may have changed since the start
        return read_pair(pair, self.size, self.channels, self.labels)

    @property
    def names(self):
        """The photos' names, in order."""
        return [pair.name for pair in self.pairs]


class ReportingDataset(CarvanaDataset):
    """The data set for a PhotoLoader, which raises a worker's BadInput as it is."""

    def __getitems__(self, keys):
        """A batch's items. A worker, which cannot raise a whole BadInput, returns it instead."""
        try:
            return [self[key] for key in keys]
        except BadInput as problem:
            if get_worker_info() is None:
                raise
            return problem


class EpochSampler(Sampler):
    """Yields (epoch, index), in an order that is a function of the seed and the epoch.

    Each iteration is another epoch: the one that set_epoch chose, or else the next one, from 0 on.
    With n processes each takes every n-th index, so their batches together are those of one
    process. The first indices are repeated where that does not come out even (see
    support.distributed.drop_repeats).
    """

    def __init__(self, length, seed):
        self.length = length
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        """Choose the epoch of the next iteration, which leaves out its first `start` photos."""
        self.epoch = epoch
        self.start = start
        self.has_begun = False

    def __iter__(self):
        if self.has_begun:
            self.set_epoch(self.epoch + 1)
        self.has_begun = True
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        order = np.resize(order, self.start + len(self) * world_size())
        for index in order[self.start + rank() :: world_size()].tolist():
            yield epoch, index

    def __len__(self):
        return -(-(self.length - self.start) // world_size())


# Loaders ------------------------------------------------------------------------------------------


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
    mask_suffix=None,
    labels=BINARY,
    group=None,
    crop=None,
    normalization=None,
):
    """(training loader, validation loader).

    Each iteration of the training loader has another order and augmentation, which depend on `seed`
    alone; its `sampler.set_epoch` chooses the epoch, as resuming needs it.

    With `size`, (height, width), photos are decoded once into a cache beside them (or in
    `cache_dir`), and a transform left out is the default one, with the augmentation `augment`;
    without, the transforms are applied to photos at full size. If `val_dir` is None, validation is
    drawn from the training photos by car or `group` (see car_id). With `crop`, photos are cached
    as they are; an epoch has as many squares of `crop` pixels as would cover them, and validation
    has whole photos, one per batch. `normalization`, see NORMALIZATION, is that of the default
    transforms. Raises BadInput that lists all bad files.
    """
    all_pairs = find_pairs(train_dir, train_maskdir, mask_suffix)
    if val_dir is None:
        train_pairs, val_pairs = split_by_car(all_pairs, val_fraction, group)
    else:
        train_pairs, val_pairs = all_pairs, find_pairs(val_dir, val_maskdir, mask_suffix)

    decoded_size = None if crop else size
    train_cache = val_cache = None
    if size:
        decode = partial(
            decode_once,
            size=decoded_size,
            channels=channels,
            labels=labels,
            cache=cache,
            cache_dir=cache_dir,
        )
        train_cache = decode(all_pairs, train_dir)
        val_cache = train_cache if val_dir is None else decode(val_pairs, val_dir)
        normalization = normalization or NORMALIZATION
        train_transform = train_transform or get_train_transform(*size, augment, **normalization)
        eval_size = decoded_size or (None, None)
        val_transform = val_transform or get_eval_transform(*eval_size, **normalization)
    if crop:
        train_pairs = repeat_for_crops(train_pairs, crop)

    dataset = partial(
        ReportingDataset, None, None, size=decoded_size, channels=channels, seed=seed, labels=labels
    )
    train_set = dataset(train_transform, pairs=train_pairs, cache=train_cache, crop=crop)
    val_set = dataset(val_transform, pairs=val_pairs, cache=val_cache)
    loader = partial(make_loader, num_workers=num_workers, pin_memory=pin_memory)
    val_share = range(rank(), len(val_set), world_size())  # see utils.check_accuracy
    train_loader = loader(train_set, batch_size, sampler=EpochSampler(len(train_set), seed))
    val_loader = loader(val_set, 1 if crop else batch_size, sampler=val_share)
    if num_workers:
        close_at_exit(train_loader)
        close_at_exit(val_loader)
    return train_loader, val_loader


def close_at_exit(loader):
    """Close a loader, if it still exists, when the script ends, however that comes about.

    Its workers ignore SIGTERM, by which Python ends processes that are left, and then waits.
    """
    reference = weakref.ref(loader)

    def close():
        if (existing := reference()) is not None:
            existing.close()

    atexit.register(close)


def repeat_for_crops(pairs, side):
    """Each pair as often as squares of `side` pixels would cover its photo."""
    repeated = []
    for pair in pairs:
        height, width = photo_size(pair.photo)
        repeated += [pair] * (math.ceil(height / side) * math.ceil(width / side))
    return repeated
