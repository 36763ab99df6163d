"""Train the U-Net: photos and masks in, a checkpoint, a table, curves and pictures out.

    python train.py                                  the constants below; without data, a drawn demo
    python train.py --data-dir DIR                   photos and masks in DIR/train_images, ...
    python train.py --load-model                     go on where the last run stopped
    python train.py --epochs 20 --batch-size 8 --lr 3e-4
    torchrun --nproc_per_node=8 train.py             on eight GPUs, BATCH_SIZE photos on each

Every constant below is also a flag; `python train.py --help` lists them.
"""

import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm import tqdm

from check_data import quick_findings
from checkpoints import BEST_CHECKPOINT, CHECKPOINT, MAX_AREA, load_checkpoint
from command_line import message_of, run_script
from data import prepare
from dataset import end_workers, get_loaders, make_loader
from distributed import (
    first_before_others,
    hide_progress,
    interleave,
    largest,
    process_group,
    rank,
    share_buffers,
    without_repeats,
    world_size,
)
from files import BadInput, check_output, cpu_count, nearby, printable, shown
from losses import LOSSES
from plots import Board
from run import Checkpoints, Run, move_aside
from settings import FOLDERS, choose_settings, plain, read_flags
from stopping import Stopped, StopRequest, exit_code
from utils import (
    amp_dtype,
    autocast,
    find_threshold,
    memory_format,
    pick_device,
    report_accuracy,
    save_predictions_as_imgs,
    score_loader,
)

ROOT = Path(__file__).resolve().parent  # paths in the constants below start here

TRAIN_IMG_DIR = "data/train_images"
TRAIN_MASK_DIR = "data/train_masks"
VAL_IMG_DIR = "data/val_images"  # if there is none, a tenth of the training cars is held out
VAL_MASK_DIR = "data/val_masks"
CACHE_DIR = None  # where decoded photos are kept; None: in .cache beside the photos' folder
CACHE = True  # False decodes every photo again every epoch
AUGMENT = "classic"  # or "flip", "strong": see augment.py

IMAGE_HEIGHT = 160  # 1280 originally
IMAGE_WIDTH = 240  # 1918 originally
IN_CHANNELS = 3  # 1: grey photos
FEATURES = (64, 128, 256, 512)  # channels of each level; (16, 32, 64, 128) is 16 times smaller

PRETRAINED = None  # a checkpoint whose weights to start from
LOSS = "bce"  # or "dice", "iou", "bce-dice": see losses.py
OPTIMIZER = "adam"  # or "adamw", "sgd"
LEARNING_RATE = 1e-4  # the highest, where SCHEDULER changes it
SCHEDULER = "none"  # or "step", "cosine", "onecycle": see optimizer.py
STEP_SIZE = 10  # for "step": epochs until the learning rate is multiplied by GAMMA
GAMMA = 0.1
BATCH_SIZE = 16
NUM_EPOCHS = 10
EMA = 0.0  # 0.998: what is evaluated and kept is a moving average of the weights over 500 steps
CLIP_GRAD = 0.0  # the norm to which longer gradients are shortened; 0: none is
THRESHOLD = 0.5  # a pixel is object above this probability; "auto": the best on validation
ACCUMULATE = 1  # batches whose gradients make one step: 2 with half the BATCH_SIZE is as good
CHECKPOINT_ACTIVATIONS = False  # True needs less memory and more time
SYNC_BATCHNORM = False  # under torchrun: statistics over all GPUs' photos, for small batches
COMPILE = False  # True for torch.compile: slow at the start, for long runs
SEED = 42

LOAD_MODEL = False  # True goes on with my_checkpoint.pth.tar
SAVE_EVERY = 20  # steps until it is saved within an epoch too, if that is quick; 0: it is not
OUTPUT_DIR = "."
TENSORBOARD = None  # a folder for TensorBoard's events; "": runs in the output folder
DEVICE = "auto"  # CUDA, else Apple's MPS, else the CPU
NUM_WORKERS = None  # None: one a core, at most 8, for a GPU; 0 on a CPU, which is busy as it is
PIN_MEMORY = True

