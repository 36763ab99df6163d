"""Evaluate a checkpoint on photos with masks.

    python test.py                                     the run's own validation photos
    python test.py --image-dir DIR --mask-dir DIR      other photos
    python test.py --full-size --csv scores.csv        at the photos' own size, a row for each
    python test.py --tta                               mean over each photo and its mirror image

Network, size, normalization and threshold come from the checkpoint.
"""

import math
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import utils
from dataset import VAL_FRACTION, get_eval_transform, split_by_car, to_channels
from support import checkpoints
from support.cache import Cache
from support.command_line import Parser, add_network_flags, run_script, whole_number
from support.errors import BadInput, display_path, printable, short_path
from support.images import read_mask, read_photo
from support.pairs import find_pairs, for_all
from support.plots import save_csv, save_figure
from support.settings import FOLDERS
from support.writing import check_output, save_picture
from utils import BEST_CHECKPOINT, CHECKPOINT, LOSSES

ROOT = Path(__file__).resolve().parent
WORST = 10  # photos listed
COLUMNS = ("loss", "accuracy", "dice", "iou")  # of the CSV file, beside the photo's name


def get_args_parser():
    """The flags of test.py."""
    parser = Parser(prog="test.py", description="Evaluate a checkpoint on photos with masks.")
    add, output = parser.add_argument, "of the run, and of saved_images/ (default: the repository)"
    add("--checkpoint", metavar="FILE", help="default: the best, else the latest, of --output-dir")
    add("--image-dir", metavar="DIR", help="photos (default: the run's own for validation)")
    add("--mask-dir", metavar="DIR", help="their masks")
    number = {"type": whole_number(0, 65535), "metavar": "N", "help": "as in training"}
    add("--mask-suffix", help="how their names end, or PHOTO=MASK (default: as in training)")
    add("--mask-value", nargs="+", **number)
    add("--ignore", **number)
    add("--full-size", action="store_true", help="score at the photos' own size, scaled up")
    add("--csv", metavar="FILE", help="write one row a photo")
    add("--output-dir", metavar="DIR", default=ROOT, type=Path, help=output)
    add_network_flags(parser)
    return parser


def find_test_pairs(args, checkpoint):
    """(folder, its pairs, those to score): without --image-dir, the run's validation photos."""
    if bool(args.image_dir) != bool(args.mask_dir):
        raise BadInput("--image-dir and --mask-dir", "belong together", "name both")
    folders = settings = checkpoint.get("settings", {})
    suffix = args.mask_suffix or settings.get("mask_suffix")
    if not folders:  # a classic checkpoint does not say
        folders = {name: f"data/{folder}" for name, folder in FOLDERS.items()}
        folders["val_img_dir"] = (ROOT / folders["val_img_dir"]).is_dir() and "data/val_images"
    train, train_masks, val, val_masks = (
        folders.get(name) and short_path(ROOT / str(folders[name])) for name in FOLDERS
    )
    if folder := args.image_dir or val:
        pairs = find_pairs(folder, args.mask_dir or val_masks, suffix)
        return folder, pairs, pairs
    pairs = find_pairs(train, train_masks, suffix)
    fraction = checkpoint.get("val_fraction", VAL_FRACTION)
    return train, pairs, split_by_car(pairs, fraction, settings.get("group"))[1]


