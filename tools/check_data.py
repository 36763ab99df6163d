"""Check photos and masks for mistakes before training on them.

    python tools/check_data.py IMAGES MASKS     a table, findings, check_data.png; or --json
    python tools/check_data.py IMAGES MASKS --val-img-dir DIR --val-mask-dir DIR
    python tools/check_data.py IMAGES MASKS --mask-suffix _manual1 --group '^(.*)[LR]$'
    python tools/check_data.py IMAGES MASKS --classes road car sky --ignore 255

Flags that train.py has too mean the same here. Without validation folders, photos are split as
train.py splits them. The contact sheet shows masks drawn over photos, suspicious ones first. No
photo or mask is changed. Exit codes: 0 nothing found but notes, 1 warnings, 2 errors (train.py
would refuse to start), 130 Ctrl-C.
"""

import dataclasses
import json
import math
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import support.startup  # noqa: E402, F401

# isort: split

from PIL import Image, ImageDraw  # noqa: E402

from dataset import car_id, split_by_car  # noqa: E402
from support.cache import decode_all  # noqa: E402
from support.command_line import (  # noqa: E402
    Parser,
    arguments,
    regular_expression,
    run_script,
    whole_number,
)
from support.errors import BadInput, printable  # noqa: E402
from support.flags import class_names  # noqa: E402
from support.mask_checks import find_odd_masks, measure  # noqa: E402
from support.mask_values import check_values  # noqa: E402
from support.masks import Labels  # noqa: E402
from support.pairs import for_all, in_threads, pair_up, read_pair  # noqa: E402
from support.pictures import overlay  # noqa: E402
from support.plots import palette  # noqa: E402
from support.writing import check_output, save_picture  # noqa: E402
from utils import pick_device  # noqa: E402

EXIT_CODES = {"note": 0, "warning": 1, "error": 2}

COLUMNS = 6  # of the contact sheet
TILES = 48  # at most
TILE_WIDTH = 300  # pixels, as the others
PHOTO_HEIGHT = 200
CAPTION_HEIGHT = 36
MARGIN = 4
NAME_LENGTH = 46  # characters that fit below a photo


# Reading ------------------------------------------------------------------------------------------


def read_sides(folders, labels, mask_suffix, group):
    """Read the pairs in (photos, masks) for training, and in a second one for validation if given.

    Returns (training, validation, problems): Measures of the pairs of each side that train.py can
    use, split as train.py splits them, and the BadInputs that it would raise.
    """
    sides, problems = [], []
    usable = {}  # {pair: its Measures}
    for image_dir, mask_dir in folders:
        pairs, unpaired = pair_up(image_dir, mask_dir, mask_suffix)
        sides.append(pairs)
        problems += unpaired
    for pairs in sides:
        measures, unusable = read_pairs(pairs, labels)
        usable |= {m.pair: m for m in measures}
        problems += unusable
    if len(sides) == 1:
        try:
            sides = split_by_car(sides[0], group=group)
        except BadInput as problem:
            sides.append([])
            problems.append(problem)
    train, val = ([usable[pair] for pair in pairs if pair in usable] for pairs in sides)
    return train, val, problems


def read_pairs(pairs, labels):
    """(Measures of the pairs that train.py can use, the BadInputs that it would raise)."""
    problems, counts = [], []

    def attempt(pair):
        try:
            return measure(pair, labels, counts)
        except BadInput as problem:
            problems.append(problem)

    measures = [m for m in for_all(attempt, pairs, "checking") if m]
    problems.sort(key=str)  # threads finish in any order
    try:
        check_values(counts, labels, os.path.dirname(pairs[0].mask))
        if measures and not problems and not any(m.coverage for m in measures):
            # All masks are empty: decode_all raises for one of them what it would for all.
            list(decode_all(pairs[:1], None, 3, "checking", labels))
    except BadInput as refusal:  # the masks as a whole
        return [], [refusal, *problems]
    return measures, problems


# Findings -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finding:
    """A kind of mistake, and where it was found."""

    severity: str  # a key of EXIT_CODES
    what: str
    remedy: str
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # {file or car: details}


