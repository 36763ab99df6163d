"""Masks that look wrong: measures of each photo and its mask, and what is unusual among them."""

import dataclasses
import hashlib
from pathlib import Path
from statistics import median_low

import numpy as np

from support.images import read_photo
from support.masks import read_mask
from support.pairs import Pair, check_header

INVERTED = 0.75  # share of the photo's border that an object seldom covers
FAR_OUT = 3  # interquartile ranges from the quartiles: Tukey's "far out"
ENOUGH = 8  # masks that show what coverage is usual


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is known of a photo and its mask."""

    pair: Pair
    size: tuple[int, int]  # (width, height) of both, upright
    pixels: tuple[int, ...]  # how many each class has, or the object
    coverage: float  # share of all pixels that show an object, 0 to 1
    border: float  # the same of the outermost pixels
    content: bytes  # hash of the photo's file

    @property
    def photo(self):
        """Path of the photo."""
        return self.pair.photo


def measure(pair, labels, counts):
    """Measures of a pair; read_mask appends to `counts`. Raises BadInput as train.py does."""
    check_header(pair)
    read_photo(pair.photo, size=(1, 1))  # only to find broken files, so as small as can be
    mask = read_mask(pair.mask, None, labels, counts)
    objects = labels.objects(mask)  # (H, W), bool
    inside = objects[1:-1, 1:-1]
    border = (objects.sum() - inside.sum()) / (objects.size - inside.size)
    numbers = [255] if labels.is_soft_mask else range(1, labels.classes + 1)
    return Measures(
        pair=pair,
        size=mask.shape[::-1],
        pixels=tuple(np.count_nonzero(mask == number) for number in numbers),
        coverage=objects.mean().item(),
        border=border.item(),
        content=hashlib.blake2b(Path(pair.photo).read_bytes()).digest(),
    )


def find_odd_masks(measures, classes):
    """Yield (kind, photo, details) of masks that may be wrong."""
    for m in measures:
        if m.coverage == 0:
            yield "empty", m.photo, "the mask shows nothing"
        elif m.coverage == 1 and classes == 1:  # several classes may well fill a photo
            yield "full", m.photo, "the mask covers all"
    if classes == 1:
        yield from find_odd_coverage([m for m in measures if 0 < m.coverage < 1])


def find_odd_coverage(measures):
    """Yield (kind, photo, details) of masks, neither empty nor full, that are unlike the others."""
    usual = median_low([m.border for m in measures] or [0])
    often_at_border = 1 - INVERTED < usual <= INVERTED
    limit = 1 if often_at_border else INVERTED
    low, high = coverage_bounds([m.coverage for m in measures if m.border <= limit])
    for m in measures:
        if m.border > limit:
            yield "inverted", m.photo, f"covers {m.border:.0%} of the border"
        elif not low <= m.coverage <= high:
            expected = f"expected {low:.2%} to {high:.2%}"
            yield "coverage", m.photo, f"covers {m.coverage:.2%}, {expected}"


def coverage_bounds(coverages):
    """Tukey's fences: the lowest and the highest coverage that is not unusual."""
    if len(coverages) < ENOUGH:
        return 0, 1
    # On the scale of log odds 0.1 % is as far from 10 % as 99 % is from 50 %.
    odds = np.log(coverages) - np.log1p(-np.array(coverages))
    first, third = np.quantile(odds, [0.25, 0.75])
    reach = FAR_OUT * max(third - first, 0.2)
    return tuple(1 / (1 + np.exp([reach - first, -reach - third])))
