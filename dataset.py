"""From files on disk to batches: transforms, split by car, data set, loaders.

find_pairs -> split_by_car -> Cache -> CarvanaDataset -> get_loaders -> batches
"""

import os
import random
import re

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before its import, or each start asks the network

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.data import Dataset, Sampler, get_worker_info

from support.cache import BINARY, Cache, decode_all, stable_hash
from support.distributed import rank, world_size
from support.errors import BadInput
from support.images import photo_size, random_crop
from support.loading import DeviceLoader, copy_to, make_loader, to_channels
from support.pairs import check_header, find_pairs, read_pair

VAL_FRACTION = 0.1  # share of the cars held out where there is no validation folder

# Transforms ---------------------------------------------------------------------------------------

MEAN, STD, MAX_PIXEL_VALUE = 0.0, 1.0, 255.0  # the classic normalization: photos from 0 to 1

# What `--augment` does to a photo and its mask: lists to read and to edit.
AUGMENTATIONS = {
    # The recipe of the tutorials: turned up to 35 degrees, mirrored, now and then upside down.
    "classic": [A.Rotate(limit=35, p=1.0), A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.1)],
    # For objects that always stand upright, as cars do, and short trainings.
    "flip": [A.HorizontalFlip(p=0.5)],
    # For few photos: also moved, scaled, in other light and colours, noisy or blurred.
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
    height, width, mean=MEAN, std=STD, max_pixel_value=MAX_PIXEL_VALUE, augmentation=()
):
    """What evaluation and prediction do to a photo (H, W, C) and its mask (H, W), both uint8."""
    # Masks are shrunk by area: OpenCV's nearest neighbour shifts them by up to half a step.
    resize = A.Resize(height, width, mask_interpolation=cv2.INTER_AREA)
    normalize = A.Normalize(mean, std, max_pixel_value)
    return A.Compose([resize, *augmentation, normalize, ToTensorV2()])


def get_train_transform(height, width, augment="classic", **normalization):
    """What training does: the same, with one of AUGMENTATIONS."""
    return get_eval_transform(height, width, **normalization, augmentation=AUGMENTATIONS[augment])


# The split ----------------------------------------------------------------------------------------


def car_id(name, group=None):
    """What stays on one side of the split: what the first group of the regular expression `group`
    finds in a photo's name, else the car of `<12 hex digits>_<01..16>`, as the challenge names its
    photos; of any other name, the name itself."""
    found = re.search(group, name) if group else None
    found = found or re.fullmatch(r"([0-9a-f]{12})_(0[1-9]|1[0-6])", name.lower())
    return (found and found[1] or name).lower()


def split_by_car(pairs, fraction=VAL_FRACTION, group=None):
    """(training pairs, validation pairs): a car is in one of them, with all its views.

    A car is held out where the hash of its id is below `fraction`, so neither the seed nor photos
    added later move it. Each side gets at least one car. Raises BadInput where there is only one.
    """
    cars = {pair: car_id(pair.name, group) for pair in pairs}
    place = {car: stable_hash(car) / 2**64 for car in set(cars.values())}
    if len(place) < 2:
        only = "the only car or photo there is, and validation needs another"
        raise BadInput(pairs[0].photo, only, "add photos, or a folder of validation photos")
    first, *_, last = sorted(place, key=place.get)
    held_out = ({car for car in place if place[car] < fraction} | {first}) - {last}
    validation = [pair for pair in pairs if cars[pair] in held_out]
    return [pair for pair in pairs if cars[pair] not in held_out], validation


# The data set -------------------------------------------------------------------------------------


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
        cache: a Cache that holds those pairs at that size.
        labels: what the values in the masks' files mean.
        crop: side of the square, in pixels, that is cut out at random before the transform.

    Item `i`, or `(epoch, i)`: image (C, H, W), float32 and normalized, and mask (K, H, W) for K
    classes, float32, see to_channels. Raises BadInput for files that are bad.
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
        self.transform = transform or (get_eval_transform(*size) if size else None)
        self.size, self.channels, self.seed, self.cache = size, channels, seed, cache
        self.labels, self.crop = labels, crop

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, key):
        photo, mask = self.read(self.pair_of(key))
        if self.crop:
            photo, mask = random_crop(photo, mask, self.crop, self.random_state(key)[1])
        transform = self.transform or get_eval_transform(*mask.shape)
        if hasattr(transform, "set_random_state"):
            # One stream for all steps: set_random_seed would start the same one in each of them.
            transform.set_random_state(*self.random_state(key))
        # Copied, since arrays from Pillow and from the map are read-only.
        result = transform(image=np.array(photo), mask=np.array(mask))
        image, mask = result["image"], result["mask"]
        if isinstance(image, np.ndarray):  # a transform of the caller's without ToTensorV2
            image = torch.from_numpy(image).permute(2, 0, 1)
        return image.float(), to_channels(mask, self.labels)

    def pair_of(self, key):
        """The pair of an item."""
        return self.pairs[key[1] if isinstance(key, tuple) else key]

    def random_state(self, key):
        """NumPy's and Python's generators of what is random about an item."""
        # The epoch comes with the index: a worker that lives on would not see an attribute change.
        epoch, index = key if isinstance(key, tuple) else (0, key)
        text = f"{self.seed} {epoch} {self.pairs[index].name}"
        # A photo of many crops comes many times an epoch.
        seed = stable_hash(f"{text} {index}" if self.crop else text)
        return np.random.default_rng(seed), random.Random(seed)

    def read(self, pair):
        """(photo, mask) as they are before the transform; see support.pairs.read_pair."""
        if self.cache is not None:
            return self.cache.read(pair)
        check_header(pair)  # the files may have changed since the start
        return read_pair(pair, self.size, self.channels, self.labels)

    def __getitems__(self, keys):
        """A batch's items; in a worker, which cannot raise it whole, a BadInput in their place."""
        try:
            return [self[key] for key in keys]
        except BadInput as problem:
            if get_worker_info() is None:
                raise
            return problem

    @property
    def names(self):
        """The photos' names, in order."""
        return [pair.name for pair in self.pairs]


