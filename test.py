"""Evaluate a checkpoint on photos with masks.

    python test.py                                     the run's own validation photos
    python test.py --image-dir DIR --mask-dir DIR      other photos
    python test.py --full-size --csv scores.csv        at the photos' own size, a row for each
    python test.py --tta                               mean over each photo and its mirror image

Network, size, normalization and threshold come from the checkpoint. Prints the two classic lines,
loss, IoU, the worst photos and, of the challenge's photos, a table by view; draws a histogram of
Dice and the best, the median and the worst photo into saved_images/.
"""

import csv
import io
import os
import time
from pathlib import Path
from statistics import mean

import torch
from torch.utils.data import Dataset

from checkpoints import BEST_CHECKPOINT, CHECKPOINT, build_model, find_checkpoint, load_checkpoint
from command_line import Parser, add_network_flags, run_script
from dataset import (
    VAL_FRACTION,
    CarvanaDataset,
    car_and_view,
    first_pass,
    get_eval_transform,
    make_loader,
    split_by_car,
)
from files import BadInput, check_output, find_pairs, printable, read_mask, shown, write_aside
from losses import LOSSES
from plots import save_histogram
from settings import FOLDERS
from utils import (
    draw_panel,
    logits_of,
    pick_device,
    report_accuracy,
    save_picture,
    score_loader,
    set_up,
)

ROOT = Path(__file__).resolve().parent

# Where a classic checkpoint, which does not say, has its validation photos.
CLASSIC_FOLDERS = {name: f"data/{folder}" for name, folder in FOLDERS.items()}
WORST = 10  # photos listed


def get_args_parser():
    parser = Parser(prog="test.py", description="Evaluate a checkpoint on photos with masks.")
    group = parser.add_argument_group("what")
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help=f"{BEST_CHECKPOINT}, or else {CHECKPOINT}, of --output-dir where none is named",
    )
    group.add_argument(
        "--image-dir", metavar="DIR", help="photos; without, the run's own validation photos"
    )
    group.add_argument("--mask-dir", metavar="DIR", help="their masks")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--full-size",
        action="store_true",
        help="score at the photos' own size, as the challenge does: logits are scaled up",
    )
    add_network_flags(group)
    group = parser.add_argument_group("results")
    group.add_argument("--csv", metavar="FILE", help="write one row a photo")
    group.add_argument(
        "--output-dir",
        metavar="DIR",
        default=ROOT,
        type=Path,
        help="where the run's files are and saved_images/ goes (default: the repository)",
    )
    return parser


def find_test_pairs(args, checkpoint, filename):
    """The pairs to score: those of the folders named, else the run's validation photos."""
    if bool(args.image_dir) != bool(args.mask_dir):
        raise BadInput("--image-dir and --mask-dir belong together: name both")
    if args.image_dir:
        return find_pairs(args.image_dir, args.mask_dir)

    folders = checkpoint.get("settings", CLASSIC_FOLDERS)
    try:
        train, train_masks, val, val_masks = (
            folders[name] and os.path.relpath(ROOT / folders[name]) for name in CLASSIC_FOLDERS
        )
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            f"{shown(filename)}: does not say which photos it was trained on: name --image-dir and "
            "--mask-dir"
        ) from None
    if val is not None and (os.path.isdir(val) or "settings" in checkpoint):
        return find_pairs(val, val_masks)
    return split_by_car(
        find_pairs(train, train_masks), checkpoint.get("val_fraction", VAL_FRACTION)
    )[1]


