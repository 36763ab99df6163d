"""A doctor for data: what is wrong with photos and masks, before a training learns it.

    python tools/check_data.py IMAGES MASKS     a table, findings, check_data.png; or --json
    python tools/check_data.py IMAGES MASKS --val-img-dir DIR --val-mask-dir DIR
    python tools/check_data.py IMAGES MASKS --mask-suffix _manual1 --group '^(.*)[LR]$'
    python tools/check_data.py IMAGES MASKS --classes road car sky --ignore 255

Names, values and groups are read as train.py's flags of these names say; without validation folders
the split is train.py's, by car or --group. The contact sheet shows masks drawn over photos, the
suspicious ones first. Nothing is changed. Exit codes: 0 nothing found but notes, 1 warnings, 2
errors, which train.py would refuse to start with, 130 Ctrl-C.
"""

import hashlib
import json
import math
import os
import re
import sys
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from itertools import chain, groupby
from pathlib import Path
from statistics import median, median_low
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
from dataset import car_id, split_by_car  # noqa: E402
from support import advice, images  # noqa: E402
from support.command_line import Parser, regular_expression, run_script, whole_number  # noqa: E402
from support.errors import BadInput, printable  # noqa: E402
from support.pairs import Pair, check_header, for_all, in_threads, pair_up, read_pair  # noqa: E402
from support.pictures import overlay  # noqa: E402
from support.plots import palette  # noqa: E402
from support.settings import class_names  # noqa: E402
from support.writing import check_output, save_picture  # noqa: E402
from utils import pick_device  # noqa: E402

SIDE = 240  # pixels of a photo's longer side, for comparing its edges with the mask's outline
CONTRAST = 3000  # squared Sobel responses, some 7 grey levels a pixel, where an edge counts half
INVERTED = 0.75  # of the photo's border; an object seldom covers more
FAR_OUT = 3  # interquartile ranges from the quartiles: Tukey's "far out"

TILES, COLUMNS, SUSPICIOUS = 48, 6, 36  # of the contact sheet; at most so many suspicious ones
TILE = (300, 200, 52)  # width, height, and below it the caption's
EXIT_CODES = {"note": 0, "warning": 1, "error": 2}
MEND = "mend them as they say: train.py refuses to start until then"
KEEP = "keep each on one side"
LOOK = "look at them on the contact sheet, and draw the masks again"
FINDINGS = {  # how bad each kind is, in words, what to do about it; the worst first
    "unpaired": ("error", "photos and masks that do not pair, or are too few", MEND),
    "values": ("error", "masks that hold classes", "give these flags here, and to train.py"),
    "sizes": ("error", "photos and masks that differ in size", MEND),
    "unreadable": ("error", "files that cannot be used", MEND),
    "no object": ("error", "folders of empty masks", "save them anew, 255 for the object"),
    "inverted": ("warning", "masks that look inverted", "swap black and white, if they are"),
    "shifted": ("warning", "masks that look shifted", LOOK),
    "coverage": ("warning", "masks of unusual coverage", LOOK),
    "full": ("warning", "masks that are full", LOOK),
    "cars": ("warning", "cars or groups both in training and in validation", KEEP),
    "leak": ("warning", "photos both in training and in validation", KEEP),
    "duplicate": ("warning", "photos that come twice", "keep one of them"),
    "ungrouped": ("warning", "photos in whose names --group finds nothing", "mend the expression"),
    "missing": ("warning", "classes missing on a side", "hold out other photos, or leave them out"),
    "empty": ("note", "masks that are empty", "nothing, if these photos show no object"),
    "neighbours": ("note", "photos held out that look like neighbours of training photos", KEEP),
}

# One pair -----------------------------------------------------------------------------------------


class Measures(NamedTuple):
    """What is known of a pair, or the problem for which it cannot be used.

    Counts are check_values'; sizes (width, height); coverage and border the objects' share of all
    pixels and of those at the photo's border; shift is find_shift's; content a hash of the photo's
    file; pixels are those of each class.
    """

    pair: Pair
    problem: BadInput | None = None
    counts: list = []
    sizes: tuple = ()
    modes: tuple = ()
    coverage: float = math.nan
    border: float = math.nan
    shift: tuple | None = None
    content: bytes = b""
    pixels: list = []