# What differs for the demo set, so that a laptop without a GPU is through in minutes.
DEMO = {
    "train_img_dir": "data/demo/train_images",
    "train_mask_dir": "data/demo/train_masks",
    "val_img_dir": "data/demo/val_images",
    "val_mask_dir": "data/demo/val_masks",
    "image_height": 128,
    "image_width": 192,
    "features": (8, 16, 32, 64),
    "batch_size": 8,
    "learning_rate": 2e-3,
    "scheduler": "step",
    "step_size": 9,
    "num_epochs": 12,
}

PICTURES = 16  # validation photos that are drawn after each epoch


def starting_settings(defaults, given):
    """What a run without data flags takes instead of the constants: the demo's settings where there
    are no data, and no validation folder where that is not there."""
    if any(name in given for name in FOLDERS):
        return {}
    there = {name for name in FOLDERS if defaults[name] and (ROOT / defaults[name]).exists()}
    edited = any(defaults[name] != f"data/{FOLDERS[name]}" for name in FOLDERS)
    if there or edited:
        return {} if "val_img_dir" in there else {"val_img_dir": None, "val_mask_dir": None}
    folder = ROOT / "data" / "demo"
    if not folder.exists():
        print(f"No photos in {TRAIN_IMG_DIR}: drawing a demo set into {shown(folder)}", flush=True)
        try:
            prepare.make_demo(folder)
        except OSError as error:
            raise BadInput(
                f"{shown(folder)}: cannot be drawn ({error.strerror}): free some space, or name "
                "photos of your own with --data-dir"
            ) from None
    own = ", ".join(f"{name} {value}" for name, value in DEMO.items() if name not in FOLDERS)
    print(f"Training on the demo set in {shown(folder)} with its own settings: {own}")
    return {name: plain(value) for name, value in DEMO.items()}


# Training -----------------------------------------------------------------------------------------


def train_one_epoch(run, loader, device, description="", between_steps=None):
    """What is left of a pass over the photos: (mean loss a photo, photos a second), of all of it.

    The gradients of `--accumulate` batches make one step of the optimizer. After each step, on a
    GPU each 20, `between_steps(last)` may save the run, or raise to end it.

    Raises FloatingPointError once the loss is no longer a number, naming the first such batch.
    """
    run.trained_model.train()
    run.optimizer.zero_grad(set_to_none=True)
    loss_function, accumulate = LOSSES[run.settings.loss], run.settings.accumulate
    photos = len(loader.dataset)
    part = run.start_of_epoch(photos)
    run.part = part if part["step"] else None
    loader.sampler.set_epoch(run.epoch + 1, part["seen"])
    left, batch_size = photos - part["seen"], loader.batch_size * world_size()
    loss_sum = part["loss_sum"].to(device)
    bad_step = torch.zeros((), dtype=torch.int64, device=device)  # the first; 0: none
    look_every = 1 if device.type == "cpu" else 20  # a look at a GPU's numbers makes it wait
    start = time.perf_counter()

    progress = tqdm(
        loader, description, unit="step", disable=hide_progress(), leave=False, initial=part["step"]
    )
    with progress:
        for step, (images, masks) in enumerate(progress, start=1):
            run.part = None  # until the step is whole
            own, share = len(images), 1  # photos that count, and what their mean loss counts
            if step == len(loader) and world_size() > 1:
                images, masks, own, share = without_repeats(images, masks, left, loader.batch_size)
            images = images.to(device, non_blocking=True, memory_format=memory_format(device))
            masks = masks.to(device, non_blocking=True)
            with autocast(device):
                logits = run.trained_model(images)  # (N, 1, H, W)
            loss = loss_function(logits, masks).mean()

            first = (step - 1) // accumulate * accumulate  # batches before this step's
            run.scaler.scale(share * loss / min(accumulate, len(loader) - first)).backward()
            loss = loss.detach()
            loss_sum = loss_sum + loss * own
            number = part["step"] + step
            bad_step = torch.where((bad_step == 0) & ~loss.isfinite(), number, bad_step)
            if step < first + accumulate and step < len(loader):
                continue

            run.step(run.epoch + (part["seen"] + first * batch_size) / photos)
            done, seconds = min(step * batch_size, left), time.perf_counter() - start
            run.part = run.part_of_epoch(
                number, part["seen"] + done, photos, loss_sum, part["seconds"] + seconds
            )
            if step // accumulate % look_every == 0 or step == len(loader):
                if bad_step:
                    raise FloatingPointError(f"the loss is {loss.item()} since step {bad_step}")
                progress.set_postfix_str(f"loss {loss.item():.4f}, {done / seconds:.1f} photos/s")
                if between_steps:
                    between_steps(last=step == len(loader))

    run.gather_part()
    return run.part["loss_sum"].sum().item() / photos, photos / run.part["seconds"]