def save_histogram(dices, path):
    """How many photos have which Dice."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(dices, bins=40)
    mean = f"{len(dices)} photos, mean Dice {np.mean(dices):.5f}"
    axes.set(title=mean, xlabel="Dice", ylabel="photos")
    save_figure(figure, path)


def main(argv=None):
    """Evaluate as the flags in argv say; returns the exit code."""
    args = get_args_parser().parse_args(argv)
    check_output(args.output_dir)
    if args.csv:
        check_output(Path(args.csv).absolute().parent, "--csv")
    candidates = [args.output_dir / name for name in (BEST_CHECKPOINT, CHECKPOINT)]
    filename = args.checkpoint or checkpoints.find_checkpoint(*candidates)
    checkpoint = utils.load_checkpoint(filename)
    device = utils.pick_device(args.device)
    model = utils.build_model(checkpoint, device)
    size, channels = tuple(checkpoint["image_size"]), checkpoint["model"]["in_channels"]
    folder, all_pairs, pairs = find_test_pairs(args, checkpoint)
    seen = f"{'in tiles of' if checkpoint['crop'] else 'at'} {size[0]}x{size[1]}"
    print(f"{display_path(filename)}: {len(pairs)} photos {seen} on {device}", flush=True)

    labels = checkpoints.labels_of(checkpoint)
    changes = {"values": args.mask_value and tuple(args.mask_value), "ignore": args.ignore}
    labels = replace(labels, **{k: v for k, v in changes.items() if v is not None})
    crop, size = checkpoint["crop"], None if checkpoint["crop"] else size
    cache = Cache(all_pairs, size, channels, folder, labels=labels)
    cached = cache.exists  # from training

    def read(pair, full_size=args.full_size):
        """(image (C, h, w), mask (K, H, W)), float32, the mask maybe at full size."""
        photo, mask = cache.read(pair) if cached else (None, None)
        if not cached:
            photo = read_photo(pair.photo, size, channels)
        if full_size or not cached:
            mask = read_mask(pair.mask, None if full_size else size, labels)
        transform = get_eval_transform(*photo.shape[:2], **checkpoint["normalization"])
        # Copied, since an array from the map is read-only.
        return transform(image=photo)["image"], to_channels(np.array(mask), labels)

    def batches():
        """Batches of read(): each photo is decoded once, on all cores, ahead of the network."""
        photos = for_all(read, pairs, "scoring")
        # Masks at full size may be of different sizes, which make no batch.
        while batch := list(islice(photos, 1 if args.full_size or crop else args.batch_size)):
            yield tuple(map(torch.stack, zip(*batch, strict=True)))

    start, threshold = time.perf_counter(), checkpoint["threshold"]
    loss = LOSSES.get(str(checkpoint.get("settings", {}).get("loss")), utils.bce)
    scores = utils.score_loader(batches(), model, device, threshold, args.tta, loss)
    seconds = (time.perf_counter() - start) / len(pairs)
    means = utils.report_accuracy(scores, device, classes := checkpoint["classes"])
    spread = scores["dice"].std(correction=0)
    print(f"loss {means['loss']:.5f}, IoU {means['iou']:.5f}, spread of Dice {spread:.5f}")
    print(f"marking everything as one class: Dice {means['constant']:.5f}")
    for name in classes if len(classes) > 1 else ():
        numbers = [means.get(f"{what} {name}", math.nan) for what in ("dice", "iou")]
        print("  {:20} Dice {:.5f}  IoU {:.5f}".format(printable(name), *numbers))
    print(f"{seconds:.3f} s a photo, reading and scoring included")
    names, order = [pair.name for pair in pairs], scores["dice"].argsort().tolist()
    print("worst photos:")
    for index in order[:WORST]:
        print(f"  {scores['dice'][index]:.5f}  {printable(names[index])}")
    if args.csv:
        columns = {"photo": names} | {name: scores[name].tolist() for name in COLUMNS}
        rows = zip(*columns.values(), strict=True)
        save_csv([dict(zip(columns, row, strict=True)) for row in rows], args.csv)
    pictures = args.output_dir / "saved_images"
    save_histogram(scores["dice"].tolist(), pictures / "test_histogram.png")
    chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    for title, index in chosen.items():
        image, mask = read(pairs[index], full_size=False)
        logits = utils.logits_of(model, image[None], device, args.tta)[0].cpu()
        photo = (f"{title}: {names[index]}", image, mask, logits)
        panel = utils.panel_of(*photo, threshold, checkpoint["normalization"])
        save_picture(panel, pictures / f"test_{title}.png")
    print(f"histogram of Dice, worst, median and best photo: {display_path(pictures)}/test_*.png")
    return 0


if __name__ == "__main__":
    run_script(main)