def find_all(train, val, problems, classes, group):
    """{kind: Finding}, the worst first, for what read_sides returns; `classes` is a number."""
    look = "look at them on the contact sheet, and draw the masks again"
    mend = "mend them: train.py refuses to start until then"
    swap = "swap black and white if they are inverted"
    keep_apart = "keep each in training or in validation"
    no_object = "nothing to do if these photos show no object"
    findings = {
        "refused": Finding("error", "data that cannot be used", mend),
        "inverted": Finding("warning", "masks that look inverted", swap),
        "coverage": Finding("warning", "masks of unusual coverage", look),
        "full": Finding("warning", "masks that are full", look),
        "cars": Finding("warning", "cars or groups on both sides", keep_apart),
        "leak": Finding("warning", "photos on both sides", keep_apart),
        "duplicate": Finding("warning", "photos that come twice", "keep one of them"),
        "empty": Finding("note", "masks that are empty", no_object),
    }
    for problem in problems:
        findings["refused"].files[str(problem.path)] = f"{problem.reason}: {problem.remedy}"
    on_both_sides = find_cars(train, val, group)
    odd_masks = find_odd_masks(train + val, classes)
    for kind, file, details in chain(on_both_sides, find_copies(train, val), odd_masks):
        findings[kind].files[file] = details
    return {kind: finding for kind, finding in findings.items() if finding.files}


def cars_of(measures, group):
    """{car or group: names of its photos in lower case}."""
    cars = {}
    for m in measures:
        cars.setdefault(car_id(m.pair.name, group), set()).add(m.pair.name.lower())
    return cars


def find_cars(train, val, group):
    """Yield (kind, car, details) of cars or groups with photos on both sides."""
    train_cars, val_cars = cars_of(train, group), cars_of(val, group)
    for car in sorted(train_cars.keys() & val_cars.keys()):
        names = train_cars[car] | val_cars[car]
        if group or names != {car}:  # two photos both called 1 are one car only if --group says so
            counts = f"{len(train_cars[car])} in training, {len(val_cars[car])} in validation"
            yield "cars", car, counts


def find_copies(train, val):
    """Yield (kind, photo, details) of photos with the bytes of an earlier one."""
    originals = {}
    for side in (train, val):
        for m in side:
            original, first_side = originals.setdefault(m.content, (m.photo, side))
            if original != m.photo or side is not first_side:
                kind = "duplicate" if side is first_side else "leak"
                yield kind, m.photo, f"the same bytes as {original}"


# The report ---------------------------------------------------------------------------------------


def summarize(measures, classes, group):
    """The table's column of one side, {row: value}, from its Measures; `classes` are names."""
    sizes = Counter(f"{m.size[0]}x{m.size[1]}" for m in measures).most_common(3)
    coverages = [m.coverage for m in measures] or [None]
    column = {
        "usable pairs": len(measures),
        "cars or groups": len(cars_of(measures, group)),
        "sizes": ", ".join(f"{size} ({count})" for size, count in sizes),
        "least coverage": min(coverages),
        "median coverage": median(coverages),
        "most coverage": max(coverages),
    }
    if len(classes) > 1:
        total = sum(math.prod(m.size) for m in measures)
        for number, name in enumerate(classes):
            pixels = sum(m.pixels[number] for m in measures)
            column[f"share of {name}"] = pixels / total if total else None
    return column


def print_report(columns, findings):
    """Print {side: column of summarize} as a table, and {kind: Finding} with ten files each."""
    rows = [["", *columns]]
    for name in columns["training"]:
        values = [column[name] for column in columns.values()]
        cells = [f"{value:.2%}" if isinstance(value, float) else str(value) for value in values]
        rows.append([printable(name), *cells])
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    for row in rows:
        print("".join(map(str.ljust, row, widths)).rstrip())
    for finding in findings.values():
        lines = [printable(f"{file}: {details}") for file, details in finding.files.items()]
        print(f"\n{finding.severity}: {BadInput.listing(finding.what, lines)}")
        print(f"  -> {finding.remedy}")
    if not findings:
        print("\nnothing found")


# The contact sheet --------------------------------------------------------------------------------


def draw_sheet(measures, findings, labels):
    """The contact sheet, a PIL image: a sample of the photos, those named in findings first."""

    def is_suspicious(m):
        return any(m.photo in finding.files for finding in findings.values())

    sample = Random(0).sample(measures, len(measures))
    shown = sorted(sample, key=is_suspicious, reverse=True)[:TILES]
    rows = math.ceil(len(shown) / COLUMNS)
    height = PHOTO_HEIGHT + CAPTION_HEIGHT
    sheet = Image.new("RGB", (COLUMNS * TILE_WIDTH, rows * height), "white")
    tiles = in_threads(partial(draw_tile, findings=findings, labels=labels), shown, TILES)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, COLUMNS)
        sheet.paste(tile, (column * TILE_WIDTH, row * height))
    return sheet


