"""Evaluate a checkpoint on photos with masks.

    python test.py                                     the run's own validation photos
    python test.py --image-dir DIR --mask-dir DIR      other photos
    python test.py --full-size --csv scores.csv        at the photos' own size, one row per photo
    python test.py --tta                               mean over each photo and its mirror image

Network, size, normalization, loss and threshold come from the checkpoint.
"""

import support.startup  # noqa: F401  first, since importing torch takes seconds

# isort: split

import math
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from torch.utils.data import default_collate

import utils
from dataset import CarvanaDataset, get_eval_transform, split_by_car, to_channels
from support import checkpoint_files
from support.cache import Cache
from support.command_line import (
    Parser,
    add_network_flags,
    arguments,
    run_script,
    whole_number,
)
from support.errors import BadInput, display_path, printable
from support.masks import read_mask
from support.pairs import find_pairs, for_all
from support.plots import save_csv, save_histogram
from support.writing import check_output, save_picture
from utils import BEST_CHECKPOINT, CHECKPOINT

ROOT = Path(__file__).resolve().parent
N_WORST = 10  # photos listed
COLUMNS = ("loss", "accuracy", "dice", "iou")  # of the CSV file, beside the photo's name


def get_args_parser():
    """The flags of test.py."""
    parser = Parser(prog="test.py", description="Evaluate a checkpoint on photos with masks.")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="default: the best, else the latest, of --output-dir")
    add("--image-dir", metavar="DIR", help="photos (default: the run's own validation photos)")
    add("--mask-dir", metavar="DIR", help="their masks")
    add("--mask-suffix", metavar="SUFFIX", help="suffix of mask names (default: as in training)")
    value = whole_number(0, 65535)
    add("--mask-value", nargs="+", type=value, metavar="N", help="as in training")
    add("--ignore", type=value, metavar="N", help="as in training")
    add("--full-size", action="store_true", help="score at the photos' own size, scaled up")
    add("--csv", metavar="FILE", help="write one row per photo")
    output = "of the run, and of saved_images/ (default: the repository)"
    add("--output-dir", metavar="DIR", default=ROOT, type=Path, help=output)
    add_network_flags(parser)
    return parser


# The photos ---------------------------------------------------------------------------------------


class FullSizeMasks(CarvanaDataset):
    """Photos at the network's size, masks at the photos' own size."""

    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        mask = read_mask(self.pairs[index].mask, None, self.labels)
        return image, to_channels(np.array(mask), self.labels)


def find_test_pairs(args, checkpoint, settings):
    """(folder, its pairs, those to score): without --image-dir, the run's validation photos.

    settings: the checkpoint's DataSettings. Raises BadInput.
    """
    if bool(args.image_dir) != bool(args.mask_dir):
        raise BadInput("--image-dir and --mask-dir", "belong together", "name both")
    suffix = args.mask_suffix or settings.mask_suffix
    train_images, train_masks, val_images, val_masks = settings.folders(ROOT)
    if args.image_dir or val_images:
        folder = args.image_dir or val_images
        pairs = find_pairs(folder, args.mask_dir or val_masks, suffix)
        return folder, pairs, pairs
    all_pairs = find_pairs(train_images, train_masks, suffix)
    _, held_out = split_by_car(all_pairs, checkpoint["val_fraction"], settings.group)
    return train_images, all_pairs, held_out


def make_dataset(args, checkpoint, filename):
    """The data set of the photos to score, as the checkpoint's network takes them."""
    settings = checkpoint_files.data_settings(checkpoint, filename)
    folder, all_pairs, pairs = find_test_pairs(args, checkpoint, settings)
    labels = settings.labels(len(checkpoint["classes"]))
    if args.mask_value:
        labels = replace(labels, values=tuple(args.mask_value))
    if args.ignore is not None:
        labels = replace(labels, ignore=args.ignore)
    size = None if checkpoint["crop"] else checkpoint["image_size"]
    channels = checkpoint["model"]["in_channels"]
    cache = Cache(all_pairs, size, channels, folder, labels=labels)
    kind = FullSizeMasks if args.full_size else CarvanaDataset
    return kind(
        None,
        None,
        transform=get_eval_transform(*(size or (None, None)), **checkpoint["normalization"]),
        size=size,
        channels=channels,
        pairs=pairs,
        cache=cache if cache.exists else None,  # from training
        labels=labels,
    )


