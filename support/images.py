"""Reading one photo or one mask, of any format that Pillow reads."""

import contextlib
import dataclasses
import os
from collections import Counter

import numpy as np
from PIL import ExifTags, Image, ImageOps

from support.errors import BadInput

MAX_PIXELS = 250_000_000  # of one photo; about 750 MB once decoded
Image.init()  # fills Image.OPEN
# Pillow runs Ghostscript on EPS, has others read by other programs, and decodes the last four
# before it says how large they are.
NOT_READ = {"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5", "CUR", "FITS", "ICNS", "ICO"}
FORMATS = tuple(sorted(set(Image.OPEN) - NOT_READ))
IGNORED = 255  # in a mask that was read: pixels of which nobody knows what they are
MAX_CLASSES = 254  # numbers that 0, for background, and IGNORED leave of 8 bits


@dataclasses.dataclass(frozen=True)
class Labels:
    """How masks are read: the number of --classes, --mask-value and --ignore."""

    classes: int = 1
    values: tuple[int, ...] = ()
    ignore: int | None = None

    def __post_init__(self):
        if self.classes > 1 and self.values and len(self.values) != self.classes:
            reason = f"{len(self.values)} values for {self.classes} classes"
            raise BadInput("--mask-value", reason, "give one for each, in the order of --classes")

    @property
    def is_soft_mask(self):
        """Whether masks hold the object's share of each pixel, 0 to 255, and no classes."""
        return self.classes == 1 and self.ignore is None

    def objects(self, mask):
        """Where a mask that was read, (H, W), shows an object: half of a pixel at least."""
        return mask > 127 if self.is_soft_mask else (mask > 0) & (mask != IGNORED)


@contextlib.contextmanager
def open_image(path):
    """Open an image; only its header is read. Raises BadInput for all that goes wrong until the
    block ends: it decodes, and a decoder fed with a broken file raises whatever it likes."""
    try:
        if os.path.getsize(path) == 0:
            raise BadInput(path, "the file is empty (0 bytes)", "copy it again, or remove it")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                much = f"{image.width}x{image.height} is more than {MAX_PIXELS // 10**6} megapixels"
                raise BadInput(path, much, "scale it down, or remove it")
            yield image
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(path, "no such file", "check the path") from None
    except Exception as error:
        why = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        remedy = "copy it again, or remove it"
        raise BadInput(path, f"cannot be read as an image ({why})", remedy) from error


def orientation(image):
    """The camera's EXIF orientation, 1 to 8; 1 is upright, 5 and above lie on their side."""
    if image.format == "TIFF":  # which Pillow turns by itself
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def upright_size(image):
    """(width, height) of an image once it is upright; reads the header only."""
    return image.size[::-1] if orientation(image) >= 5 else image.size


def photo_size(path):
    """(height, width) of a photo once it is upright, from its header. Raises BadInput."""
    with open_image(path) as image:
        width, height = upright_size(image)
    return height, width