def measure(pair, labels):
    """Measures of a pair; decodes both files. Raises nothing for files that are bad."""
    sizes, counts = (), []
    try:
        with images.open_image(pair.photo) as photo, images.open_image(pair.mask) as mask:
            sizes, modes = tuple(map(images.upright_size, (photo, mask))), (photo.mode, mask.mode)
        check_header(pair)
        scale = min(1, SIDE / max(sizes[0]))
        width, height = (max(1, round(scale * side)) for side in sizes[0])
        photo = images.read_photo(pair.photo, (height, width))
        mask = images.read_mask(pair.mask, None, labels, counts)
    except BadInput as problem:
        return Measures(pair, problem, counts, sizes)
    numbers = [255] if labels.is_soft_mask else range(1, labels.classes + 1)
    pixels = [int(np.count_nonzero(mask == number)) for number in numbers]
    small = Image.fromarray(labels.objects(mask) * np.uint8(255))
    small = np.asarray(small.resize((width, height), Image.Resampling.BOX, reducing_gap=1.0))
    border = np.concatenate([small[0], small[-1], small[1:-1, 0], small[1:-1, -1]])
    found = sum(pixels) / mask.size, border.mean().item() / 255, find_shift(photo, small)
    content = hashlib.blake2b(Path(pair.photo).read_bytes()).digest()
    return Measures(pair, None, counts, sizes, modes, *found, content, pixels)


def find_shift(photo, mask):
    """Where the outline of a mask fits the edges of its photo far better than where it is.

    Photo (H, W, 3) and mask (H, W), 0 to 255, are uint8. Returns (right, down), in widths of the
    photo, by which the mask would have to move; None where it fits best where it is, or nowhere
    well. Shifts of up to a fifth of the longer side are compared by the share of the outline that
    lies along an edge.
    """
    outline = edges(mask[..., None])
    length = (outline[..., 0] + outline[..., 2]).sum()
    if length < 20:  # a few pixels of an object, if any: they fit anywhere
        return None
    longer = max(mask.shape)
    reach, near = round(0.2 * longer), max(1, round(0.01 * longer))
    around = cv2.copyMakeBorder(edges(photo), *[reach] * 4, cv2.BORDER_CONSTANT)
    fit = cv2.matchTemplate(around, outline, cv2.TM_CCORR) / length
    down, right = np.unravel_index(fit.argmax(), fit.shape) - np.array(reach)
    here = slice(max(0, reach - near), reach + near + 1)
    # None of 3,584 pairs of the challenge is beyond all these bounds. With the mask moved by 5, 8
    # and 15 % of the width 93, 99 and 100 of 100 are.
    clear = fit.max() > max(0.4, 1.25 * fit[here, here].max(), fit.mean() + 3 * fit.std())
    far = math.hypot(down, right) >= 0.04 * longer
    return (right.item() / mask.shape[1], down.item() / mask.shape[1]) if clear and far else None


def edges(image):
    """The edges of an image (H, W, C): (H, W, 3), float32, structure tensors of norm 0 to 1."""
    # The product of two tensors is large where both edges run the same way, whichever side of them
    # is the brighter one.
    x, y = (cv2.Sobel(image, cv2.CV_32F, *d).reshape(image.shape) for d in ((1, 0), (0, 1)))
    parts = [x * x, math.sqrt(2) * x * y, y * y]
    tensor = np.stack([part.sum(axis=2) for part in parts], axis=2)
    return tensor / (tensor[..., :1] + tensor[..., 2:] + CONTRAST)


# All pairs: findings, {kind: {file: details}} -----------------------------------------------------


