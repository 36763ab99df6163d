"""Files on disk: reading photos and masks, pairing them, writing so that nothing is half-written.

Whatever is wrong with the user's files is found here and raised as BadInput.
"""

import contextlib
import functools
import glob
import hashlib
import os
import secrets
import time
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from distributed import hide_progress

MAX_PIXELS = 250_000_000  # of one photo; about 750 MB once decoded
MAX_SCANS = 100  # of a JPEG, over whose pixels each goes once more; progressive ones have ten
Image.MAX_IMAGE_PIXELS = None  # open_image holds photos to our bound instead, with our own message
Image.init()  # fills Image.OPEN
# Pillow runs Ghostscript on EPS, has others read by other programs, and decodes the last four
# before it says how large they are.
NOT_READ = {"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5", "CUR", "FITS", "ICNS", "ICO"}
FORMATS = tuple(sorted(set(Image.OPEN) - NOT_READ))

LEFTOVER_SECONDS = 300  # a half-written file untouched for so long is a killed process's


class BadInput(Exception):
    """Something that the user can mend. Scripts print it, without a traceback, and exit with 2."""

    @classmethod
    def listing(cls, what, problems):
        """Several at once: the first ten, and how many there are."""
        shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if problems[10:] else [])
        return cls(f"{what} ({len(problems)}):\n  " + "\n  ".join(shown))


