"""Photos: reading one of any format that Pillow reads, and cutting a square out of it."""

import contextlib
import os

import numpy as np
from PIL import ExifTags, Image, ImageOps

from support.errors import BadInput

MAX_PIXELS = 250_000_000  # of one image; about 750 MB once decoded
Image.init()  # fills Image.OPEN
# For EPS Pillow runs Ghostscript, MPEG to HDF5 need other programs, and the last four are decoded
# before their size is known.
NOT_READ = {"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5", "CUR", "FITS", "ICNS", "ICO"}
FORMATS = tuple(sorted(set(Image.OPEN) - NOT_READ))

# Files --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_image(path):
    """Open an image for the length of a block; this reads only its header.

    Any exception inside the block becomes BadInput: decoders raise many types for broken files.
    """
    try:
        if os.path.getsize(path) == 0:
            raise BadInput(path, "the file is empty (0 bytes)", "copy it again, or remove it")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                limit = f"more than {MAX_PIXELS // 10**6} megapixels"
                reason = f"{image.width}x{image.height} is {limit}"
                raise BadInput(path, reason, "scale it down, or remove it")
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
    """The camera's EXIF orientation, 1 to 8: 1 is upright, 5 and above lie on their side."""
    if image.format == "TIFF":  # Pillow turns these while it decodes them
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def upright_size(image):
    """(width, height) of an image once it is upright; reads only the header."""
    return image.size[::-1] if orientation(image) >= 5 else image.size


def photo_size(path):
    """(height, width) of a photo once it is upright, from its header. Raises BadInput."""
    with open_image(path) as image:
        width, height = upright_size(image)
    return height, width


# Photos -------------------------------------------------------------------------------------------


def read_photo(path, size=None, channels=3):
    """Read one photo: (H, W, channels), uint8, RGB or grey, upright. Raises BadInput.

    With `size`, (height, width), it is resized to that, antialiased. Alpha is dropped, 16-bit grey
    is scaled to 8 bits, and of an animation only the first frame is read.
    """
    with open_image(path) as image:
        box = None if size is None else decode_scaled(image, size)
        ImageOps.exif_transpose(image, in_place=True)
        image = to_8_bits(image, path).convert("RGB" if channels == 3 else "L")
        if size is not None and (image.size != size[::-1] or box):
            image = image.resize(size[::-1], Image.Resampling.BILINEAR, box, reducing_gap=2.0)
        return np.asarray(image).reshape(image.height, image.width, channels)


def decode_scaled(image, size):
    """Let the JPEG decoder shrink by 1/2, 1/4 or 1/8, but never below `size`, (height, width).

    Returns the box (left, top, right, bottom) of the decoded image that the photo fills, or None
    for all of it: at 1/8, 1918 pixels become 240, of which the last is one quarter padding.
    """
    turned = orientation(image)
    height, width = size[::-1] if turned >= 5 else size
    for scale in (8, 4, 2):
        large_enough = image.width / scale > width - 1 and image.height / scale > height - 1
        exact = image.width % scale == 0 and image.height % scale == 0
        if large_enough and (exact or turned == 1):  # else padding may end up at the left or top
            # Image.draft for 240 pixels would compute 1918 // 240 = 7 and shrink only by 1/4.
            drafted = image.draft(None, (image.width // scale, image.height // scale))
            return None if exact or drafted is None else drafted[1]
    return None


def to_8_bits(image, path):
    """The image with at most 8 bits a channel. Raises BadInput for floating-point pixels."""
    if image.mode == "F":
        raise BadInput(path, "floating-point pixels", "save it with 8 bits a channel")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        levels = levels / 257 if levels.max() > 255 else levels
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return image.convert("RGBA") if image.has_transparency_data else image


def random_crop(photo, mask, side, generator):
    """Cut the same random square of `side` pixels out of a photo (H, W, C) and its mask (H, W).

    A photo smaller than the square is continued by its mirror image. `generator` is a
    random.Random.
    """
    height, width = mask.shape
    top = generator.randint(0, max(0, height - side))
    left = generator.randint(0, max(0, width - side))
    square = np.s_[top : top + side, left : left + side]
    photo, mask = photo[square], mask[square]
    missing = [(0, side - length) for length in mask.shape]
    return np.pad(photo, [*missing, (0, 0)], "symmetric"), np.pad(mask, missing, "symmetric")
