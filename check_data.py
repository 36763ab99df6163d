"""A doctor for data: what is wrong with photos and masks, before a training learns it.

    python check_data.py IMAGES MASKS                  a table, findings, check_data.png
    python check_data.py IMAGES MASKS --json           the same as one JSON object
    python check_data.py IMAGES MASKS --val-img-dir DIR --val-mask-dir DIR

Without validation folders the split is train.py's, by car. The contact sheet shows masks drawn over
photos, the suspicious ones first. Nothing is changed. Exit codes: 0 nothing found but notes, 1
warnings, 2 errors, which train.py would refuse to start with, 130 Ctrl-C.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path
from statistics import median, median_low
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from command_line import Parser, run_script
from dataset import car_and_view, car_id, split_by_car
from distributed import hide_progress
from files import (
    BadInput,
    check_output,
    cpu_count,
    in_threads,
    pair_up,
    printable,
    read_mask,
    read_photo,
    shown,
)
from measures import measure, shift_in_words
from pictures import overlay
from utils import pick_device, save_picture, set_up

INVERTED = 0.75  # of the photo's border; an object seldom covers more
FAR_OUT = 3  # interquartile ranges from the quartiles: Tukey's "far out"
START_BYTES = 64 * 2**20  # of photos read at a training's start

TILES, COLUMNS, SUSPICIOUS = 48, 6, 36  # of the contact sheet; at most so many suspicious ones
TILE = (300, 200, 52)  # width, height, and below it the caption's
EXIT_CODES = {"note": 0, "warning": 1, "error": 2}


class Finding(NamedTuple):
    """Something found: its kind, how bad it is, in words, {file: details}, what to do about it."""

    kind: str
    severity: str
    what: str
    files: dict
    remedy: str

    def text(self):
        lines = [printable(f"{f}: {more}" if more else f) for f, more in self.files.items()]
        return f"{self.severity}: {BadInput.listing(self.what, lines)}\n  -> {self.remedy}"

    def line(self):
        """All in one line, with the first three files."""
        files = [printable(file) for file in self.files]
        more = f" ... and {len(files) - 3} more" if files[3:] else ""
        return f"{self.what} ({len(files)}): {', '.join(files[:3])}{more}: {self.remedy}"


# All pairs ----------------------------------------------------------------------------------------


def measure_all(pairs):
    """measure() of all pairs, in order, on all cores."""
    results = in_threads(measure, pairs, ahead=32 * cpu_count())
    hide = hide_progress()
    return list(tqdm(results, "checking", len(pairs), unit=" photos", disable=hide, delay=1))


def find_errors(unpaired, unsplit, measures):
    """Findings of what train.py would refuse, from {file: problem} and from all Measures."""
    differ, broken = {}, {}
    for m in measures:
        if m.problem:
            group = differ if len(set(m.sizes)) == 2 else broken
            photo, mask = f"{shown(m.pair.photo)}: ", f"{shown(m.pair.mask)}: "
            bad = m.pair.mask if m.problem.startswith(mask) else m.pair.photo
            group[bad] = m.problem.removeprefix(photo).removeprefix(mask)
    kinds = {
        "unpaired": ("photos and masks that do not pair", unpaired),
        "unsplit": ("too few cars or photos", unsplit),
        "sizes": ("photos and masks that differ in size", differ),
        "unreadable": ("files that cannot be used", broken),
    }
    remedy = "mend them as they say: train.py refuses to start until then"
    for kind, (what, files) in kinds.items():
        yield Finding(kind, "error", what, files, remedy)


def find_odd_masks(measures):
    """Findings of masks that may be wrong, from the Measures of pairs that can be used."""
    drawn = [m for m in measures if 0 < m.coverage < 1]
    usual = median_low([m.border for m in drawn] or [0])
    what = f"masks that look inverted{', as most of the set do' if usual > INVERTED else ''}"
    files = {
        m.pair.photo: f"the object covers {m.border:.0%} of the border"
        for m in drawn
        if m.border > INVERTED and not 1 - INVERTED < usual <= INVERTED
    }
    remedy = "look at them on the contact sheet, and swap black and white in the masks"
    yield Finding("inverted", "warning", what, files, remedy)

    others = [m for m in drawn if m.pair.photo not in files]
    files = {m.pair.photo: shift_in_words(*m.shift) for m in drawn if m.shift}
    remedy = "look at them on the contact sheet, and draw the masks again"
    yield Finding("shifted", "warning", "masks that look shifted", files, remedy)

    low, high = coverage_bounds([m.coverage for m in others])
    files = {
        m.pair.photo: f"the object covers {m.coverage:.2%}, expected {low:.1%} to {high:.1%}"
        for m in others
        if not low <= m.coverage <= high
    }
    yield Finding("coverage", "warning", "masks of unusual coverage", files, remedy)

    files = {m.pair.photo: "the mask covers all" for m in measures if m.coverage == 1}
    yield Finding("full", "warning", "masks that are full", files, remedy)
    files = {m.pair.photo: "the mask shows nothing" for m in measures if m.coverage == 0}
    severity, remedy = "note", "nothing, if these photos show no object"
    folders = {os.path.dirname(m.pair.mask) for m in measures}
    if folders - {os.path.dirname(m.pair.mask) for m in measures if m.coverage > 0}:
        severity, remedy = "error", "save them anew, 0 for the background and 255 for the object"
    yield Finding("empty", severity, "masks that are empty", files, remedy)


def coverage_bounds(coverages):
    """(lowest, highest) share of object that is not unusual among these: Tukey's fences.

    Of log odds, for which 0.1 % is as far from 10 % as 99 % from 50 %.
    """
    if len(coverages) < 8:  # too few to say what is usual
        return 0, 1
    odds = np.log(coverages) - np.log1p(-np.array(coverages))
    first, third = np.quantile(odds, [0.25, 0.75])
    reach = FAR_OUT * max(third - first, 0.2)
    return tuple((1 / (1 + np.exp([reach - first, -reach - third]))).tolist())


# Photos that are the same -------------------------------------------------------------------------


def same_bytes(files, wanted, most=math.inf):
    """Lists of files of the same content: of those lists for which wanted(list) holds.

    Only files of equal size are read, and of all sizes together not more than `most` bytes.
    """
    groups, content = [files], lambda file: hashlib.blake2b(Path(file).read_bytes()).digest()
    for key in (os.path.getsize, content):
        found, groups = groups, []
        for group in found:
            if key is content:
                most -= len(group) * os.path.getsize(group[0])
            same = {}
            for file in group if most >= 0 else []:
                with contextlib.suppress(OSError):  # find_errors names those that cannot be read
                    same.setdefault(key(file), []).append(file)
            groups += filter(wanted, same.values())
    return groups


def find_duplicates(*sides):
    """A Finding of photos that stand more than once on one side; sides are lists of Pair."""
    files = {}
    for pairs in sides:
        for first, *others in same_bytes([p.photo for p in pairs], lambda group: len(group) > 1):
            files |= {photo: f"the same bytes as {first}" for photo in others}
    yield Finding("duplicate", "warning", "photos that come twice", files, "keep one of them")


def find_leaks(train_pairs, val_pairs, most=math.inf):
    """Findings of what validation has in common with training: cars by name, photos by content."""
    named = lambda pairs: {  # noqa: E731
        car for car, view in (car_and_view(pair.name) for pair in pairs) if view
    }
    cars = named(train_pairs) & named(val_pairs)
    what, remedy = "cars both in training and in validation", "keep all photos of a car on one side"
    yield Finding("cars", "warning", what, dict.fromkeys(sorted(cars), ""), remedy)

    train, val = ({pair.photo for pair in pairs} for pairs in (train_pairs, val_pairs))
    both = lambda group: not train.isdisjoint(group) and not val.isdisjoint(group)  # noqa: E731
    files = {}
    for group in same_bytes(sorted(train | val), both, most):
        twin = next(photo for photo in group if photo in train)
        files |= {photo: f"the same bytes as {twin}" for photo in group if photo in val}
    what, remedy = "photos both in training and in validation", "remove them from one side"
    yield Finding("leak", "warning", what, files, remedy)


def quick_findings(train_pairs, val_pairs):
    """What a start of training says of its data, a line each; decodes nothing, reads little."""
    findings = find_leaks(train_pairs, val_pairs, START_BYTES)
    return [f"{finding.line()} (see python check_data.py)" for finding in findings if finding.files]


# The report ---------------------------------------------------------------------------------------


def summarize(measures):
    """The table's column of one side, from its Measures."""
    usable = [m for m in measures if not m.problem]
    coverages = [m.coverage for m in usable] or [None]
    return {
        "pairs": len(measures),
        "that can be used": len(usable),
        "cars": len({car_id(m.pair.name) for m in measures}),
        "sizes": Counter(f"{m.sizes[0][0]}x{m.sizes[0][1]}" for m in usable),
        "modes of photos": Counter(m.modes[0] for m in usable),
        "modes of masks": Counter(m.modes[1] for m in usable),
        "least coverage": min(coverages),
        "median coverage": median(coverages),
        "most coverage": max(coverages),
    }