def draw_tile(m, findings, labels):
    """One photo with its mask as a tint, its name and, in red, what was found."""
    width, height = m.size
    scale = min((TILE_WIDTH - 2 * MARGIN) / width, PHOTO_HEIGHT / height)
    size = max(1, round(scale * height)), max(1, round(scale * width))
    photo, mask = read_pair(m.pair, size, labels=labels)
    colours = palette(labels.classes) if labels.classes > 1 else None
    picture = overlay(Image.fromarray(photo), mask * labels.objects(mask), colours)
    tile = Image.new("RGB", (TILE_WIDTH, PHOTO_HEIGHT + CAPTION_HEIGHT), "white")
    tile.paste(picture, (MARGIN, 0))

    kinds = [kind for kind, finding in findings.items() if m.photo in finding.files]
    name = printable(m.pair.name)[-NAME_LENGTH:]
    caption = ", ".join([f"covers {m.coverage:.1%}", *kinds])
    colour = "red" if kinds else "black"
    place = (MARGIN, PHOTO_HEIGHT)
    ImageDraw.Draw(tile).text(place, f"{name}\n{caption}", colour, font_size=12)
    return tile


# The script ---------------------------------------------------------------------------------------


def get_args_parser():
    """The flags of check_data.py."""
    parser = Parser("check_data.py", None, __doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    value = {"type": whole_number(0, 65535), "metavar": "N"}
    add("images", metavar="IMAGES", help="folder of photos")
    add("masks", metavar="MASKS", help="folder of their masks")
    add("--val-img-dir", metavar="DIR", help="validation photos")
    add("--val-mask-dir", metavar="DIR", help="their masks")
    add("--mask-suffix", metavar="TEXT", help="suffix of mask names, or two patterns PHOTO=MASK")
    add("--classes", nargs="+", default=1, metavar="NAME", help="names of classes, or how many")
    add("--mask-value", nargs="+", default=(), help="pixel values, if not 1, 2, ...", **value)
    add("--ignore", help="pixel value to ignore", **value)
    add("--group", type=regular_expression, help="regular expression: what stays on one side")
    add("--sheet", default="check_data.png", help="contact sheet to write, a PNG")
    add("--json", action="store_true", help="print JSON, with all files")
    return parser


def folders_of(args):
    """[(photos, masks)] of training, and of validation if given. Raises BadInput."""
    if bool(args.val_img_dir) != bool(args.val_mask_dir):
        raise BadInput("--val-img-dir and --val-mask-dir", "belong together", "name both")
    folders = [(args.images, args.masks)]
    if args.val_img_dir:
        folders.append((args.val_img_dir, args.val_mask_dir))
    place = Path(args.sheet).resolve().parent
    if place in [Path(folder).resolve() for folder in chain(*folders)]:
        raise BadInput(args.sheet, "lies among the photos", "name another --sheet")
    check_output(place, "--sheet")
    return folders


def main(argv=None):
    """Check what the flags in argv name; returns the exit code."""
    args = get_args_parser().parse_args(arguments(argv))
    folders = folders_of(args)
    classes = class_names(args.classes)
    labels = Labels(len(classes), tuple(args.mask_value), args.ignore)
    pick_device("cpu")  # memory for masks at full size is kept: that halves the time
    train, val, problems = read_sides(folders, labels, args.mask_suffix, args.group)

    findings = find_all(train, val, problems, len(classes), args.group)
    code = max((EXIT_CODES[finding.severity] for finding in findings.values()), default=0)

    columns = {
        "training": summarize(train, classes, args.group),
        "validation": summarize(val, classes, args.group),
    }
    if args.json:
        as_dicts = {kind: dataclasses.asdict(finding) for kind, finding in findings.items()}
        print(json.dumps(columns | {"findings": as_dicts, "exit code": code}, indent=2))
    else:
        print_report(columns, findings)
    if train + val:
        save_picture(draw_sheet(train + val, findings, labels), args.sheet)
        print(f"\ncontact sheet: {printable(args.sheet)}", file=sys.stderr if args.json else None)
    return code


if __name__ == "__main__":
    run_script(main)
