"""Photos: reading one of any format that Pillow reads, and cutting a square out of it.

A source of a photo is a path (str or Path), the bytes of a file, a binary file, a PIL image, or a
NumPy array (H, W), (H, W, 3) or (H, W, 4), uint8: grey, RGB or RGBA.
"""

import contextlib
import io
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
# Of files' names: ".jpg". Pillow's own list includes formats that it only writes.
FILE_TYPES = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}

# Sources ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_image(source):
    """Open an image for the length of a block; of files, this reads only the header.

    Any exception inside the block becomes BadInput: decoders raise many types for broken files.
    """
    name = name_of(source)
    try:
        with as_image(source) as image:
            if image.width * image.height > MAX_PIXELS:
                limit = f"more than {MAX_PIXELS // 10**6} megapixels"
                reason = f"{image.width}x{image.height} is {limit}"
                raise BadInput(name, reason, "scale it down, or remove it")
            yield image
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(name, "no such file", "check the path") from None
    except Exception as error:
        why = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        remedy = "copy it again, or remove it" if is_path(source) else "check where it comes from"
        raise BadInput(name, f"cannot be read as an image ({why})", remedy) from error


def as_image(source):
    """A source as a PIL image, which the caller may change and close.

    Raises BadInput for anything that is not a source, and many types for broken files.
    """
    if isinstance(source, np.ndarray):
        return image_of_array(source)
    if isinstance(source, Image.Image):
        return source.copy()
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    if is_binary_file(source):
        return Image.open(source, formats=FORMATS)  # reads from its start, leaves it open
    if not is_path(source):
        remedy = "pass a path, bytes, a file opened with mode 'rb', a PIL image or a NumPy array"
        raise BadInput(name_of(source), "not a photo", remedy)
    if os.path.getsize(source) == 0:
        raise BadInput(source, "the file is empty (0 bytes)", "copy it again, or remove it")
    return Image.open(source, formats=FORMATS)


def image_of_array(array):
    """A PIL image of an array that is a source of a photo. Raises BadInput for any other array."""
    is_grey = array.ndim == 2
    has_colours = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype != np.uint8 or not (is_grey or has_colours) or array.size == 0:
        remedy = "pass (H, W), (H, W, 3) or (H, W, 4) of uint8: grey, RGB or RGBA"
        raise BadInput(name_of(array), "not a photo", remedy)
    return Image.fromarray(array)


def is_path(source):
    """Whether a source is a path."""
    return isinstance(source, (str, os.PathLike))


def is_binary_file(source):
    """Whether a source is an open file that gives bytes."""
    return hasattr(source, "read") and not isinstance(source, io.TextIOBase)


def name_of(source):
    """What messages call a source: a path as it is, any other by its kind."""
    if is_path(source):
        return source
    if isinstance(source, np.ndarray):
        return f"the array {source.shape} of {source.dtype}"
    if isinstance(source, Image.Image):
        return "the image"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "these bytes"
    if hasattr(source, "read"):
        return f"the open file {getattr(source, 'name', '')}".rstrip()
    return f"this {type(source).__name__}"


def rereadable(source):
    """A source that can be read twice: the bytes of a download or a pipe, any other as it is."""
    if is_binary_file(source):
        try:
            source.seek(0)
        except (AttributeError, OSError):
            return source.read()
        except ValueError:  # a closed file, which open_image refuses
            return source
    return source


def orientation(image):
    """The camera's EXIF orientation, 1 to 8: 1 is upright, 5 and above lie on their side."""
    if image.format == "TIFF":  # Pillow turns these while it decodes them
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def photo_size(source):
    """(height, width) of a photo or mask once it is upright. Raises BadInput.

    Of files only the header is read.
    """
    with open_image(source) as image:
        return image.size if orientation(image) >= 5 else image.size[::-1]


# Photos -------------------------------------------------------------------------------------------


def read_photo(source, size=None, channels=3):
    """Read one photo: (H, W, channels), uint8, RGB or grey, upright. Raises BadInput.

    With `size`, (height, width), it is resized to that, antialiased. Alpha is dropped, 16-bit grey
    is scaled to 8 bits, and of an animation only the first frame is read.
    """
    with open_image(source) as image:
        box = None if size is None else decode_scaled(image, size)
        ImageOps.exif_transpose(image, in_place=True)
        image = to_8_bits(image, name_of(source)).convert("RGB" if channels == 3 else "L")
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


def to_8_bits(image, name):
    """The image with at most 8 bits a channel. Raises BadInput for floating-point pixels."""
    if image.mode == "F":
        raise BadInput(name, "floating-point pixels", "save it with 8 bits a channel")
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
