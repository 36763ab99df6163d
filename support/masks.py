"""Masks: reading one of any kind as object and background, or as classes and ignored pixels."""

import dataclasses

import numpy as np
from PIL import Image, ImageOps

from support.errors import BadInput
from support.images import open_image
from support.mask_values import count_values

IGNORED = 255  # the ignore index in masks as read_mask gives them: counts in no loss and no score
MAX_CLASSES = 254  # 8 bits, less 0 for background and IGNORED
TINT = 16  # by how much JPEG may let the channels of a black-and-white mask differ


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the values in mask files mean.

    Attributes:
        classes: how many classes there are; with 1, masks show one kind of object.
        values: the file's value of each class, if not 1, 2, ...; with one class, every value that
            means object.
        ignore: the file's value of pixels that count in no loss and no score.
    """

    classes: int = 1
    values: tuple[int, ...] = ()
    ignore: int | None = None

    def __post_init__(self):
        if self.classes > 1 and self.values and len(self.values) != self.classes:
            reason = f"{len(self.values)} values for {self.classes} classes"
            raise BadInput("--mask-value", reason, "give one for each, in the order of --classes")

    @property
    def is_soft_mask(self):
        """Whether masks hold the object's share of each pixel, 0 to 255, rather than classes."""
        return self.classes == 1 and self.ignore is None

    def objects(self, mask):
        """Where a mask (H, W) from read_mask shows an object, in at least half of the pixel."""
        return mask > 127 if self.is_soft_mask else (mask > 0) & (mask != IGNORED)


BINARY = Labels()  # one kind of object, nothing ignored


def read_mask(path, size=None, labels=BINARY, counts=None):
    """Read one mask, upright: (H, W), uint8. Raises BadInput for colours and unknown values.

    With one class and nothing ignored, pixels hold the object's share, 0 to 255. A file whose
    maximum is at most 1 holds 0 and 1; other levels are thresholded at half of the range. Grey
    palettes count by colour, other palettes of two entries by index; RGB must be black and white.

    Otherwise pixels hold 0 for background, 1 to labels.classes, or IGNORED, found from the file's
    grey levels or palette indices.

    Args:
        path: the file.
        size: (height, width) to resize to, by averaging over areas, where the class with the
            largest share wins; None keeps the file's own size, at which shares are 0 or 255.
        labels: what the file's values mean.
        counts: a list that receives the mask's ValueCounts, for check_values.
    """
    with open_image(path) as image:
        if image.format == "JPEG":
            counts = None  # its noise would look like classes
        ImageOps.exif_transpose(image, in_place=True)
        if not labels.is_soft_mask:
            mask = label_mask(image, path, labels, counts)
            return mask if size is None else largest_share(mask, size)
        if labels.values:
            image = Image.fromarray(label_mask(image, path, labels) * np.uint8(255))
        convert = palette_mask if image.mode == "P" else level_mask
        mask = convert(image, path, counts)
        if size is not None:
            mask = mask.resize(size[::-1], Image.Resampling.BOX)
        return np.asarray(mask)


# Classes ------------------------------------------------------------------------------------------


def label_mask(image, path, labels, counts=None):
    """Classes and IGNORED, (H, W), uint8, from an image's grey levels or palette indices."""
    levels = raw_levels(image, path)
    ignored = np.zeros(levels.shape, bool) if labels.ignore is None else levels == labels.ignore
    if labels.classes > 1 or labels.values:
        mask = classes_of(levels, ignored, labels, path)
    else:  # give ignored pixels a level of the others, so that they decide nothing
        lowest = levels.min(where=~ignored, initial=levels.max())
        others = Image.fromarray(np.where(ignored, lowest, levels))
        mask = np.asarray(level_mask(others, path, counts)) >> 7
    return np.where(ignored, np.uint8(IGNORED), mask)


def classes_of(levels, ignored, labels, path):
    """The class of each level, (H, W), uint8; 0 where there is none. Without `labels.values`, a
    level above the number of classes raises BadInput."""
    mask = np.zeros(levels.shape, np.uint8)
    for number, value in enumerate(labels.values or range(1, labels.classes + 1), start=1):
        mask[levels == value] = number if labels.classes > 1 else 1
    unknown = levels[(mask == 0) & (levels != 0) & ~ignored]
    if len(unknown) and not labels.values:
        value = unknown[0]
        found = f"holds {value} ({(unknown == value).sum()} pixels)"
        remedy = f"raise --classes, or give --ignore {value}, or each class's --mask-value"
        raise BadInput(path, f"{found}, above --classes {labels.classes}", remedy)
    return mask