def train(run, train_loader, val_loader, device, checkpoints, board=None):
    """Train the epochs that are left; after each, write checkpoints, metrics.csv and pictures.

    Raises Stopped after a signal. However it ends, all that was trained is saved where that can be.
    """
    pictures_loader = some_of(val_loader, run.settings)
    with StopRequest() as stop:

        def between_steps(last):
            due = rank() == 0 and checkpoints.due(last)
            wish = largest(max(stop.number, int(due)), device)
            if wish:
                run.gather_part()
            if wish == 1 and rank() == 0:
                checkpoints.save(CHECKPOINT)
            if wish > 1:
                raise Stopped(wish)

        try:
            while run.epoch < run.settings.num_epochs:
                title = f"epoch {run.epoch + 1}/{run.settings.num_epochs}"
                loss, speed = train_one_epoch(run, train_loader, device, title, between_steps)
                trained = time.perf_counter()
                with stop.at_once():
                    scores = validate(run, val_loader, device)
                row = {"epoch": run.epoch + 1, "train_loss": loss, "val_loss": scores.pop("loss")}
                row |= scores | {"learning_rate": run.learning_rate}
                seconds = run.part["seconds"] + time.perf_counter() - trained
                row |= {"seconds": seconds, "photos_per_second": speed, "threshold": run.threshold}
                better = run.best is None or row["dice"] > run.best["dice"]
                run.end_epoch(row)
                if rank() == 0:
                    # The best before the latest: a kill between them repeats what was not saved
                    # of the epoch, and loses nothing.
                    checkpoints.save(*([BEST_CHECKPOINT] if better else []), CHECKPOINT)
                    run.save_history(checkpoints.output)
                print(
                    f"{title}: loss {loss:.4f}, validation loss {row['val_loss']:.4f}, "
                    f"IoU {row['iou']:.4f}, {speed:.1f} photos/s, {seconds:.0f} s",
                    flush=True,
                )
                if rank() == 0:
                    draw(run, pictures_loader, device, checkpoints.output, board)
        except FloatingPointError:
            raise
        except BaseException:
            checkpoints.save_unfinished()
            raise
        finally:
            end_workers(train_loader, val_loader)


def validate(run, loader, device):
    """The validation photos' scores, printed, of the weights as they are after an epoch.

    Raises FloatingPointError where they are no numbers.
    """
    model, settings = run.evaluated_model, run.settings
    share_buffers(run.model)
    if run.averaged:
        share_buffers(model)
    if settings.threshold == "auto":
        run.threshold = find_threshold(loader, model, device)
    # Each process scores a part of the photos.
    scores = score_loader(loader, model, device, run.threshold, loss_function=LOSSES[settings.loss])
    scores = report_accuracy(interleave(scores))
    if not math.isfinite(scores["loss"]):
        raise FloatingPointError(f"the validation loss is {scores['loss']}")
    return scores


def draw(run, loader, device, output, board):
    """The pictures of the epoch that has just ended."""
    folder = output / "saved_images"
    panels = save_predictions_as_imgs(loader, run.evaluated_model, folder, device, run.threshold)
    if board:
        board.add(run.history[-1], panels, last=run.epoch == run.settings.num_epochs)