def find_errors(unpaired, measures, labels):
    """What train.py would refuse, from a list of BadInput and from all Measures."""
    problems = {"unpaired": unpaired, "values": [], "sizes": [], "unreadable": []}
    for folder, group in groupby(measures, lambda m: os.path.dirname(m.pair.mask)):
        some = list(group)
        try:
            images.check_values(list(chain(*(m.counts for m in some))), labels, folder)
        except BadInput as problem:
            problems["values"].append(problem)
            some = [m for m in some if not m.counts]  # that finding speaks for the others
        for m in (m for m in some if m.problem):
            problems["sizes" if len(set(m.sizes)) == 2 else "unreadable"].append(m.problem)
    return {k: {p.path: f"{p.reason}: {p.remedy}" for p in some} for k, some in problems.items()}


def find_odd_masks(measures, labels):
    """Masks that may be wrong, from the Measures of pairs that can be used."""
    drawn = [m for m in measures if 0 < m.coverage < 1]
    usual = median_low([m.border for m in drawn] or [0])
    most = ", as in most of the set" if usual > INVERTED else ""
    limit = 1 if 1 - INVERTED < usual <= INVERTED else INVERTED  # 1: objects may reach the border
    inverted = [m for m in drawn if m.border > limit]
    others = [m for m in drawn if m.border <= limit]
    low, high = coverage_bounds([m.coverage for m in others])
    unusual = [m for m in others if not low <= m.coverage <= high]
    expected = f"expected {low:.2%} to {high:.2%}"
    folders = {os.path.dirname(m.pair.mask) for m in measures}
    folders -= {os.path.dirname(m.pair.mask) for m in measures if m.coverage > 0}
    odd = {
        "inverted": {m.pair.photo: f"covers {m.border:.0%} of the border{most}" for m in inverted},
        "shifted": {m.pair.photo: shift_in_words(*m.shift) for m in drawn if m.shift},
        "coverage": {m.pair.photo: f"covers {m.coverage:.2%}, {expected}" for m in unusual},
        "full": {m.pair.photo: "the mask covers all" for m in measures if m.coverage == 1},
        "empty": {m.pair.photo: "the mask shows nothing" for m in measures if m.coverage == 0},
        "no object": dict.fromkeys(folders, "no mask has a pixel of an object"),
    }
    together = dict.fromkeys(("inverted", "coverage", "full"), {})  # several may well fill a photo
    return odd if labels.classes == 1 else odd | together


def shift_in_words(right, down):
    """find_shift's answer in words."""
    across, along = "right" if right > 0 else "left", "down" if down > 0 else "up"
    return f"fits better {abs(right):.0%} of the width {across} and {abs(down):.0%} {along}"


def coverage_bounds(coverages):
    """(lowest, highest) share of object that is not unusual among these: Tukey's fences."""
    if len(coverages) < 8:  # too few to say what is usual
        return 0, 1
    # Of log odds, for which 0.1 % is as far from 10 % as 99 % from 50 %.
    odds = np.log(coverages) - np.log1p(-np.array(coverages))
    first, third = np.quantile(odds, [0.25, 0.75])
    reach = FAR_OUT * max(third - first, 0.2)
    return tuple((1 / (1 + np.exp([reach - first, -reach - third]))).tolist())


def find_missing(summaries, classes):
    """Classes, of several, of which a side has no pixel, from what summarize gives of each side."""
    missing = {}
    for name in classes:
        sides = [f"in {side}" for side in summaries if summaries[side].get(f"share of {name}") == 0]
        if sides:
            missing[name] = " and ".join(sides)
    return missing


def find_copies(sides, group):
    """Cars or groups and photos on both sides, training and validation, photos that come twice on
    one, and names without a group, from all Measures."""
    same, twice, leaked = {}, {}, {}
    cars = [{car_id(m.pair.name, group) for m in side} for side in sides]
    found = {m.pair.name: group and re.search(group, m.pair.name) for m in chain(*sides)}
    alone = [name for name, match in found.items() if not (match and match[1])]
    both = cars[0] & cars[1] - {name.lower() for name in alone}
    for number, side in enumerate(sides):
        for m in (m for m in side if m.content):
            same.setdefault(m.content, ([], []))[number].append(m.pair.photo)
    for train, val in same.values():
        for first, *others in filter(None, (train, val)):
            twice |= dict.fromkeys(others, f"the same bytes as {first}")
        if train:
            leaked |= dict.fromkeys(val, f"the same bytes as {train[0]}")
    cars, ungrouped = dict.fromkeys(sorted(both), ""), dict.fromkeys(alone if group else [], "")
    return {"cars": cars, "ungrouped": ungrouped, "leak": leaked, "duplicate": twice}


