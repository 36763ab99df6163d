"""From folders to pairs of a photo and its mask, and work on many files at a time."""

import math
import os
import re
import shlex
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

from support.errors import BadInput, display_path, printable
from support.images import FILE_TYPES, photo_size, read_photo
from support.masks import BINARY, read_mask
from support.progress import ProgressBar

MASK_ENDINGS = ("_mask", "")  # of a mask's name after its photo's, without --mask-suffix
COMPARED = 24  # photos whose names are compared with the masks' to guess a --mask-suffix
TRIED = 8  # patterns of those names that are tried


class Pair(NamedTuple):
    """A photo and its mask: the photo's name without its file type, and the two files' paths."""

    name: str
    photo: str
    mask: str


def find_pairs(image_dir, mask_dir, mask_suffix=None):
    """Find every photo of `image_dir` and its mask in `mask_dir`: a list of Pair, sorted by name.

    `photo.jpg` pairs with `photo_mask.gif`, `photo_mask.png` or `photo.png`: any format that Pillow
    reads, any letter case. Photos and masks may share one folder if the masks end in `_mask`. With
    `mask_suffix`, MASK or PHOTO=MASK, files pair if the `*` in these patterns stands for the same
    text (see named_as); files that fit no pattern and masks without a photo are left out.

    Raises BadInput for missing or empty folders, for all files left over, and for all pairs whose
    sizes differ.
    """
    pairs, problems = pair_up(image_dir, mask_dir, mask_suffix)
    if problems:
        folders = f"photos in {display_path(image_dir)} and masks in {display_path(mask_dir)}"
        raise BadInput.listing(f"{folders} do not pair", problems)
    for _ in for_all(check_header, pairs, "checking headers"):
        pass
    return pairs


def pair_up(image_dir, mask_dir, mask_suffix=None):
    """Pair files by their names alone: (pairs, problems), a list of Pair and one of BadInput.

    Raises BadInput for folders that are missing, empty or swapped, or need another `mask_suffix`.
    """
    photos, masks = list_images(image_dir), list_images(mask_dir)
    if os.path.samefile(image_dir, mask_dir):
        masks = photos
        mask_suffix = "_mask" if mask_suffix is None else mask_suffix
    pairs, problems = match(photos, masks, mask_dir, mask_suffix)
    swapped, left_over = match(masks, photos, image_dir, mask_suffix)
    if len(swapped) > len(pairs) + len(left_over):
        reason = f"holds masks, and {display_path(mask_dir)} photos"
        raise BadInput(image_dir, reason, "swap the two folders")
    if len(problems) >= len(pairs):  # not a few odd files, but another way of naming them
        remedy = guess_suffix(photos, masks, mask_dir, len(pairs) - len(problems))
        if remedy or not pairs:
            like = "" if masks is photos else f"like {first_names(photos)} "
            reason = f"photos {like}and masks like {first_names(masks)} do not pair"
            raise BadInput(mask_dir, reason, remedy or "rename them, or give --mask-suffix")
    return pairs, problems


def list_images(folder):
    """The images in a folder, {name in lower case, without file type: [paths]}. Raises BadInput."""
    if not os.path.isdir(folder):
        raise BadInput(folder, "no such folder", "check the path, or see README on the data")
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() in FILE_TYPES and not stem.startswith(".") and entry.is_file():
            found.setdefault(stem.lower(), []).append(entry.path)
    if not found:
        raise BadInput(folder, "holds no images", "put them there, or name another folder")
    return found


def first_names(listing):
    """The first three file names of a listing, for a message."""
    paths = islice(chain(*listing.values()), 3)
    return printable(", ".join(map(os.path.basename, paths)))


def match(photos, masks, mask_dir, mask_suffix):
    """Pair two listings: (pairs, problems), as pair_up does. Raises BadInput for a bad suffix."""
    endings = MASK_ENDINGS
    if mask_suffix is not None:
        photos, masks = select(photos, masks, mask_suffix)
        endings = ("",)
    pairs, problems, unused = [], [], dict(masks)
    for name, paths in sorted(photos.items()):
        partners = [path for ending in endings for path in unused.pop(name + ending, [])]
        if len(paths) == len(partners) == 1:
            pairs.append(Pair(Path(paths[0]).stem, paths[0], partners[0]))
        elif not partners:
            reason = f"no mask in {display_path(mask_dir)}"
            problems.append(BadInput(paths[0], reason, "add it, or remove the photo"))
        else:
            first, *others = sorted(paths + partners)
            reason = f"beside {', '.join(map(display_path, others))}"
            remedy = "one photo and one mask were expected: remove the others"
            problems.append(BadInput(first, reason, remedy))
    if mask_suffix is None:  # with one, masks left over may belong to another folder's photos
        left_over = chain(*unused.values())
        problems += [BadInput(path, "no photo", "add it, or remove the mask") for path in left_over]
    return sorted(pairs, key=lambda pair: pair.name.lower()), problems


# Patterns of names --------------------------------------------------------------------------------


def select(photos, masks, mask_suffix):
    """Two listings of the files that fit a mask_suffix, by what `*` stands for. Raises BadInput."""
    photo, _, mask = mask_suffix.rpartition("=")
    if not mask or "=" in photo or photo.count("*") > 1 or mask.count("*") > 1:
        reason = "is neither MASK nor PHOTO=MASK with at most one * in each"
        raise BadInput(f"--mask-suffix {mask_suffix}", reason, "try _mask, or img_*=mask_*")
    masks = named_as(mask, masks)
    return named_as(photo, photos, leave_out=set(chain(*masks.values()))), masks