def batches_of(dataset, batch_size):
    """Yield batches of a data set, read on all cores ahead of the network."""
    items = for_all(dataset.__getitem__, range(len(dataset)), "scoring")
    while batch := list(islice(items, batch_size)):
        yield default_collate(batch)


# The report ---------------------------------------------------------------------------------------


def print_report(scores, names, classes, device):
    """Print the scores that score_loader gave for photos of these names; the worst are listed."""
    means = utils.report_accuracy(scores, device, classes)
    spread = scores["dice"][scores["pixels"] > 0].std(correction=0)
    print(f"loss {means['loss']:.5f}, IoU {means['iou']:.5f}, spread of Dice {spread:.5f}")
    print(f"marking everything as one class: Dice {means['constant']:.5f}")
    for name in classes if len(classes) > 1 else ():
        dice, iou = (means.get(f"{what} {name}", math.nan) for what in ("dice", "iou"))
        print(f"  {printable(name):20} Dice {dice:.5f}  IoU {iou:.5f}")
    print("worst photos:")
    for index in scored_photos(scores)[:N_WORST]:
        print(f"  {scores['dice'][index]:.5f}  {printable(names[index])}")


def scored_photos(scores):
    """The indices of photos with pixels that count, from the lowest to the highest Dice."""
    return [i for i in scores["dice"].argsort().tolist() if scores["pixels"][i] > 0]


def write_scores(scores, names, path):
    """Write one row per photo as a CSV file."""
    columns = {"photo": names} | {name: scores[name].tolist() for name in COLUMNS}
    rows = zip(*columns.values(), strict=True)
    save_csv([dict(zip(columns, row, strict=True)) for row in rows], path)


def draw_photo(title, dataset, index, model, checkpoint, tta):
    """The panel of one photo, a PIL image, at the network's size."""
    image, mask = CarvanaDataset.__getitem__(dataset, index)
    device = next(model.parameters()).device
    logits = utils.logits_of(model, image[None], device, tta)[0].cpu()
    caption = f"{title}: {dataset.names[index]}"
    threshold, normalization = checkpoint["threshold"], checkpoint["normalization"]
    return utils.panel_of(caption, image, mask, logits, threshold, normalization)


def main(argv=None):
    """Evaluate as the flags in argv say; returns the exit code."""
    args = get_args_parser().parse_args(arguments(argv))
    check_output(args.output_dir)
    if args.csv:
        check_output(Path(args.csv).absolute().parent, "--csv")
    candidates = [args.output_dir / name for name in (BEST_CHECKPOINT, CHECKPOINT)]
    filename = args.checkpoint or checkpoint_files.find_checkpoint(*candidates)
    checkpoint = utils.load_checkpoint(filename)
    device = utils.pick_device(args.device)
    model = utils.for_whole_photos(utils.build_model(checkpoint, device), checkpoint["crop"])
    dataset = make_dataset(args, checkpoint, filename)
    height, width = checkpoint["image_size"]
    how = f"{'in tiles of' if checkpoint['crop'] else 'at'} {height}x{width} on {device}"
    print(f"{display_path(filename)}: {len(dataset)} photos {how}", flush=True)

    started = time.perf_counter()
    # Photos or masks at full size may be of different sizes, which make no batch.
    batch_size = 1 if args.full_size or checkpoint["crop"] else args.batch_size
    scores = utils.score_loader(
        batches_of(dataset, batch_size),
        model,
        device,
        checkpoint["threshold"],
        args.tta,
        utils.saved_loss(checkpoint, device),
        len(checkpoint["classes"]),
    )
    seconds = (time.perf_counter() - started) / len(dataset)
    print_report(scores, dataset.names, checkpoint["classes"], device)
    print(f"{seconds:.3f} s per photo, reading and scoring included")

    if args.csv:
        write_scores(scores, dataset.names, args.csv)
    pictures = args.output_dir / "saved_images"
    if order := scored_photos(scores):
        save_histogram(scores["dice"][order].tolist(), pictures / "test_histogram.png")
        chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
        for title, index in chosen.items():
            panel = draw_photo(title, dataset, index, model, checkpoint, args.tta)
            save_picture(panel, pictures / f"test_{title}.png")
        print(
            f"histogram of Dice, worst, median and best photo: {display_path(pictures)}/test_*.png"
        )
    return 0


if __name__ == "__main__":
    run_script(main)