def cell(value):
    """A value of a summary as text, a float as a share, of counted things the three commonest."""
    if isinstance(value, Counter):
        more = ", ..." if len(value) > 3 else ""
        return ", ".join(f"{name} ({count})" for name, count in value.most_common(3)) + more
    return f"{value:.2%}" if isinstance(value, float) else str("" if value is None else value)


def print_table(summaries):
    """Summaries, {side: what summarize gives}, a column each."""
    training, validation = summaries.values()
    print(f"{'':18}{'training':32}validation")
    for name, value in training.items():
        print(f"{name:18}{cell(value):32}{cell(validation[name])}")


def draw_sheet(findings, measures):
    """The contact sheet: photos named in findings, then ordinary ones; None if none can be drawn.

    Returns a PIL image. The kinds of findings share the room, and the ordinary ones are evenly
    spaced.
    """
    usable = {m.pair.photo: m for m in measures if not m.problem}
    findings = [finding for finding in findings if usable.keys() & finding.files.keys()]
    captions, ordinary = {}, dict.fromkeys(usable)
    for finding in findings:
        photos = [photo for photo in finding.files if photo in usable]
        for photo in photos[: SUSPICIOUS // len(findings)]:
            captions.setdefault(photo, []).append(f"{finding.kind}: {finding.files[photo]}")
        ordinary = {photo: None for photo in ordinary if photo not in finding.files}
    count = min(len(ordinary), TILES - len(captions))
    for index in range(count):
        captions[list(ordinary)[index * len(ordinary) // count]] = []
    if not captions:
        return None

    width, height = TILE[0], TILE[1] + TILE[2]
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(captions) // COLUMNS) * height), "white")
    draw = lambda item: draw_tile(usable[item[0]], item[1])  # noqa: E731
    for index, tile in enumerate(in_threads(draw, captions.items(), ahead=TILES)):
        sheet.paste(tile, (index % COLUMNS * width, index // COLUMNS * height))
    return sheet


def draw_tile(measures, reasons):
    """One photo with its mask as a tint, its name and, in red, why it is suspicious."""
    width, height, below = TILE
    scale = min((width - 8) / measures.sizes[0][0], height / measures.sizes[0][1])
    size = tuple(max(1, round(scale * side)) for side in measures.sizes[0][::-1])
    photo = Image.fromarray(read_photo(measures.pair.photo, size))
    mask = read_mask(measures.pair.mask, size) * np.uint8(255)
    tile = Image.new("RGB", (width, height + below), "white")
    tile.paste(overlay(photo, mask), ((width - size[1]) // 2, height - size[0]))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    draw.text((4, height + 1), printable(measures.pair.name)[-46:], "black", font)
    text = "\n".join(textwrap.wrap(printable("; ".join(reasons)), 46)[:2])
    draw.text(
        (4, height + 16), text or f"covers {measures.coverage:.1%}", "red" if text else "gray", font
    )
    return tile


def get_args_parser():
    parser = Parser(
        prog="check_data.py",
        description=__doc__.splitlines()[0],
        epilog="Exit codes: " + " ".join(__doc__.partition("Exit codes: ")[2].split()),
    )
    parser.add_argument("images", metavar="IMAGES", help="folder of photos")
    parser.add_argument("masks", metavar="MASKS", help="folder of their masks")
    parser.add_argument(
        "--val-img-dir", metavar="DIR", help="validation photos; without, cars are held out"
    )
    parser.add_argument("--val-mask-dir", metavar="DIR", help="their masks")
    parser.add_argument(
        "--sheet",
        metavar="FILE",
        default="check_data.png",
        help="contact sheet to write, a PNG (default: check_data.png)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON, with all files of a finding"
    )
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if bool(args.val_img_dir) != bool(args.val_mask_dir):
        raise BadInput("--val-img-dir and --val-mask-dir belong together: name both")
    folders = (args.images, args.masks, args.val_img_dir, args.val_mask_dir)
    place = Path(os.path.realpath(args.sheet)).parent
    if os.path.isdir(args.sheet) or place in {Path(os.path.realpath(f)) for f in folders if f}:
        raise BadInput(
            f"--sheet {printable(args.sheet)}: is a folder, or among the photos: name another file"
        )
    check_output(place, "--sheet")
    train_pairs, unpaired = pair_up(args.images, args.masks)
    val_pairs, unpaired, unsplit = [], dict(unpaired), {}
    if args.val_img_dir:
        val_pairs, more = pair_up(args.val_img_dir, args.val_mask_dir)
        unpaired |= dict(more)
    elif train_pairs:
        try:
            train_pairs, val_pairs = split_by_car(train_pairs)
        except BadInput as problem:
            unsplit = {args.images: str(problem)}

    set_up(pick_device("cpu"))  # masks at full size come and go: half the time without page faults
    measures = measure_all([*train_pairs, *val_pairs])
    usable = [m for m in measures if not m.problem]
    findings = [
        *find_errors(unpaired, unsplit, measures),
        *find_odd_masks(usable),
        *find_leaks(train_pairs, val_pairs),
        *find_duplicates(train_pairs, val_pairs),
    ]
    worst_first = sorted(findings, key=lambda finding: -EXIT_CODES[finding.severity])
    findings = [finding for finding in worst_first if finding.files]
    code = EXIT_CODES[findings[0].severity] if findings else 0
    sides = {"training": measures[: len(train_pairs)], "validation": measures[len(train_pairs) :]}
    summaries = {side: summarize(part) for side, part in sides.items()}
    if args.json:
        found = [finding._asdict() for finding in findings]
        print(json.dumps(summaries | {"findings": found, "exit code": code}, indent=2))
    else:
        print_table(summaries)
        print("\n" + "\n\n".join([finding.text() for finding in findings] or ["nothing found"]))
    sheet = draw_sheet(findings, measures)
    if sheet:
        save_picture(sheet, args.sheet)
        print(f"\ncontact sheet: {printable(args.sheet)}", file=sys.stderr if args.json else None)
    return code


if __name__ == "__main__":
    run_script(main)