def named_as(pattern, listing, leave_out=()):
    """The listed files that a pattern fits, {what `*` stands for, in lower case: [paths]}.

    A pattern without `*` is the end of names. With a dot it applies to the whole file name, else to
    the name without its file type.
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


def guess_suffix(photos, masks, mask_dir, lead):
    """A remedy, "--mask-suffix TEXT would pair all 20", for two listings of which `lead` is the
    number of pairs less that of problems; None where no guess pairs nine photos of ten."""
    n_files = sum(map(len, photos.values()))
    best_score = (lead, math.inf)
    remedy = None
    for suffix in likely_suffixes(photos, masks):
        pairs, problems = match(photos, masks, mask_dir, suffix)
        n_photos = n_files
        if masks is photos:  # any few files may fit: let photos be a quarter of them at least
            n_photos = max(len(pairs) + len(problems), n_files // 4)
        if len(pairs) < max(2, 0.9 * n_photos):
            continue
        smaller_by = os.path.getsize(pairs[0].photo) - os.path.getsize(pairs[0].mask)
        score = (len(pairs) - len(problems), smaller_by)  # masks are the smaller files
        if score > best_score:
            best_score = score
            flag = f"--mask-suffix{'=' if suffix.startswith('-') else ' '}{shlex.quote(suffix)}"
            share = "all" if len(pairs) == n_photos else f"{len(pairs)} of"
            remedy = f"{printable(flag)} would pair {share} {n_photos}"
    return remedy


def likely_suffixes(photos, masks):
    """Yield values of --mask-suffix to try for two listings, the likeliest first: patterns by which
    some photos' names differ from the most similar mask's."""
    photos, masks = stems_and_types(photos), stems_and_types(masks)
    differences = Counter()
    for stem, file_type in Random(0).sample(photos, min(COMPARED, len(photos))):
        others = [mask for mask in masks if mask != (stem, file_type)]
        for step in (1, -1):  # compare from the start of the names, and from their end
            if patterns := difference(stem, others, step):
                differences[(*patterns, file_type)] += 1
    for (photo, mask, mask_type, photo_type), _ in differences.most_common(TRIED):
        for photo_end, mask_end in (("", ""), ("", mask_type), (photo_type, mask_type)):
            suffix = f"{photo}{photo_end}={mask}{mask_end}".removeprefix("*=")
            yield re.sub(r"(^|=)\*(?=.)", r"\1", suffix)  # a leading * may be left out


def stems_and_types(listing):
    """(name without file type, file type) of the files in a listing."""
    return [os.path.splitext(os.path.basename(path)) for path in chain(*listing.values())]


def difference(photo, masks, step):
    """Compare a photo's name with that of the most similar mask, character by character from the
    start (step 1) or from the end (step -1).

    `masks` are stems_and_types. Returns a pattern for the photo's name, one for the mask's, and the
    mask's file type; None where the names share nothing or seem to be those of two photos.
    """
    photo = photo[::step]
    similar = ("", "", "")
    for stem, file_type in masks:
        stem = stem[::step]
        shared = os.path.commonprefix([photo, stem])
        if (len(shared), -len(stem)) > (len(similar[0]), -len(similar[1])):
            similar = (shared, stem, file_type)
    shared, mask, mask_type = similar
    if shared not in (photo, mask):  # keep a word that differs whole
        shared = re.sub(r"[ _.-][^\W\d_]*$", "", shared)
    rests = photo[len(shared) :], mask[len(shared) :]
    differ_in_numbers = all(re.fullmatch(r"[\W\d_]+", rest) for rest in rests)
    if not shared or differ_in_numbers or re.search(r"[=*]", "".join(rests)):
        return None
    photo_pattern, mask_pattern = (f"*{rest}"[::step] for rest in rests)
    return photo_pattern, mask_pattern, mask_type


# One pair -----------------------------------------------------------------------------------------


def check_header(pair):
    """Raise BadInput unless both files are images of the same size; decodes neither."""
    height, width = photo_size(pair.photo)
    mask_height, mask_width = photo_size(pair.mask)
    if (height, width) != (mask_height, mask_width):
        mask = f"its mask {display_path(pair.mask)} is {mask_width}x{mask_height}"
        reason = f"{width}x{height}, but {mask}"
        raise BadInput(pair.photo, reason, "make one of them again, or remove both")


def read_pair(pair, size=None, channels=3, labels=BINARY, counts=None):
    """(photo, mask) as read_photo and read_mask give them. Raises BadInput."""
    return read_photo(pair.photo, size, channels), read_mask(pair.mask, size, labels, counts)


# Many files at a time -----------------------------------------------------------------------------


def for_all(work, items, description):
    """Yield work(item) for each item, in order, computed on all cores.

    Items for which it raises BadInput are left out; at the end one BadInput lists them all.
    """

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
    """Yield work(item) for each item, in order, computed on all cores, up to `ahead` items early.

    Items may come from a generator, which runs in the caller's thread while the others work. Pillow
    and NumPy release Python's lock, so threads are enough.
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