def largest_share(mask, size):
    """Classes (H, W) at another size: the class that covers most of each area, and the lowest one
    if several cover the same."""
    numbers = np.unique(mask)
    planes = (Image.fromarray((mask == number).astype(np.float32)) for number in numbers)
    shares = [np.asarray(plane.resize(size[::-1], Image.Resampling.BOX)) for plane in planes]
    return numbers[np.argmax(np.round(shares, 4), axis=0)]  # rounded: float sums are not exact


# Object and background ----------------------------------------------------------------------------


def palette_mask(image, path, counts):
    """The mask of an image with a palette, as an image of 0 and 255.

    A table maps the palette's entries, since converting to grey costs three times the decoding.
    """
    colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    two_at_most = len(colours) <= 2  # then there is no need to count which of them are used
    used = np.arange(len(colours)) if two_at_most else np.flatnonzero(image.histogram())
    colours = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
    table = np.zeros(256, np.uint8)
    if (colours[used] == colours[used, :1]).all():
        greys = colours[:, 0]
        table[used] = binarize(greys[used])
        if len(used) > 2 or (greys[used] == used).all():
            count_values(greys[np.asarray(image)], counts)
    elif len(used) <= 2:
        table[used] = used > (used[0] if len(used) == 2 else 0)
    else:
        count_values(np.asarray(image), counts)
        raise not_a_mask(path, f"a palette of {len(used)} colours")
    return image.point((table * 255).tolist(), "L")


def level_mask(image, path, counts):
    """The mask of an image without a palette, as an image of 0 and 255."""
    if image.mode in ("LA", "RGBA"):
        *colours, (least_alpha, most_alpha) = image.convert("RGBA").getextrema()
        if all(least == most for least, most in colours) and least_alpha < most_alpha:
            image = image.getchannel("A")  # of a single colour: then alpha is the mask
    levels = raw_levels(image, path, tint=TINT)
    count_values(levels, counts)
    top = 65535 if levels.max() > 255 else 255
    middle = (levels > top // 4) & (levels < top - top // 4)
    if middle.mean() > 0.5 and len(np.unique(levels)) > 2:
        raise not_a_mask(path, "shades of grey in most places")
    return Image.fromarray(binarize(levels, top // 2) * np.uint8(255))


def binarize(levels, threshold=127):
    """Grey levels as 0 and 1, uint8: masks of 0 and 1 as they are, others thresholded."""
    if levels.max() <= 1:
        return levels.astype(np.uint8)
    return (levels > threshold).astype(np.uint8)


# Files' values ------------------------------------------------------------------------------------


def raw_levels(image, path, tint=0):
    """An image's grey levels, or the indices of a palette that is not grey: (H, W), integers.

    The channels of an RGB image may differ by at most `tint`; others raise BadInput.
    """
    if image.mode == "P":
        colours = np.reshape(image.getpalette("RGB"), (-1, 3))
        image = image.convert("L") if (colours == colours[:, :1]).all() else image
    if image.mode in ("P", "1", "L", "LA"):
        return np.asarray(image.getchannel(0)).astype(np.uint8)
    if image.mode.startswith("I"):
        return np.asarray(image)
    if image.mode not in ("RGB", "RGBA"):
        raise not_a_mask(path, f"pixels of kind {image.mode}")
    channels = [np.asarray(channel) for channel in image.split()[:3]]
    if (np.maximum.reduce(channels) - np.minimum.reduce(channels)).max() > tint:
        raise not_a_mask(path, "colours")
    return channels[1]


def not_a_mask(path, found):
    """The BadInput for an image that holds something else than a mask."""
    reason = f"has {found}, so it is not a mask of background and object"
    remedy = (
        "save it in black and white (or are the folders of photos and masks swapped?), or save it "
        "as a palette or grey image that holds the class of each pixel, and name --classes or "
        "--mask-value"
    )
    return BadInput(path, reason, remedy)