# The report ---------------------------------------------------------------------------------------


def summarize(measures, classes, group):
    """The table's column of one side, from its Measures; `classes` are names."""
    usable = [m for m in measures if not m.problem]
    coverages = [m.coverage for m in usable] or [None]
    pixels = sum(math.prod(m.sizes[0]) for m in usable)
    shares = {}
    for n, name in enumerate(classes if len(classes) > 1 else ()):
        shares[f"share of {name}"] = sum(m.pixels[n] for m in usable) / pixels if usable else None
    return {
        "pairs": len(measures),
        "that can be used": len(usable),
        "cars or groups": len({car_id(m.pair.name, group) for m in measures}),
        "sizes": commonest(f"{m.sizes[0][0]}x{m.sizes[0][1]}" for m in usable),
        "modes of photos": commonest(m.modes[0] for m in usable),
        "modes of masks": commonest(m.modes[1] for m in usable),
        "least coverage": min(coverages),
        "median coverage": median(coverages),
        "most coverage": max(coverages),
        **shares,
    }


def commonest(values):
    """The three commonest of them and how many there are, as a text."""
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(3))


def print_report(summaries, findings):
    """Summaries, {side: what summarize gives}, a column each; findings with ten files each."""
    rows = [["", *summaries]]
    for name in summaries["training"]:
        row = (summary[name] for summary in summaries.values())
        cells = (f"{value:.2%}" if isinstance(value, float) else str(value) for value in row)
        rows.append([printable(name), *cells])
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    for row in rows:
        print("".join(map(str.ljust, row, widths)).rstrip())
    for kind, files in findings.items():
        severity, what, remedy = FINDINGS[kind]
        lines = [printable(f"{file}: {more}" if more else file) for file, more in files.items()]
        print(f"\n{severity}: {BadInput.listing(what, lines)}\n  -> {remedy}")
    if not findings:
        print("\nnothing found")