def some_of(loader, settings):
    """A loader of PICTURES of its photos, evenly spaced, so that they show different cars."""
    count = len(loader.dataset)
    indices = np.unique(np.linspace(0, count - 1, min(PICTURES, count)).astype(int)).tolist()
    return make_loader(Subset(loader.dataset, indices), settings.batch_size)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    constants = {name: value for name, value in globals().items() if name.isupper()}
    defaults, given = read_flags(constants, argv)
    device = pick_device(given.get("device", defaults["device"]))
    with process_group(device) as device:
        return train_as_told(argv, defaults, given, device)


def train_as_told(argv, defaults, given, device):
    """From flags to the last line printed; returns the exit code."""
    started = time.perf_counter()
    output = ROOT / given.get("output_dir", defaults["output_dir"])
    latest, checkpoint = output / CHECKPOINT, None
    if given.get("load_model", defaults["load_model"]):
        if latest.exists():
            checkpoint = load_checkpoint(latest)
        else:
            print(f"{shown(latest)}: no checkpoint to go on with, so this run starts afresh")
    known = checkpoint is not None and "settings" in checkpoint
    with first_before_others():  # it may have to draw the demo
        start = {} if known else starting_settings(defaults, given)
    weights, pretrained = given.get("pretrained", defaults["pretrained"]), None
    if weights and checkpoint is None:
        weights = nearby(ROOT / weights)
        pretrained = load_checkpoint(weights)
        print(
            f"Starting from the weights in {shown(weights)}, with their network and size of photos"
        )
    elif given.pop("pretrained", None):
        print(f"--pretrained: not needed, since the run goes on from {shown(latest)}")
    settings = choose_settings(defaults, start, given, checkpoint, pretrained, latest)

    check_output(output)
    check_size(settings)
    run = Run(settings, device)
    if pretrained is not None:
        run.start_from(pretrained, weights)
    if checkpoint is not None:
        run.restore(checkpoint, latest)
        if run.history and rank() == 0:  # a kill may have come between the checkpoint and these
            run.save_history(output)
        if run.epoch >= settings.num_epochs:
            print(
                f"{shown(latest)} has been trained for {run.epoch} epochs on "
                f"{printable(settings.train_img_dir)}, and --epochs is {settings.num_epochs}: "
                f"nothing is left to do; --load-model --epochs {2 * run.epoch} would go on"
            )
            return 0
    board = None
    if settings.tensorboard is not None and rank() == 0:
        folder = ROOT / settings.tensorboard if settings.tensorboard else output / "runs"
        check_output(folder, "--tensorboard")
        board = Board(folder)
    with first_before_others():  # it decodes the photos for all
        train_loader, val_loader = load_data(settings, device)
    run.set_photos(train_loader.dataset.names)
    for warning in quick_findings(train_loader.dataset.pairs, val_loader.dataset.pairs):
        print(f"Warning: {warning}")
    print_settings(run, train_loader, val_loader, device)
    move_others_aside(run, checkpoint, output)

    checkpoints = Checkpoints(run, output, defaults)
    try:
        train(run, train_loader, val_loader, device, checkpoints, board)
    except FloatingPointError as error:
        raise BadInput(
            f"epoch {run.epoch + 1}: {error}: try --lr {settings.learning_rate / 10:g}; "
            f"{checkpoints}"
        ) from None
    except BrokenPipeError:
        raise
    except (BadInput, MemoryError, OSError, RuntimeError) as problem:
        if rank() > 0 and "onnection closed" in str(problem):
            sys.exit(1)  # the first process has ended, and said why
        after = f"{checkpoints}; {go_on(argv, checkpoints)}"
        raise BadInput(f"{message_of(problem)}; {after}") from None
    except KeyboardInterrupt as stop:
        if rank() == 0:
            print(f"Stopped; {checkpoints}\n{go_on(argv, checkpoints)}", file=sys.stderr)
        return exit_code(stop)
    print_summary(run, output, time.perf_counter() - started)
    return 0


def go_on(argv, checkpoints):
    """The command that goes on with a run that was stopped."""
    again = list(argv)
    if checkpoints.saved and "--load-model" not in again:
        again.append("--load-model")
    start = ["torchrun", f"--nproc_per_node={world_size()}"] if world_size() > 1 else ["python"]
    return f"to go on: {shlex.join([*start, nearby(ROOT / 'train.py'), *again])}"