def decode_scaled(image, size):
    """Let a JPEG's decoder shrink by 1/2, 1/4 or 1/8, never to below `size`, (height, width).

    Returns the box of the decoded image that is the photo, or None for all of it: at 1/8, 1918
    pixels are decoded into 240 of which the last is three quarters photo and one quarter filling.
    """
    height, width = size[::-1] if orientation(image) >= 5 else size
    for scale in (8, 4, 2):
        big_enough = image.width / scale > width - 1 and image.height / scale > height - 1
        exact = image.width % scale == 0 and image.height % scale == 0
        if big_enough and (exact or orientation(image) == 1):  # where the filling is on the right
            # Asked for the size itself, Image.draft would divide 1918 by 240, get 7, and take 1/4.
            drafted = image.draft(None, (image.width // scale, image.height // scale))
            return None if exact or drafted is None else drafted[1]
    return None


def read_photo(path, size=None, channels=3):
    """One photo: (H, W, channels), uint8, RGB or grey, upright.

    It is shrunk or stretched to `size`, (height, width), antialiased; None leaves its own. Alpha is
    dropped, 16-bit grey scaled to 8 bits, of an animation the first frame counts. Raises BadInput.
    """
    with open_image(path) as image:
        box = decode_scaled(image, size) if size is not None else None
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            levels = np.asarray(image)
            levels = levels / 257 if levels.max() > 255 else levels
            image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        elif image.mode == "F":
            raise BadInput(path, "floating-point pixels", "save it with 8 bits a channel")
        elif image.has_transparency_data:
            image = image.convert("RGBA")
        image = image.convert("RGB" if channels == 3 else "L")
        if size is not None and (image.size != size[::-1] or box):
            image = image.resize(size[::-1], Image.Resampling.BILINEAR, box, reducing_gap=2.0)
        return np.asarray(image).reshape(image.height, image.width, channels)


def read_mask(path, size=None, labels=Labels(), counts=None):
    """One mask, upright: (H, W), uint8, the object's share of each pixel, 0 to 255; of several
    classes, or with some pixels ignored, 0 for background, 1 to labels.classes, or IGNORED.

    It is brought to `size`, (height, width), by averaging over areas; of classes the largest share
    wins. Without `size` all shares are 0 or 255. Grey palettes count by colour, other palettes of
    two entries by index; RGB must be black and white. A maximum of at most 1 means 0 and 1; all
    else is cut at 127. With `labels`, grey levels and palette indices count. `counts`, a list, gets
    what check_values needs. Raises BadInput for other colours and values.
    """
    with open_image(path) as image:
        counts = None if image.format == "JPEG" else counts  # its noise is no classes
        ImageOps.exif_transpose(image, in_place=True)
        if not labels.is_soft_mask:
            mask = label_mask(image, path, labels, counts)
            return mask if size is None else largest_share(mask, size)
        if labels.values:
            image = Image.fromarray(label_mask(image, path, labels) * np.uint8(255))
        mask = (palette_mask if image.mode == "P" else level_mask)(image, path, counts)
        return np.asarray(mask if size is None else mask.resize(size[::-1], Image.Resampling.BOX))


def label_mask(image, path, labels, counts=None):
    """Classes and IGNORED, (H, W), of an image whose grey levels or palette indices count."""
    levels = raw_levels(image, path)
    ignored = np.False_ if labels.ignore is None else levels == labels.ignore
    if labels.classes > 1 or labels.values:
        mask = np.zeros(levels.shape, np.uint8)
        for number, value in enumerate(labels.values or range(1, labels.classes + 1), 1):
            mask[levels == value] = number if labels.classes > 1 else 1
        others = levels[(mask == 0) & (levels != 0) & ~ignored]
        if len(others) and not labels.values:
            found = f"holds {others[0]} ({(others == others[0]).sum()} pixels)"
            remedy = f"raise --classes, or name --ignore {others[0]}, or each class's --mask-value"
            raise BadInput(path, f"{found}, above --classes {labels.classes}", remedy)
    else:  # as if the pixels to ignore were not there
        rest = np.where(ignored, levels.min(where=~ignored, initial=levels.max()), levels)
        mask = np.asarray(level_mask(Image.fromarray(rest), path, counts)) >> 7
    return np.where(ignored, np.uint8(IGNORED), mask)


def largest_share(mask, size):
    """Classes (H, W) at another size: the one with most of each area, the lowest of equal ones."""
    found = np.unique(mask)
    parts = (Image.fromarray((mask == value).astype(np.float32)) for value in found)
    shares = [np.asarray(part.resize(size[::-1], Image.Resampling.BOX)) for part in parts]
    return found[np.argmax(np.round(shares, 4), axis=0)]  # rounded: sums of floats are not exact


def palette_mask(image, path, counts):
    """The mask of an image with a palette, as an image of 0 and 255.

    By a table of the palette's entries: converting to grey would cost three times the decoding.
    """
    colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    few = len(colours) <= 2  # then there is no need to look which of them are used
    used = np.arange(len(colours)) if few else np.flatnonzero(image.histogram())
    colours = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
    table = np.zeros(256, np.uint8)
    if (colours[used] == colours[used, :1]).all():
        table[used] = binarize(colours[used, 0])
        if len(used) > 2 or (colours[used, 0] == used).all():
            count_values(colours[:, 0][np.asarray(image)], counts)
    elif len(used) <= 2:
        table[used] = used > (used[0] if len(used) == 2 else 0)
    else:
        count_values(np.asarray(image), counts)
        raise no_mask(path, f"a palette of {len(used)} colours")
    return image.point((table * 255).tolist(), "L")


def level_mask(image, path, counts):
    """The mask of an image without a palette, as an image of 0 and 255."""
    if image.mode in ("LA", "RGBA"):
        *colours, (low, high) = image.convert("RGBA").getextrema()
        if all(least == most for least, most in colours) and low < high:  # then alpha is the mask
            image = image.getchannel("A")
    levels = raw_levels(image, path, tint=16)  # which JPEG leaves on black and white
    count_values(levels, counts)
    top = 65535 if levels.max() > 255 else 255
    middle = (levels > top // 4) & (levels < top - top // 4)
    if middle.mean() > 0.5 and len(np.unique(levels)) > 2:
        raise no_mask(path, "shades of grey in most places")
    return Image.fromarray(binarize(levels, top // 2) * np.uint8(255))


def raw_levels(image, path, tint=0):
    """Grey levels, or of a palette that is not grey the indices, (H, W), of an image whose RGB
    differ by at most `tint`."""
    if image.mode == "P":
        colours = np.reshape(image.getpalette("RGB"), (-1, 3))
        image = image.convert("L") if (colours == colours[:, :1]).all() else image
    if image.mode in ("P", "1", "L", "LA"):
        return np.asarray(image.getchannel(0)).astype(np.uint8)
    if image.mode.startswith("I"):
        return np.asarray(image)
    if image.mode not in ("RGB", "RGBA"):
        raise no_mask(path, f"pixels of kind {image.mode}")
    rgb = [np.asarray(channel) for channel in image.split()[:3]]
    if (np.maximum.reduce(rgb) - np.minimum.reduce(rgb)).max() > tint:
        raise no_mask(path, "colours")
    return rgb[1]


def binarize(levels, at=127):
    """Grey levels as 0 and 1, uint8: 0/1 masks as they are, others cut at the middle."""
    return levels.astype(np.uint8) if levels.max() <= 1 else (levels > at).astype(np.uint8)


def no_mask(path, found):
    reason = f"has {found}, so it is no mask of background and object"
    remedy = "save it in black and white (or are the folders of photos and masks swapped?)"
    classes = "or save it as a palette or grey image that holds the class of each pixel"
    return BadInput(path, reason, f"{remedy}, {classes}, and name --classes or --mask-value")


def random_crop(photo, mask, side, generator):
    """A square of `side` pixels of a photo (H, W, C) and its mask (H, W); where they are smaller,
    they go on mirrored."""
    height, width = mask.shape
    top, left = (generator.randint(0, max(0, n - side)) for n in (height, width))
    photo, mask = (a[top : top + side, left : left + side] for a in (photo, mask))
    more = [(0, side - n) for n in mask.shape]
    return np.pad(photo, [*more, (0, 0)], "symmetric"), np.pad(mask, more, "symmetric")


def count_values(levels, counts):
    """Append to `counts`, unless None, two Counters of a mask (H, W): the pixels of each value, and
    of those that fill areas. More than 30 values are noise, and count as black and white."""
    if counts is None:
        return
    top, drawn = levels.max().item(), np.count_nonzero(levels)
    pixels = Counter({top: drawn, 0: levels.size - drawn})  # of most masks that is all
    usual = top in (0, 1, 255) and np.count_nonzero(levels == top) in (drawn, levels.size)
    areas = Counter({0: pixels[0]} if usual else {})
    found = None if usual else Image.fromarray(levels.astype(np.int32)).getcolors(30)
    if found:
        pixels = Counter({value: number for number, value in found})
        core = levels[1:-1, 1:-1]
        across = (core == levels[1:-1, :-2]) & (core == levels[1:-1, 2:])
        inside = core[across & (core == levels[:-2, 1:-1]) & (core == levels[2:, 1:-1])]
        # Antialiased edges have no pixels inside, like their neighbours; lines of two have 12 %.
        areas = Counter({v: n for v, n in pixels.items() if (inside == v).sum() > n / 10})
    counts.append((pixels, areas))


def check_values(counts, labels, folder):
    """Raise BadInput if masks that are read as background and object hold classes: several values
    that fill areas and are not white, or dark ones only, which would all be background."""
    if labels.classes > 1 or labels.values or not counts:
        return
    pixels, areas = (sum(counters, Counter()) for counters in zip(*counts, strict=True))
    values, highest = sorted(pixels), max(pixels)
    # JPEG leaves noise around white, too: there 254 may fill areas, and 255 be its highest.
    solid = [v for v in values if v < highest - 8 and areas[v] > pixels.total() / 10**4]
    dark = 1 < highest < (128 if highest < 256 else 32768)
    noisy = sum(not filled for _, filled in counts) > len(counts) / 10
    if (noisy or len(solid) < 2) and not dark:
        return
    shares = [f"{v} ({100 * pixels[v] / pixels.total():.1f} %)" for v in values]
    found = f"masks of values {', '.join(shares[:16])}" + ", ..." * (len(values) > 16)
    named = [v for v in values if v not in (0, 255)]  # 255 is often what nobody knows
    classes = f"{named[-1]}" + " --ignore 255" * (255 in values)
    if named[-1] >= 1.5 * len(named):
        named += [255] * (255 in values)
        classes = f"{len(named)} --mask-value {' '.join(map(str, named))}"
    others = "--mask-value V to keep some as the object, or --ignore V to leave some out"
    raise BadInput(folder, found, f"name --classes {classes}, or {others}")