def draw_sheet(findings, usable, labels):
    """The contact sheet, a PIL image, of `usable`, {photo: Measures}: photos named in findings,
    whose kinds share the room, then ordinary ones, evenly spaced."""
    found, share = findings.items(), SUSPICIOUS // max(1, len(findings))
    reasons = {p: [f"{kind}: {files[p]}" for kind, files in found if p in files] for p in usable}
    suspicious = ([p for p in files if p in usable][:share] for files in findings.values())
    photos = list(dict.fromkeys(chain(*suspicious)))
    ordinary = [photo for photo in usable if not reasons[photo]]
    count = min(len(ordinary), TILES - len(photos))
    photos += [ordinary[index * len(ordinary) // count] for index in range(count)]

    width, height = TILE[0], TILE[1] + TILE[2]
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(photos) // COLUMNS) * height), "white")
    tiles = in_threads(lambda p: draw_tile(usable[p], reasons[p], labels), photos, TILES)
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % COLUMNS * width, index // COLUMNS * height))
    return sheet


def draw_tile(measures, reasons, labels):
    """One photo with its mask as a tint, its name and, in red, why it is suspicious."""
    width, height, below = TILE
    scale = min((width - 8) / measures.sizes[0][0], height / measures.sizes[0][1])
    size = tuple(max(1, round(scale * side)) for side in measures.sizes[0][::-1])
    photo, mask = read_pair(measures.pair, size, labels=labels)
    colours = palette(labels.classes) if labels.classes > 1 else None
    photo = overlay(Image.fromarray(photo), mask * labels.objects(mask), colours)
    tile = Image.new("RGB", (width, height + below), "white")
    tile.paste(photo, ((width - size[1]) // 2, height - size[0]))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    draw.text((4, height + 1), printable(measures.pair.name)[-46:], "black", font)
    text = printable("; ".join(reasons) or f"covers {measures.coverage:.1%}")
    lines = textwrap.wrap(text, 46)[:2]
    draw.text((4, height + 16), "\n".join(lines), "red" if reasons else "gray", font)
    return tile


def get_args_parser():
    """The flags of check_data.py."""
    parser = Parser("check_data.py", None, __doc__, formatter_class=RawDescriptionHelpFormatter)
    add, values = parser.add_argument, {"type": whole_number(0, 65535), "metavar": "N"}
    add("images", metavar="IMAGES", help="folder of photos")
    add("masks", metavar="MASKS", help="folder of their masks")
    add("--val-img-dir", metavar="DIR", help="validation photos")
    add("--val-mask-dir", metavar="DIR", help="their masks")
    add("--mask-suffix", metavar="TEXT", help="how masks' names end, or PHOTO=MASK, with a *")
    add("--classes", nargs="+", default=1, metavar="NAME", help="names of classes, or how many")
    add("--mask-value", nargs="+", default=(), help="their values, if not 1, 2, ...", **values)
    add("--ignore", help="value of pixels that do not count", **values)
    add("--group", type=regular_expression, help="what it finds in names stays on one side")
    add("--sheet", default="check_data.png", help="contact sheet to write, a PNG")
    add("--json", action="store_true", help="print JSON, with all files")
    return parser


def main(argv=None):
    """Check what the flags in argv name; returns the exit code."""
    args = get_args_parser().parse_args(argv)
    if bool(args.val_img_dir) != bool(args.val_mask_dir):
        raise BadInput("--val-img-dir and --val-mask-dir", "belong together", "name both")
    folders = (args.images, args.masks, args.val_img_dir, args.val_mask_dir)
    place = Path(args.sheet).resolve().parent
    if place in {Path(folder).resolve() for folder in folders if folder}:
        raise BadInput(args.sheet, "lies among the photos", "name another --sheet")
    check_output(place, "--sheet")

    classes = class_names(args.classes)
    labels = images.Labels(len(classes), tuple(args.mask_value), args.ignore)
    train_pairs, unpaired = pair_up(args.images, args.masks, args.mask_suffix)
    val_pairs = []
    if args.val_img_dir:
        val_pairs, more = pair_up(args.val_img_dir, args.val_mask_dir, args.mask_suffix)
        unpaired += more
    else:
        try:
            train_pairs, val_pairs = split_by_car(train_pairs, group=args.group)
        except BadInput as problem:
            unpaired.append(problem)

    pick_device("cpu")  # masks at full size come and go: half the time without page faults
    pairs = train_pairs + val_pairs
    measures = list(for_all(lambda pair: measure(pair, labels), pairs, "checking"))
    usable = {m.pair.photo: m for m in measures if not m.problem}
    sides = {"training": measures[: len(train_pairs)], "validation": measures[len(train_pairs) :]}
    summaries = {side: summarize(some, classes, args.group) for side, some in sides.items()}
    found = find_errors(unpaired, measures, labels) | find_copies(sides.values(), args.group)
    found["missing"] = find_missing(summaries, classes)
    if not found["values"]:  # else the masks were read as what they are not
        found |= find_odd_masks(usable.values(), labels)
    if not (args.val_img_dir or args.group):  # as train.py does
        names = ([m.pair.name for m in some] for some in sides.values())
        found["neighbours"] = dict.fromkeys(advice.neighbours(*names), "")
    findings = {kind: found[kind] for kind in FINDINGS if found.get(kind)}
    code = max((EXIT_CODES[FINDINGS[kind][0]] for kind in findings), default=0)
    if args.json:
        found = {k: {"severity": FINDINGS[k][0], "files": files} for k, files in findings.items()}
        print(json.dumps(summaries | {"findings": found, "exit code": code}, indent=2))
    else:
        print_report(summaries, findings)
    if usable:
        save_picture(draw_sheet(findings, usable, labels), args.sheet)
        print(f"\ncontact sheet: {printable(args.sheet)}", file=sys.stderr if args.json else None)
    return code


if __name__ == "__main__":
    run_script(main)