def move_others_aside(run, checkpoint, output):
    """Rename what lies in the output folder and is not this run's, or not its photos'."""
    settings = run.settings
    names = ()
    if checkpoint is None:
        names = (CHECKPOINT, BEST_CHECKPOINT, "metrics.csv")
    elif run.place is None:  # a classic checkpoint; whatever lies beside it is of another run
        names = (BEST_CHECKPOINT, "metrics.csv")
    elif any(
        real_path(checkpoint.get("settings", {}).get(name)) != real_path(getattr(settings, name))
        for name in FOLDERS
    ):
        print("Other photos than the checkpoint's: the best score starts anew")
        names = (BEST_CHECKPOINT,)
        run.best_since = run.epoch + 1
    if names and rank() == 0:
        move_aside(output, names)


def real_path(path):
    """A folder of the settings, whichever way it is written; None of none."""
    return path and os.path.realpath(ROOT / path)


def print_summary(run, output, seconds):
    """Where everything is, once all epochs are trained."""
    pictures = output / "saved_images"
    evaluate = f"python {shown(ROOT / 'test.py')}"
    if output.resolve() != ROOT:
        evaluate += f" --output-dir {shlex.quote(nearby(output))}"
    minutes, seconds = divmod(round(seconds), 60)
    print(
        f"Done in {minutes} min {seconds} s: best Dice {run.best['dice']:.5f} after epoch "
        f"{run.best['epoch']}\n"
        f"  checkpoints  {shown(output / BEST_CHECKPOINT)} (best), "
        f"{shown(output / CHECKPOINT)} (latest)\n"
        f"  pictures     {shown(pictures)}\n"
        f"  curves       {shown(pictures / 'training_curves.png')}, "
        f"numbers in {shown(output / 'metrics.csv')}\n"
        f"  evaluate     {evaluate}"
    )


def check_size(settings):
    """Raises BadInput where the network's levels would leave nothing of a photo."""
    levels = len(settings.features)
    smallest = 2 ** (levels + 1)  # leaves 2x2 pixels at the bottom, which BatchNorm needs
    if min(settings.image_height, settings.image_width) < smallest:
        raise BadInput(
            f"--image-height {settings.image_height} --image-width {settings.image_width}: "
            f"the {levels} levels of --features halve a photo as often, so both must be at least "
            f"{smallest}"
        )
    if settings.image_height * settings.image_width > MAX_AREA:
        raise BadInput(
            f"--image-height {settings.image_height} --image-width {settings.image_width}: more "
            f"than {MAX_AREA} pixels: name smaller ones"
        )


def pick_workers(settings, device):
    """How many processes load data."""
    if settings.num_workers is not None:
        return settings.num_workers
    return min(8, cpu_count()) if device.type == "cuda" else 0


def load_data(settings, device):
    """The two loaders that the settings describe."""
    folders = [getattr(settings, name) for name in FOLDERS]
    return get_loaders(
        *(folder and nearby(ROOT / folder) for folder in folders),
        settings.batch_size,
        num_workers=pick_workers(settings, device),
        pin_memory=settings.pin_memory,
        size=(settings.image_height, settings.image_width),
        channels=settings.in_channels,
        seed=settings.seed,
        cache=settings.cache,
        cache_dir=settings.cache_dir and ROOT / settings.cache_dir,
        augment=settings.augment,
    )


def print_settings(run, train_loader, val_loader, device):
    """What is about to happen, in a few lines."""
    settings = run.settings
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[amp_dtype(device)]
    print(
        f"Photos: {len(train_loader.dataset)} for training, {len(val_loader.dataset)} for "
        f"validation, at {settings.image_height}x{settings.image_width}, from "
        f"{printable(settings.train_img_dir)}\n"
        f"Network: features {' '.join(map(str, settings.features))}, {parameters:,} parameters, "
        f"on {device} in {precision}\n"
        f"Epochs {run.epoch + 1} to {settings.num_epochs}, batches of {settings.batch_size}, "
        f"{settings.loss} by {settings.optimizer}, learning rate {settings.learning_rate:g} "
        f"({settings.scheduler}), augmentation {settings.augment}, seed {settings.seed}",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main)
