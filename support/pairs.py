"""From folders to pairs of a photo and its mask, and work on many files at a time."""

import math
import os
import re
import shlex
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, product
from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image

from support.errors import BadInput, display_path, printable
from support.images import FORMATS, Labels, open_image, read_mask, read_photo, upright_size
from support.progress import ProgressBar


class Pair(NamedTuple):
    """A photo and its mask: the photo's name without suffix, and the two files' paths."""

    name: str
    photo: str
    mask: str


def find_pairs(image_dir, mask_dir, mask_suffix=None):
    """Every photo of `image_dir` with its mask in `mask_dir`, a list of Pair sorted by name.

    `photo.jpg` pairs with `photo_mask.gif`, `photo_mask.png` or `photo.png`: any format that Pillow
    reads, any letter case. Photos and masks may share one folder if the masks end in `_mask`.
    With `mask_suffix`, MASK or PHOTO=MASK, they pair by what these patterns (see named_as) share;
    files that do not fit, and masks without a photo, are left out.
    Raises BadInput: missing or empty folders, all files left over, all pairs of unequal sizes.
    """
    pairs, problems = pair_up(image_dir, mask_dir, mask_suffix)
    if problems:
        what = (
            f"photos in {display_path(image_dir)} and masks in {display_path(mask_dir)} do not pair"
        )
        raise BadInput.listing(what, problems)
    for _ in for_all(check_header, pairs, "checking headers"):
        pass
    return pairs


def pair_up(image_dir, mask_dir, mask_suffix=None):
    """(pairs, problems) of find_pairs by the files' names alone; problems are BadInputs. Raises
    BadInput for folders that are missing, empty, swapped, or want another `mask_suffix`."""
    photos, masks = list_images(image_dir), list_images(mask_dir)
    if os.path.samefile(image_dir, mask_dir):
        masks, mask_suffix = photos, "_mask" if mask_suffix is None else mask_suffix
    pairs, problems = match(photos, masks, mask_dir, mask_suffix)
    others, left = match(masks, photos, image_dir, mask_suffix)
    if len(others) > len(pairs) + len(left):
        swapped = f"holds masks, and {display_path(mask_dir)} photos"
        raise BadInput(image_dir, swapped, "swap the two folders")
    if len(problems) >= len(pairs):  # not some odd files, but another way of naming them
        remedy = guess_suffix(photos, masks, mask_dir, len(pairs) - len(problems))
        if remedy or not pairs:
            first = (islice(chain(*some.values()), 3) for some in (photos, masks))
            names = [printable(", ".join(map(os.path.basename, paths))) for paths in first]
            like = "" if masks is photos else f"like {names[0]} "
            reason = f"photos {like}and masks like {names[1]} do not pair"
            raise BadInput(mask_dir, reason, remedy or "rename them, or give --mask-suffix")
    return pairs, problems


def list_images(folder):
    """{name in lower case: [paths]} of the images in a folder, by suffix. Raises BadInput."""
    if not os.path.isdir(folder):
        raise BadInput(folder, "no such folder", "check the path, or see README on the data")
    formats = Image.registered_extensions().items()  # some of them Pillow only writes
    suffixes = {suffix for suffix, name in formats if name in FORMATS}
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() in suffixes and not stem.startswith(".") and entry.is_file():
            found.setdefault(stem.lower(), []).append(entry.path)
    if not found:
        raise BadInput(folder, "holds no images", "put them there, or name another folder")
    return found


def match(photos, masks, mask_dir, mask_suffix):
    """Pair up two listings: (pairs, problems). Raises BadInput for a bad mask_suffix."""
    endings = ("_mask", "")
    if mask_suffix is not None:
        *photo, mask = patterns = mask_suffix.split("=")
        if not mask or len(photo) > 1 or any(pattern.count("*") > 1 for pattern in patterns):
            reason = "is neither MASK nor PHOTO=MASK with at most one * in each"
            raise BadInput(f"--mask-suffix {mask_suffix}", reason, "try _mask, or img_*=mask_*")
        masks, endings = named_as(mask, masks), ("",)
        photos = named_as(photo[0] if photo else "*", photos, set(chain(*masks.values())))
    pairs, problems, unused = [], [], dict(masks)
    missing = f"no mask in {display_path(mask_dir)}"
    for name, paths in sorted(photos.items()):
        partners = [path for ending in endings for path in unused.pop(name + ending, [])]
        if len(paths) == len(partners) == 1:
            pairs.append(Pair(Path(paths[0]).stem, paths[0], partners[0]))
        elif not partners:
            problems.append(BadInput(paths[0], missing, "add it, or remove the photo"))
        else:
            first, *others = sorted(paths + partners)
            beside = f"beside {', '.join(map(display_path, others))}"
            remedy = "one photo and one mask were expected: remove the others"
            problems.append(BadInput(first, beside, remedy))
    for path in chain(*unused.values()) if mask_suffix is None else ():  # else others' masks
        problems.append(BadInput(path, "no photo", "add it, or remove the mask"))
    return sorted(pairs, key=lambda pair: pair.name.lower()), problems


