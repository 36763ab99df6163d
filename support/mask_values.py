"""Which values mask files hold, so that classes are not mistaken for one kind of object."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image

from support.errors import BadInput

MAX_VALUES = 30  # of a mask of classes; more are noise
LISTED = 16  # values in a message


class ValueCounts(NamedTuple):
    """How many pixels of a mask hold each value.

    Attributes:
        pixels: the count of each value; if there are more than MAX_VALUES, of 0 and of the highest.
        areas: the same for the values that fill areas; empty if there are more than MAX_VALUES.
    """

    pixels: Counter
    areas: Counter


def count_values(levels, counts):
    """Append the ValueCounts of a mask (H, W), integers, to a list, unless it is None."""
    if counts is not None:
        counts.append(values_of(levels))


def values_of(levels):
    """The ValueCounts of a mask (H, W), integers."""
    highest = levels.max().item()
    n_drawn = np.count_nonzero(levels)
    two_values = Counter({highest: n_drawn, 0: levels.size - n_drawn})
    if highest in (0, 1, 255) and np.count_nonzero(levels == highest) in (n_drawn, levels.size):
        return ValueCounts(two_values, Counter({0: two_values[0]}))  # as most masks are

    found = Image.fromarray(levels.astype(np.int32)).getcolors(MAX_VALUES)
    if found is None:
        return ValueCounts(two_values, Counter())
    pixels = Counter({value: number for number, value in found})
    core = levels[1:-1, 1:-1]
    like_left_and_right = (core == levels[1:-1, :-2]) & (core == levels[1:-1, 2:])
    like_above_and_below = (core == levels[:-2, 1:-1]) & (core == levels[2:, 1:-1])
    inside = core[like_left_and_right & like_above_and_below]
    # Antialiased edges have no pixels inside, and lines of two pixels 12 %.
    areas = Counter({v: n for v, n in pixels.items() if (inside == v).sum() > n / 10})
    return ValueCounts(pixels, areas)


def check_values(counts, labels, folder):
    """Raise BadInput if the masks of a folder are to be read as object and background, but seem to
    hold classes. `counts` is a list of ValueCounts."""
    if labels.classes > 1 or labels.values or not counts:
        return
    pixels = sum((mask.pixels for mask in counts), Counter())
    highest = max(pixels)
    all_background = 1 < highest < (128 if highest < 256 else 32768)
    if not (all_background or several_solid_values(counts, pixels)):
        return
    values = sorted(pixels)
    shares = [f"{v} ({100 * pixels[v] / pixels.total():.1f} %)" for v in values[:LISTED]]
    more = ", ..." if len(values) > LISTED else ""
    classes = f"name --classes {class_flags(values)}"
    others = "--mask-value V to keep some as the object, or --ignore V to leave some out"
    raise BadInput(folder, f"masks of values {', '.join(shares)}{more}", f"{classes}, or {others}")


def several_solid_values(counts, pixels):
    """Whether several values that are not white fill areas; `pixels` are those of all `counts`."""
    n_noisy = sum(not mask.areas for mask in counts)
    if n_noisy > len(counts) / 10:
        return False
    areas = sum((mask.areas for mask in counts), Counter())
    # A mask that was a JPEG once has noise around white: 254 may fill areas, too.
    dark_enough = [value for value in pixels if value < max(pixels) - 8]
    return sum(areas[value] > pixels.total() / 10**4 for value in dark_enough) >= 2


def class_flags(values):
    """The flags, after --classes, that fit masks of these values: "3 --ignore 255"."""
    named = [value for value in values if value not in (0, 255)]
    has_255 = 255 in values  # often the ignore index
    if named[-1] < 1.5 * len(named):
        return f"{named[-1]}{' --ignore 255' if has_255 else ''}"
    if has_255:
        named.append(255)
    return f"{len(named)} --mask-value {' '.join(map(str, named))}"