@contextlib.contextmanager
def write_aside(path, remedy="free some space or choose another folder"):
    """Open `path` for writing bytes so that it is never seen half-written.

    Written beside its place, flushed to the disk and renamed: a kill at any moment leaves the file
    that was there before, whole. Raises BadInput where the disk is full or the folder read-only.
    """
    path = Path(path)
    aside = path.with_name(f".{fitting(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"{shown(path)}: cannot be written ({reason}): {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def fitting(name):
    """A file's name that has room for a few letters more: itself, or its hash."""
    if len(os.fsencode(name)) <= 200:  # systems allow 255
        return name
    return hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()


@functools.cache  # once a process and folder: there may be thousands of files to look through
def remove_leftovers(folder):
    """Remove what processes killed while writing have left half-written."""
    for leftover in folder.glob(".*.[0-9]*.partial"):
        with contextlib.suppress(OSError):  # others may look at the same time
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


def check_output(output, flag="--output-dir"):
    """Raises BadInput where the folder of this flag cannot be made or written to."""
    try:
        there = next(path for path in (output, *output.parents) if path.exists())
        fits = there.is_dir() and os.access(there, os.W_OK)
    except OSError:  # its name is too long
        fits = False
    if not fits:
        raise BadInput(f"{shown(output)}: cannot be written: name another {flag}")


def nearby(path):
    """A path as short as it can be typed from here."""
    return min(str(path), os.path.relpath(path or "."), key=len)


def shown(path):
    """A path for a message: as short as it can be typed from here, and on one line."""
    return printable(nearby(path))


def printable(text):
    """Text with its line breaks, escapes and broken letters written out: names hold anything."""
    return "".join(
        (
            letter.encode("unicode_escape").decode()
            if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
            else letter
        )
        for letter in str(text)
    )


# Reading one file ---------------------------------------------------------------------------------


@contextlib.contextmanager
def open_image(path):
    """Open an image of any format that Pillow reads; only its header is read here.

    Raises BadInput, with the file's name, for all that goes wrong until the block ends: decoding
    happens in the block, and a decoder fed with a broken file raises whatever it likes.
    """
    try:
        if os.path.getsize(path) == 0:
            raise BadInput(
                f"{shown(path)}: the file is empty (0 bytes): copy it again, or remove it"
            )
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(
                    f"{shown(path)}: {image.width}x{image.height} is more than "
                    f"{MAX_PIXELS // 10**6} megapixels: scale it down, or remove it"
                )
            yield image
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"{shown(path)}: no such file: check the path") from None
    except Exception as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadInput(
            f"{shown(path)}: cannot be read as an image ({reason}): copy it again, or remove it"
        ) from error


def check_scans(path, image):
    """Raises BadInput for a JPEG of so many scans that a small file takes minutes to decode."""
    if image.format in ("JPEG", "MPO"):
        image.fp.seek(0)
        scans = image.fp.read().count(b"\xff\xda")
        if scans > MAX_SCANS:
            raise BadInput(f"{shown(path)}: has {scans} scans: save it anew, or remove it")


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
    """Let a JPEG's decoder do most of the shrinking: it can leave out detail by 1/2, 1/4 or 1/8.

    Never to below `size`, (height, width). Returns the box of the decoded image that is the photo,
    (left, top, right, bottom), or None for all of it: at 1/8, 1918 pixels are decoded into 240 of
    which the last is three quarters photo and one quarter filling.
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

    Args:
        size: (height, width) to shrink or stretch to, antialiased; None for the photo's own.
        channels: 3 for RGB, 1 for grey.

    Alpha is dropped, 16-bit grey is scaled to 8 bits, of an animation the first frame counts.
    Raises BadInput for what is no photo.
    """
    with open_image(path) as image:
        check_scans(path, image)
        box = decode_scaled(image, size) if size is not None else None
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            levels = np.asarray(image)
            levels = levels / 257 if levels.max() > 255 else levels
            image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        elif image.mode == "F":
            raise BadInput(f"{shown(path)}: floating-point pixels: save it with 8 bits a channel")
        elif image.has_transparency_data:
            image = image.convert("RGBA")
        image = image.convert("RGB" if channels == 3 else "L")
        if size is not None and (image.size != size[::-1] or box):
            image = image.resize(size[::-1], Image.Resampling.BILINEAR, box, reducing_gap=2.0)
        return np.asarray(image).reshape(image.height, image.width, channels)


def read_mask(path, size=None):
    """One mask: (H, W), uint8, 0 for background and 1 for the object, upright.

    Args:
        size: (height, width) to bring it to by averaging over areas and cutting at one half.

    Grey palettes count by colour, other palettes of two entries by index; RGB must be black and
    white. A maximum of at most 1 means 0 and 1; all else is cut at 127. Raises BadInput for files
    whose colours are no mask.
    """
    with open_image(path) as image:
        check_scans(path, image)
        ImageOps.exif_transpose(image, in_place=True)
        mask = palette_mask(image, path) if image.mode == "P" else level_mask(image, path)
        if size is not None:  # as 0 and 255, since Pillow rounds between its two passes
            mask = mask.resize(size[::-1], Image.Resampling.BOX)
        return np.asarray(mask) >> 7


def palette_mask(image, path):
    """The mask of an image with a palette, as an image of 0 and 255.

    By a table of the palette's entries: converting to grey would cost three times the decoding.
    """
    colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    few = len(colours) <= 2  # then there is no need to look which of them are used
    used = np.arange(len(colours)) if few else np.flatnonzero(image.histogram())
    colours = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
    table = np.zeros(256, np.uint8)
    if (colours[used] == colours[used, :1]).all():
        table[used] = cut(colours[used, 0])
    elif len(used) <= 2:
        table[used] = used > (used[0] if len(used) == 2 else 0)
    else:
        raise no_mask(path, f"a palette of {len(used)} colours")
    return image.point((table * 255).tolist(), "L")


def level_mask(image, path):
    """The mask of an image without a palette, as an image of 0 and 255."""
    if image.mode in ("LA", "RGBA"):
        colours = image.convert("RGB").getextrema()
        if all(low == high for low, high in colours):  # then the object is in the alpha channel
            image = image.getchannel("A")
    if image.mode in ("1", "L", "LA"):
        levels = np.asarray(image.getchannel(0)).astype(np.uint8)
    elif image.mode.startswith("I"):
        levels = np.asarray(image)
    elif image.mode in ("RGB", "RGBA"):
        rgb = np.asarray(image)[..., :3]
        # JPEG leaves a faint tint on black and white.
        if (rgb.max(axis=2) - rgb.min(axis=2)).max() > 16:
            raise no_mask(path, "colours")
        levels = rgb[..., 1]
    else:
        raise no_mask(path, f"pixels of kind {image.mode}")
    top = 65535 if levels.max() > 255 else 255
    middle = (levels > top // 4) & (levels < top - top // 4)
    if middle.mean() > 0.5 and len(np.unique(levels)) > 2:
        raise no_mask(path, "shades of grey in most places")
    return Image.fromarray(cut(levels, top // 2) * np.uint8(255))


def cut(levels, at=127):
    """Grey levels as 0 and 1, uint8: 0/1 masks as they are, others cut at the middle."""
    return levels.astype(np.uint8) if levels.max() <= 1 else (levels > at).astype(np.uint8)


def no_mask(path, found):
    return BadInput(
        f"{shown(path)}: has {found}, so it is no mask of background and object: save it in black "
        "and white (or are the folders of photos and masks swapped?)"
    )


# From folders to pairs ----------------------------------------------------------------------------


def find_photos(names):
    """The photos that files, folders and patterns such as `a/*.jpg` name, in order, each once.

    Raises BadInput with all names that mean nothing.
    """
    photos, problems = [], []
    for name in names:
        if os.path.isdir(name):
            photos += sorted(path for paths in list_images(name).values() for path in paths)
            continue
        found = [name]
        if not os.path.exists(name):
            found = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        photos += found
        if not found:
            problems.append(f"{shown(name)}: no such photo or folder: check the path")
    if problems:
        raise BadInput("\n".join(problems))
    return list({os.path.abspath(photo): photo for photo in photos}.values())


class Pair(NamedTuple):
    """A photo and its mask: the photo's name without suffix, and the two files' paths."""

    name: str
    photo: str
    mask: str


def find_pairs(image_dir, mask_dir):
    """Every photo of `image_dir` with its mask in `mask_dir`, a list of Pair sorted by name.

    `photo.jpg` pairs with `photo_mask.gif`, `photo_mask.png` or `photo.png`: any format that Pillow
    reads, any letter case. Photos and masks may share one folder if the masks end in `_mask`.
    Raises BadInput for folders that are missing or empty, with a list of all files left over, or
    with one of all pairs whose headers show no images of equal size.
    """
    pairs, problems = pair_up(image_dir, mask_dir)
    if problems:
        what = f"photos in {shown(image_dir)} and masks in {shown(mask_dir)} do not pair"
        raise BadInput.listing(what, [f"{shown(path)}: {problem}" for path, problem in problems])
    for _ in for_all_pairs(check_header, pairs, "checking headers"):
        pass
    return pairs


def pair_up(image_dir, mask_dir):
    """(pairs, problems) of find_pairs by the files' names alone; a problem is (path, what it is).

    Raises BadInput for folders that are missing, empty or swapped.
    """
    photos, masks = list_images(image_dir), list_images(mask_dir)
    if os.path.samefile(image_dir, mask_dir):
        photos = {k: v for k, v in photos.items() if not k.endswith("_mask")}
        masks = {k: v for k, v in masks.items() if k.endswith("_mask")}
    pairs, problems = match(photos, masks, mask_dir)
    if problems and len(match(masks, photos, image_dir)[0]) > len(pairs):
        raise BadInput(
            f"{shown(image_dir)}: holds masks, and {shown(mask_dir)} photos: swap the two folders"
        )
    return pairs, problems


def list_images(folder):
    """{name in lower case: [paths]} of the images in a folder, by suffix. Raises BadInput."""
    if not os.path.isdir(folder):
        raise BadInput(
            f"{shown(folder)}: no such folder: check the path, or see README on the data"
        )
    formats = Image.registered_extensions().items()  # some of them Pillow only writes
    suffixes = {suffix for suffix, name in formats if name in FORMATS}
    found = {}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise BadInput(f"{shown(folder)}: cannot be read ({error.strerror}): allow it") from None
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() in suffixes and not stem.startswith(".") and entry.is_file():
            found.setdefault(stem.lower(), []).append(entry.path)
    if not found:
        raise BadInput(f"{shown(folder)}: holds no images: put them there, or name another folder")
    return found


def match(photos, masks, mask_dir):
    """Pair up two listings: (pairs, problems)."""
    pairs, problems, unused = [], [], dict(masks)
    for name, paths in sorted(photos.items()):
        partners = unused.pop(f"{name}_mask", []) + unused.pop(name, [])
        if len(paths) == len(partners) == 1:
            pairs.append(Pair(Path(paths[0]).stem, paths[0], partners[0]))
        elif not partners:
            what = f"no mask in {shown(mask_dir)}: add it, or remove the photo"
            problems.append((paths[0], what))
        else:
            first, *others = sorted(paths + partners)
            what = "one photo and one mask were expected: remove the others"
            problems.append((first, f"beside {', '.join(map(shown, others))}: {what}"))
    problems += [
        (path, "no photo: add it, or remove the mask")
        for paths in unused.values()
        for path in paths
    ]
    return pairs, problems


def check_header(pair):
    """Raise BadInput unless both files are images of the same size; decodes nothing."""
    with open_image(pair.photo) as photo, open_image(pair.mask) as mask:
        (width, height), mask_size = upright_size(photo), upright_size(mask)
    if (width, height) != mask_size:
        raise BadInput(
            f"{shown(pair.photo)}: {width}x{height}, but its mask {shown(pair.mask)} is "
            f"{mask_size[0]}x{mask_size[1]}: make one of them again, or remove both"
        )


def read_pair(pair, size=None, channels=3):
    """(photo, mask) as read_photo and read_mask give them. Raises BadInput."""
    return read_photo(pair.photo, size, channels), read_mask(pair.mask, size)


def for_all_pairs(work, pairs, description):
    """Yield work(pair) in order, computed on all cores; raises BadInput, of all, at the end."""

    def attempt(pair):
        try:
            return work(pair), None
        except BadInput as problem:
            return None, str(problem)

    problems = []
    progress = tqdm(
        desc=description, total=len(pairs), unit=" photos", disable=hide_progress(), delay=1
    )
    with progress:
        for result, problem in in_threads(attempt, pairs, ahead=32 * cpu_count()):
            progress.update()
            if problem:
                problems.append(problem)
            else:
                yield result
    if problems:
        raise BadInput.listing("files that cannot be used", problems)


def in_threads(work, items, ahead):
    """Yield work(item) in order, computed on all cores up to `ahead` items before it is asked for.

    Items may come from a generator: it is gone on with here, in the caller's thread, while the
    others work. Pillow's and OpenCV's work lets go of Python's lock, so threads are enough.
    """
    with ThreadPoolExecutor(cpu_count()) as pool:
        try:
            futures = (pool.submit(work, item) for item in items)
            window = deque(islice(futures, ahead))
            while window:
                result = window.popleft().result()
                window.extend(islice(futures, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def cpu_count():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