def named_as(pattern, listing, leave_out=()):
    """{what `*` stands for, in lower case: [paths]} of the listed files that a pattern fits.

    A pattern without `*` is how names end. One with a dot counts for a file's whole name, others
    for the name without its file type.
    """
    before, after = (pattern if "*" in pattern else f"*{pattern}").lower().split("*")
    found = {}
    for path in chain(*listing.values()):
        name = os.path.basename(path).lower()
        name = name if "." in pattern else os.path.splitext(name)[0]
        core = name.removeprefix(before).removesuffix(after)
        if before + core + after == name and path not in leave_out:
            found.setdefault(core, []).append(path)
    return found


def guess_suffix(photos, masks, mask_dir, so_far):
    """A remedy, "--mask-suffix TEXT would pair all 20", for two listings that make `so_far` more
    pairs than problems; None where nothing that is tried pairs nine photos of ten."""
    best, remedy, files = (so_far, math.inf), None, sum(map(len, photos.values()))
    for suffix in likely_suffixes(photos, masks):
        pairs, problems = match(photos, masks, mask_dir, suffix)
        # In one folder photos are what is named so, which could be any few: a quarter at least.
        count = max(len(pairs) + len(problems), files // 4) if masks is photos else files
        if len(pairs) >= max(2, 0.9 * count):
            smaller = os.path.getsize(pairs[0].photo) - os.path.getsize(pairs[0].mask)
            score = (len(pairs) - len(problems), smaller)  # masks are the smaller files
            if score > best:
                flag = f"--mask-suffix{'=' if suffix[0] == '-' else ' '}{shlex.quote(suffix)}"
                all_of = "all" if len(pairs) == count else f"{len(pairs)} of"
                best, remedy = score, f"{printable(flag)} would pair {all_of} {count}"
    return remedy


def likely_suffixes(photos, masks):
    """Values of --mask-suffix to try, the likeliest first: what the names of some photos do not
    share with the masks' that begin, or end, most like them."""
    paths = (chain(*listing.values()) for listing in (photos, masks))
    photos, masks = ([os.path.splitext(os.path.basename(p)) for p in some] for some in paths)
    rests = Counter()
    for photo, step in product(Random(0).sample(photos, min(24, len(photos))), (1, -1)):
        name, others = photo[0][::step], [(m[0][::step], m[1]) for m in masks if m != photo]
        alike = ((os.path.commonprefix([name, other[0]]), *other) for other in others)
        shared, mask, kind = max(alike, key=lambda a: (len(a[0]), -len(a[1])), default=[""] * 3)
        if shared not in (name, mask):  # a word that differs is not cut in two
            shared = re.sub(r"[ _.-][^\W\d_]*$", "", shared)
        rest, other = name[len(shared) :], mask[len(shared) :]
        # Two names that differ in a number only are two photos.
        if shared and not re.search(r"[=*]|^[\W\d_]+/[\W\d_]+$", f"{rest}/{other}"):
            rests[f"*{rest}"[::step], f"*{other}"[::step], photo[1], kind] += 1
    for (photo, mask, *kinds), _ in rests.most_common(8):
        for ends in (("", ""), ("", kinds[1]), kinds):
            suffix = f"{photo}{ends[0]}={mask}{ends[1]}".removeprefix("*=")
            yield re.sub(r"(^|=)\*(?=.)", r"\1", suffix)


def check_header(pair):
    """Raise BadInput unless both files are images of the same size; decodes nothing."""
    with open_image(pair.photo) as photo, open_image(pair.mask) as mask:
        (width, height), mask_size = upright_size(photo), upright_size(mask)
    if (width, height) != mask_size:
        mask = f"its mask {display_path(pair.mask)} is {mask_size[0]}x{mask_size[1]}"
        both = f"{width}x{height}, but {mask}"
        raise BadInput(pair.photo, both, "make one of them again, or remove both")


def read_pair(pair, size=None, channels=3, labels=Labels(), counts=None):  # noqa: B008
    """(photo, mask) as read_photo and read_mask give them. Raises BadInput."""
    return read_photo(pair.photo, size, channels), read_mask(pair.mask, size, labels, counts)


# Many files at a time -----------------------------------------------------------------------------


def for_all(work, items, description):
    """Yield work(item) in order, computed on all cores; raises BadInput, of all, at the end."""

    def attempt(item):
        try:
            return work(item), None
        except BadInput as problem:
            return None, problem

    problems = []
    with ProgressBar(desc=description, total=len(items), unit=" photos") as progress:
        for result, problem in in_threads(attempt, items, ahead=32 * cpu_count()):
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