class EpochSampler(Sampler):
    """Yields (epoch, index), in an order that is a function of the seed and the epoch.

    Of several processes each takes every n-th: their batches together are those of one process. The
    first few come again where it does not come out even (see support.distributed.own_part).
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
    device=None,
):
    """(training loader, validation loader); the first one's `sampler.set_epoch` starts an epoch.

    With `size`, (height, width), photos are decoded once into a cache beside them (or in
    `cache_dir`), and a transform left out is the default one, with the augmentation `augment`;
    without, the transforms are applied to the photos at full size. Where `val_dir` is None,
    validation is drawn from the training photos by car or `group` (see car_id). With `crop`, photos
    are cached as they are; an epoch has as many squares of `crop` pixels as would cover them, and
    validation has whole photos, one a batch. Where cached photos are only mirrored and take at most
    a quarter of the free memory of a GPU, `device`, they are kept there. Raises BadInput with all
    bad files.
    """
    decoded_size = None if crop else size

    def first_pass(pairs, image_dir):
        """Decode all pairs once, so that all bad files are known together; a Cache, or None."""
        if size and cache:
            decoded = Cache(pairs, decoded_size, channels, image_dir, cache_dir, labels)
            decoded.build()
            return decoded
        what = pairs, decoded_size, channels, "checking each photo", labels
        for _ in decode_all(*what) if size else ():
            pass

    def loader_of(pairs, transform, decoded, sampler, batch_size, crop):
        photos = decoded_size, channels, seed, pairs, decoded, labels, crop
        dataset = CarvanaDataset(None, None, transform, *photos)
        if decoded in on_device:
            flip = A.Compose(AUGMENTATIONS[augment]) if sampler is order else None
            return DeviceLoader(dataset, batch_size, sampler, on_device[decoded], flip)
        return make_loader(dataset, batch_size, num_workers, pin_memory, sampler)

    train_pairs = all_pairs = find_pairs(train_dir, train_maskdir, mask_suffix)
    if val_dir is None:
        train_pairs, val_pairs = split_by_car(all_pairs, val_fraction, group)
        train_cache = val_cache = first_pass(all_pairs, train_dir)
    else:
        val_pairs = find_pairs(val_dir, val_maskdir, mask_suffix)
        train_cache, val_cache = first_pass(all_pairs, train_dir), first_pass(val_pairs, val_dir)
    mirrored_only = [type(step) for step in AUGMENTATIONS[augment]] == [A.HorizontalFlip]
    usual = mirrored_only and (MEAN, STD, MAX_PIXEL_VALUE) == (0.0, 1.0, 255.0)
    on_device = {}
    if device and train_cache and usual and not (crop or train_transform or val_transform):
        on_device = copy_to(device, train_cache, val_cache)
    if on_device:
        print(f"Photos and masks lie in the memory of {device}: no workers load them")
    if size:
        train_transform = train_transform or get_train_transform(*size, augment=augment)
    if crop:
        sizes = [photo_size(pair.photo) for pair in train_pairs]
        counts = [-(-height // crop) * -(-width // crop) for height, width in sizes]
        train_pairs = [p for p, n in zip(train_pairs, counts, strict=True) for _ in range(n)]
    order = EpochSampler(len(train_pairs), seed)
    val_part = range(rank(), len(val_pairs), world_size())  # see utils.check_accuracy
    return (
        loader_of(train_pairs, train_transform, train_cache, order, batch_size, crop),
        loader_of(val_pairs, val_transform, val_cache, val_part, 1 if crop else batch_size, None),
    )