class FullSizeMasks(Dataset):
    """A dataset whose photos have the network's size and whose masks have their own."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, _ = self.dataset[index]
        mask = read_mask(self.dataset.pairs[index].mask)
        return image, torch.tensor(mask, dtype=torch.float32)[None]


def write_csv(path, names, scores):
    """One row a photo: its name and scores."""
    columns = ["loss", "accuracy", "dice", "iou"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["photo", *columns])
    writer.writerows(zip(names, *(scores[column].tolist() for column in columns), strict=True))
    with write_aside(path) as file:
        file.write(os.fsencode(text.getvalue()))


def print_views(names, dices):
    """A table of the challenge's 16 views of a car, the hardest first; nothing of other photos."""
    views = {}
    for name, dice in zip(names, dices.tolist(), strict=True):
        views.setdefault(car_and_view(name)[1], []).append(dice)
    views.pop(None, None)
    if views:
        print("by view, the hardest first:\n  view  photos  mean Dice  lowest")
    for view, dices in sorted(views.items(), key=lambda item: mean(item[1])):
        print(f"  {view:>4}  {len(dices):>6}  {mean(dices):9.5f}  {min(dices):.5f}")


def draw_extremes(dataset, model, order, checkpoint, device, tta, folder):
    """Panels of the best, the median and the worst photo; `order` sorts them from worst to best."""
    chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    for title, index in chosen.items():
        image, mask = dataset[index]
        with torch.inference_mode():
            logits = logits_of(model, image[None], device, tta)[0].cpu()
        panel = draw_panel(
            f"{title}: {dataset.names[index]}",
            image,
            mask,
            logits,
            checkpoint["threshold"],
            checkpoint["normalization"],
        )
        save_picture(panel, folder / f"test_{title}.png")


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    check_output(args.output_dir)
    if args.csv:
        check_output(Path(args.csv).absolute().parent, "--csv")
    candidates = [args.output_dir / name for name in (BEST_CHECKPOINT, CHECKPOINT)]
    filename = args.checkpoint or find_checkpoint(*candidates)
    checkpoint = load_checkpoint(filename)
    device = pick_device(args.device)
    set_up(device)
    model = build_model(checkpoint, filename, device)

    size = tuple(checkpoint["image_size"])
    channels = checkpoint["model"]["in_channels"]
    pairs = find_test_pairs(args, checkpoint, filename)
    first_pass(pairs, size, channels, cache=False)
    transform = get_eval_transform(*size, **checkpoint["normalization"])
    dataset = CarvanaDataset(None, None, transform, size=size, channels=channels, pairs=pairs)
    print(f"{shown(filename)}: {len(pairs)} photos at {size[0]}x{size[1]} on {device}")

    if args.full_size:  # masks of different sizes make no batch
        loader = make_loader(FullSizeMasks(dataset), batch_size=1)
    else:
        loader = make_loader(dataset, args.batch_size)
    start = time.perf_counter()
    settings = checkpoint.get("settings")
    own = settings.get("loss") if isinstance(settings, dict) else None
    loss_function = LOSSES[own if own in tuple(LOSSES) else "bce"]
    scores = score_loader(loader, model, device, checkpoint["threshold"], args.tta, loss_function)
    seconds = (time.perf_counter() - start) / len(pairs)
    means = report_accuracy(scores)
    spread = scores["dice"].std(correction=0)
    print(
        f"loss {means['loss']:.5f}, IoU {means['iou']:.5f}, standard deviation of Dice {spread:.5f}"
    )
    print(f"{seconds:.3f} s a photo, reading and scoring included")

    order = scores["dice"].argsort().tolist()
    print("worst photos:")
    for index in order[:WORST]:
        print(f"  {scores['dice'][index]:.5f}  {printable(dataset.names[index])}")
    print_views(dataset.names, scores["dice"])
    if args.csv:
        write_csv(args.csv, dataset.names, scores)
        print(f"a row for each photo: {args.csv}")
    folder = args.output_dir / "saved_images"
    save_histogram(scores["dice"].tolist(), folder / "test_histogram.png")
    draw_extremes(dataset, model, order, checkpoint, device, args.tta, folder)
    print(
        "histogram of Dice, panels of the worst, the median and the best photo: "
        f"{os.path.relpath(folder)}/test_*.png"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
