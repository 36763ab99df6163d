"""Train the U-Net: photos and masks in, a checkpoint, a table, curves and pictures out.

    python train.py                                  the constants below; without data, a drawn demo
    python train.py --data-dir DIR                   photos and masks in DIR/train_images, ...
    python train.py --load-model                     go on where the last run stopped
    python train.py --epochs 20 --batch-size 8 --lr 3e-4
    torchrun --nproc_per_node=8 train.py             on eight GPUs, BATCH_SIZE photos on each

Every constant below is also a flag; `python train.py --help` lists them.
"""

import copy
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

import utils
from dataset import AUGMENTATIONS, VAL_FRACTION, get_loaders, make_loader
from model import UNet
from support import advice, checkpoints, distributed, plots
from support.cache import stable_hash
from support.command_line import message_of, run_script
from support.distributed import rank, world_size
from support.errors import BadInput, display_path, printable, short_path
from support.images import Labels
from support.muon import Muon
from support.pairs import cpu_count
from support.progress import ProgressBar
from support.scores import class_weights
from support.settings import FOLDERS, HELD_OUT, choose_settings, flag, get_args_parser, read_flags
from support.signals import Stopped, stop_request
from support.writing import check_output, move_aside
from utils import BEST_CHECKPOINT, CHECKPOINT, CLASSIC, LOSSES, SHIPPED

ROOT = Path(__file__).resolve().parent  # paths in the constants below start here

TRAIN_IMG_DIR = "data/train_images"
TRAIN_MASK_DIR = "data/train_masks"
VAL_IMG_DIR = "data/val_images"  # if there is none, a tenth of the training cars is held out
VAL_MASK_DIR = "data/val_masks"
MASK_SUFFIX = None  # how masks' names end, "_manual1", or "PHOTO=MASK"; None: "_mask" or nothing
CLASSES = ("object",)  # names of what masks show, values 1, 2, ... in them; or how many
MASK_VALUE = ()  # the value of each class where it is another; of one class, all that are its
IGNORE = None  # the value of pixels of which nobody knows what they are
GROUP = None  # regular expression; what its first group finds in names stays together, as cars do
CACHE = True  # False decodes every photo again every epoch
CACHE_DIR = None  # where decoded photos are kept; None: in .cache beside the photos' folder
NUM_WORKERS = None  # None: one a core, at most 8, for a GPU; 0 on a CPU, which is busy as it is
PIN_MEMORY = True
AUGMENT = "classic"  # or "flip", "strong": see AUGMENTATIONS in dataset.py

IMAGE_HEIGHT = 160  # 1280 originally
IMAGE_WIDTH = 240  # 1918 originally
CROP = 0  # pixels: train on squares of that side out of photos at their own size; 0: do not
IN_CHANNELS = 3  # 1: grey photos
FEATURES = (64, 128, 256, 512)  # channels of each level; (16, 32, 64, 128) is 16 times smaller
PRETRAINED = None  # a checkpoint whose weights to start from

NUM_EPOCHS = 10
BATCH_SIZE = 16
ACCUMULATE = 1  # batches whose gradients make one step: 2 with half the BATCH_SIZE is as good
LOSS = "bce"  # or "bce-dice": see LOSSES in utils.py
CLASS_WEIGHTS = ()  # "auto", or a number for each class: how often its pixels count in the loss
OPTIMIZER = "adam"  # or "muon"
LEARNING_RATE = 1e-4  # the highest, where SCHEDULER changes it
SCHEDULER = "none"  # or "step", "onecycle"
STEP_SIZE = 10  # for "step": epochs until the learning rate is multiplied by GAMMA
GAMMA = 0.1
CHECKPOINT_ACTIVATIONS = False  # True needs less memory and more time
SEED = 42
RECIPE = "classic"  # or "better", which replaces some of the constants above: see RECIPES

LOAD_MODEL = False  # True goes on with my_checkpoint.pth.tar
SAVE_EVERY = 20  # batches until it is saved within an epoch too, if saving is quick; 0: never
OUTPUT_DIR = "."
DEVICE = "auto"  # CUDA, else Apple's MPS, else the CPU

OPTIMIZERS = {"adam": partial(Adam, fused=True), "muon": Muon}
BETTER = {"augment": "flip", "optimizer": "muon", "learning_rate": 1e-2, "scheduler": "onecycle"}
RECIPES = {"classic": {}, "better": BETTER}  # settings worth choosing together
COLUMNS = "epoch train_loss val_loss accuracy dice iou learning_rate seconds photos_per_second"
SCORES = "constant loss accuracy dice iou"  # what check_accuracy gives beside each class's
LISTED = "size features batch_size loss optimizer learning_rate scheduler"
PASSED_ON = "size pin_memory seed cache augment mask_suffix labels group crop"  # to get_loaders
PICTURES = 16  # validation photos that are drawn after each epoch


@dataclass(frozen=True)
class Settings:
    """Every constant above as a flag of its name, and what it may be."""

    train_img_dir: str = flag(TRAIN_IMG_DIR, "training photos", group="data")
    train_mask_dir: str = flag(TRAIN_MASK_DIR, "their masks")
    val_img_dir: str | None = flag(VAL_IMG_DIR, "validation photos; without, cars are held out")
    val_mask_dir: str | None = flag(VAL_MASK_DIR, "their masks")
    mask_suffix: str | None = flag(MASK_SUFFIX, "how masks' names end, or PHOTO=MASK, with a *")
    classes: tuple[str, ...] = flag(CLASSES, "names of what masks show, or how many there are")
    mask_value: tuple[int, ...] = flag(
        MASK_VALUE, "their values, if not 1, 2, ...", least=0, most=65535
    )
    ignore: int | None = flag(IGNORE, "value of pixels that do not count", least=0, most=65535)
    group: str | None = flag(GROUP, "regular expression: what it finds stays on one side")
    cache: bool = flag(CACHE, "keep decoded photos on disk")
    cache_dir: str | None = flag(CACHE_DIR, "where: .cache beside the photos' folder", saved=False)
    num_workers: int | None = flag(NUM_WORKERS, "processes that load data", least=0, most=1024)
    pin_memory: bool = flag(PIN_MEMORY, "faster copies to CUDA")
    augment: str = flag(AUGMENT, "see AUGMENTATIONS in dataset.py", choices=tuple(AUGMENTATIONS))
    image_height: int = flag(IMAGE_HEIGHT, "photos are scaled to it", most=16384, group="network")
    image_width: int = flag(IMAGE_WIDTH, "photos are scaled to it", most=16384)
    crop: int = flag(CROP, "train on squares of so many pixels, unscaled", least=0, most=16384)
    in_channels: int = flag(IN_CHANNELS, "3 for RGB, 1 for grey", choices=(1, 3))
    features: tuple[int, ...] = flag(FEATURES, "channels of each level", most=8192)
    pretrained: str | None = flag(PRETRAINED, "weights to start from", const=SHIPPED, saved=False)
    num_epochs: int = flag(NUM_EPOCHS, "passes over the photos", "--epochs", group="training")
    batch_size: int = flag(BATCH_SIZE, "photos a batch, of each process", "--batchsize", most=65536)
    accumulate: int = flag(ACCUMULATE, "batches whose gradients make one step", most=65536)
    loss: str = flag(LOSS, "see LOSSES in utils.py", choices=tuple(LOSSES))
    class_weights: tuple[str, ...] = flag(CLASS_WEIGHTS, "how often pixels count, or auto")
    optimizer: str = flag(OPTIMIZER, "muon is for 3x3 convolutions", choices=tuple(OPTIMIZERS))
    learning_rate: float = flag(LEARNING_RATE, "the highest", "--lr")
    scheduler: str = flag(SCHEDULER, "of the learning rate", choices=("none", "step", "onecycle"))
    step_size: int = flag(STEP_SIZE, "epochs a step; means --scheduler step", "--stepsize")
    gamma: float = flag(GAMMA, "what a step multiplies the learning rate by; likewise")
    checkpoint_activations: bool = flag(CHECKPOINT_ACTIVATIONS, "less memory, more time")
    seed: int = flag(SEED, "of weights, order and augmentation", least=0, most=2**32 - 1)
    recipe: str = flag(RECIPE, "see RECIPES in train.py", choices=tuple(RECIPES), saved=False)
    load_model: bool = flag(LOAD_MODEL, "go on with the last run", saved=False, group="run")
    save_every: int = flag(SAVE_EVERY, "batches between saves; 0: only at an epoch's end", least=0)
    output_dir: str = flag(OUTPUT_DIR, "for checkpoints, metrics.csv and pictures", saved=False)
    device: str = flag(DEVICE, "cuda, mps or cpu", saved=False)

    @property
    def size(self):
        """(height, width) of what the network is trained on."""
        return (self.crop, self.crop) if self.crop else (self.image_height, self.image_width)

    @property
    def labels(self):
        """How the values in masks' files are read."""
        return Labels(len(self.classes), self.mask_value, self.ignore)


# What a run carries from step to step -------------------------------------------------------------


@dataclass
class Progress:
    """How far the epoch under way is: what resuming inside it needs beside the weights."""

    photos: int  # of the whole epoch
    order: int = 0  # a hash of what their order follows from
    step: int = 0  # batches trained
    seen: int = 0  # photos in them, of all processes
    loss_sum: float = 0.0  # of those photos
    seconds: float = 0.0  # that their training took


def learning_rate(settings, epochs):
    """The learning rate after so many epochs, a fraction counting part of one: a function of the
    progress alone, so that nothing of it has to be stored."""
    top, progress = settings.learning_rate, epochs / settings.num_epochs
    if settings.scheduler == "step":
        return top * settings.gamma ** (int(epochs) // settings.step_size)
    if settings.scheduler == "onecycle":  # PyTorch's OneCycleLR, without its change of momentum
        if progress < 0.3:
            low, share = top / 25, (1 - math.cos(math.pi * progress / 0.3)) / 2
        else:
            low, share = top / 25e4, (1 + math.cos(math.pi * (progress - 0.3) / 0.7)) / 2
        return low + (top - low) * share
    return top


class Run:
    """What a run carries from step to step; its checkpoint holds all of it."""

    def __init__(self, settings, device, output):
        torch.manual_seed(settings.seed)
        self.settings, self.device, self.output = settings, device, output
        shape = {"in_channels": settings.in_channels, "features": list(settings.features)}
        self.arguments = shape | {"out_channels": len(settings.classes)}
        self.model = UNet(**self.arguments, checkpoint_activations=settings.checkpoint_activations)
        self.model.to(device, memory_format=utils.memory_format(device))
        self.model.crop = settings.crop
        self.trained_model = self.model  # what training calls
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.trained_model = DistributedDataParallel(self.model, device_ids=ids)
        self.optimizer = OPTIMIZERS[settings.optimizer](self.model.parameters())
        half = utils.amp_dtype(device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.loss_function = LOSSES[settings.loss]
        self.threshold = CLASSIC["threshold"]
        self.history = []  # one row of metrics.csv an epoch
        self.constant = 0.0  # validation Dice of marking everything
        self.progress = Progress(0)
        self.saved_step, self.saved_at, self.saving_took = 0, time.perf_counter(), 0.0

    @property
    def epoch(self):
        """Epochs trained so far."""
        return len(self.history)

    @property
    def best(self):
        """The history's row with the best validation Dice, or None."""
        return max(self.history, key=lambda row: row["dice"], default=None)

    def step(self):
        """Take a step along the gradients gathered, at the learning rate of this moment."""
        epochs = self.epoch + self.progress.seen / self.progress.photos
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, epochs)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, number, what):
        """Raises BadInput for a loss, or weights, that training has made infinite or nan."""
        if not math.isfinite(number):
            where = f"after step {self.progress.step} of epoch {self.epoch + 1}"
            reason = f"{where} the {what} is {number}"
            raise BadInput(None, reason, f"try --lr {self.settings.learning_rate / 10:g}")

    def between_steps(self, stop, loss):
        """Save if it is time to. Raises Stopped if a signal has come, to any of the processes."""
        self.check(loss, "loss")
        due = 0 < self.settings.save_every <= self.progress.step - self.saved_step
        # Saving takes a twentieth of the time at most.
        due = due and time.perf_counter() - self.saved_at > 20 * self.saving_took
        # 0: go on; 1: save; above: the number of the signal that came
        wish = int(distributed.reduce([max(stop.number, due)], self.device, "MAX")[0])
        if wish > 1:
            raise Stopped(wish)
        if wish:
            self.save(CHECKPOINT)

    def save(self, *names):
        """Write the run as it is, each file whole or not at all; all processes take part."""
        start, settings, progress = time.perf_counter(), self.settings, self.progress
        progress.loss_sum = distributed.move_to_first(progress.loss_sum, self.device)
        kept = [field.name for field in fields(Settings) if field.metadata["saved"]]
        weights = self.model.state_dict()
        self.check(sum(tensor.sum().item() for tensor in weights.values()), "sum of the weights")
        state = {
            "state_dict": weights,
            "model": self.arguments,
            "image_size": list(settings.size),
            "crop": settings.crop or None,
            "classes": list(settings.classes),
            "normalization": CLASSIC["normalization"],
            "threshold": self.threshold,
            "val_fraction": VAL_FRACTION,
            "settings": {name: getattr(settings, name) for name in kept},
            # From here on, what only resuming needs.
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "epoch": self.epoch,
            "part": asdict(progress) if progress.step else None,
            "best_dice": self.best["dice"] if self.best else None,
            "history": self.history,
            "constants": asdict(Settings()),
        }
        for name in names if rank() == 0 else ():
            utils.save_checkpoint(state, self.output / name)
        self.saved_at, self.saved_step = time.perf_counter(), progress.step
        self.saving_took = (self.saved_at - start) / len(names)

    def restore(self, checkpoint, filename):
        """Take up where a checkpoint stopped; a classic one has only weights and Adam's moments.

        An optimizer of another kind than the checkpoint's starts anew. Raises BadInput.
        """
        try:
            # Older runs could average their weights; the moments belong to the raw ones.
            self.model.load_state_dict(checkpoint.get("raw_state_dict", checkpoint["state_dict"]))
            if checkpoint.get("settings", {}).get("optimizer", "adam") == self.settings.optimizer:
                checkpoints.load_optimizer(self.optimizer, checkpoint["optimizer"])
            if checkpoint.get("scaler"):  # empty from a run that needed none
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.threshold = checkpoint["threshold"]
            rows = checkpoint.get("history", [])
            self.history = checkpoints.check_history(rows, COLUMNS.split())
            if part := checkpoint.get("part"):
                self.progress = Progress(**checkpoints.check_progress(part))
                self.progress.loss_sum *= rank() == 0  # the first process has that of all
            torch.set_rng_state(checkpoint.get("rng", torch.get_rng_state()))
        except checkpoints.UNUSABLE as error:
            why = printable(" ".join(str(error).split())[:300])
            reason = f"its optimizer or history cannot be gone on with ({why})"
            raise BadInput(filename, reason, "leave --load-model out to start afresh") from None


# Training -----------------------------------------------------------------------------------------


def train_one_epoch(run, loader, stop):
    """Train what is left of an epoch: (mean loss a photo, photos a second), of all of it.

    The gradients of `--accumulate` batches make one step. Between steps, on a GPU each 20, the run
    may be saved. Raises Stopped after a signal, BadInput once the loss is no number.
    """
    settings, device, progress = run.settings, run.device, run.progress
    model, photos = run.trained_model.train(), len(loader.dataset)
    batch_size = settings.batch_size * world_size()
    look_every = 1 if device.type == "cpu" else 20  # a look at a GPU's numbers makes it wait
    # In float64, which MPS has not, sums of losses are the same in whatever order they are added.
    exact = torch.float32 if device.type == "mps" else torch.float64
    seen, loss_sum, start = progress.seen, progress.loss_sum, time.perf_counter() - progress.seconds
    loader.sampler.set_epoch(run.epoch + 1, start=seen)
    title = f"epoch {run.epoch + 1}/{settings.num_epochs}"
    first, last = progress.step + 1, progress.step + len(loader)
    with ProgressBar(loader, title, last, initial=progress.step, unit="step") as batches:
        for step, (images, masks) in enumerate(batches, start=first):
            count = min(batch_size, photos - seen)  # in this batch, of all processes
            images, masks, own = distributed.own_part(images, masks, count)
            images = images.to(device, non_blocking=True, memory_format=utils.memory_format(device))
            masks = masks.to(device, non_blocking=True)
            with utils.autocast(device):
                logits = model(images)  # (N, K, H, W)
            if settings.ignore is not None:
                logits, masks = utils.without_ignored(logits, masks)
            losses = run.loss_function(logits, masks)[:own]  # (N,)

            # The mean over the photos of one step; DistributedDataParallel's is over processes.
            together = min(settings.accumulate * batch_size, photos - progress.seen)
            run.scaler.scale(losses.sum() * (world_size() / together)).backward()
            loss_sum, seen = loss_sum + losses.detach().sum(dtype=exact), seen + count
            if seen < progress.seen + together:
                continue
            run.step()
            progress.step, progress.seen, progress.loss_sum = step, seen, loss_sum
            progress.seconds = time.perf_counter() - start
            if step // settings.accumulate % look_every == 0 or seen == photos:
                loss, speed = losses.mean(), seen / progress.seconds
                batches.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} photos/s", refresh=False)
                run.between_steps(stop, loss_sum.item())
                loss_sum = progress.loss_sum
    progress.loss_sum = distributed.move_to_first(loss_sum, device)
    return progress.loss_sum / photos, photos / progress.seconds


def train(run, train_loader, val_loader):
    """Train the epochs that are left; after each, write checkpoints, metrics.csv and pictures.

    Raises Stopped after a signal, once all that was trained is saved.
    """
    epochs = run.settings.num_epochs
    with stop_request() as stop:  # also around the last save
        try:
            while run.epoch < epochs:
                loss, speed = train_one_epoch(run, train_loader, stop)
                start, watched = time.perf_counter(), stop.watch(val_loader)
                rules = run.threshold, run.loss_function, run.settings.classes
                scores = utils.check_accuracy(watched, run.model, run.device, *rules)
                seconds = run.progress.seconds + time.perf_counter() - start
                run.check(scores["loss"], "validation loss")
                rate = run.optimizer.param_groups[0]["lr"]
                run.constant, *means = (scores.pop(name) for name in SCORES.split())
                values = [run.epoch + 1, loss, *means, rate, seconds, speed]
                row = dict(zip(COLUMNS.split(), values, strict=True)) | scores  # of each class
                better = run.best is None or row["dice"] > run.best["dice"]
                run.history.append(row)
                run.progress = Progress(run.progress.photos, run.progress.order)
                # The best first: a kill between them repeats part of the epoch and loses nothing.
                run.save(*([BEST_CHECKPOINT] if better else []), CHECKPOINT)
                line = f"epoch {run.epoch}/{epochs}: loss {loss:.4f}, validation loss "
                line += f"{row['val_loss']:.4f}, IoU {row['iou']:.4f}, {speed:.1f} photos/s"
                print(f"{line}, {seconds:.0f} s", flush=True)
                if rank() == 0:
                    draw(run, val_loader)
        except Stopped:
            run.save(CHECKPOINT)
            raise
        finally:
            train_loader.close()
            val_loader.close()


def draw(run, val_loader):
    """The table, the curves, and pictures of PICTURES photos, spaced to show different cars."""
    plots.save_history(run.history, run.best, run.output)
    some = copy.copy(val_loader.dataset)
    some.pairs = some.pairs[:: -(-len(some) // PICTURES)]
    loader, folder = make_loader(some, val_loader.batch_size), run.output / "saved_images"
    utils.save_predictions_as_imgs(loader, run.model, folder, run.device, run.threshold)


# From flags and a checkpoint to a run -------------------------------------------------------------


def find_photos(given):
    """Settings for photos that no flag names: those of the demo set where there are none yet."""
    there = [name for name in FOLDERS if (ROOT / (getattr(Settings, name) or "no")).exists()]
    if FOLDERS.keys() & given.keys() or "val_img_dir" in there:
        return {}
    if there or TRAIN_IMG_DIR != "data/train_images":
        return HELD_OUT
    from data.draw_demo import use_demo

    return use_demo(ROOT / "data" / "demo")


def prepare(given, parser, device):
    """The run that flags ask for and its loaders, or None where nothing is left to do."""
    output = ROOT / given.get("output_dir", OUTPUT_DIR)
    latest, checkpoint, source = output / CHECKPOINT, {}, given.get("pretrained", PRETRAINED)
    if given.get("load_model", LOAD_MODEL):
        if latest.exists():
            checkpoint, source = utils.load_checkpoint(latest), None
        else:
            print(f"{display_path(latest)}: no checkpoint to go on with, so this run starts afresh")
    pretrained = utils.load_checkpoint(short_path(ROOT / source)) if source else {}
    if source:
        print(f"Starting from {display_path(ROOT / source)}, with its network and size of photos")
    start = {}
    if "settings" not in checkpoint:
        with distributed.first_before_others():  # it may have to draw the demo
            start = find_photos(given)
        start = RECIPES.get(given.get("recipe", start.get("recipe", RECIPE)), {}) | start
    network = checkpoint or pretrained
    settings = choose_settings(Settings, parser, given, start, checkpoint, network)
    own = [f"{k} {v}" for k, v in start.items() if k not in FOLDERS and v == getattr(settings, k)]
    if own and "recipe" in start:  # which the demo's settings alone name
        print(f"Training on the demo set in data/demo with its own settings: {', '.join(own)}")
    least = 2 ** (len(settings.features) + 1)  # leaves 2x2 pixels at the bottom, for BatchNorm
    if min(settings.size) < least:
        reason = f"{len(settings.features)} levels of --features need at least {least}"
        raise BadInput("--image-height, --image-width, --crop", reason, "name larger ones")
    check_output(output)

    run = Run(settings, device, output)
    if pretrained:
        checkpoints.start_from(run.model, pretrained)
    if checkpoint:
        run.restore(checkpoint, latest)
    if run.history and rank() == 0:  # a kill may have come between the checkpoint and these
        plots.save_history(run.history, run.best, output)
    if run.epoch >= settings.num_epochs:
        done = (
            f"{display_path(latest)} has been trained for {run.epoch} epochs: nothing is left to do"
        )
        print(f"{done}; --load-model --epochs {2 * run.epoch} would go on")
        return None
    workers = min(8, cpu_count()) if device.type == "cuda" else 0
    folders = [getattr(settings, name) for name in FOLDERS]
    with distributed.first_before_others():  # it decodes the photos for all
        loaders = get_loaders(
            *(folder and short_path(ROOT / folder) for folder in folders),
            settings.batch_size,
            num_workers=workers if settings.num_workers is None else settings.num_workers,
            channels=settings.in_channels,
            cache_dir=settings.cache_dir and ROOT / settings.cache_dir,
            device=device,
            **{name: getattr(settings, name) for name in PASSED_ON.split()},
        )
    if settings.class_weights:
        weights = class_weights(settings, loaders[0].dataset).to(device)
        run.loss_function = partial(run.loss_function, weights=weights)
    photos, names = len(loaders[0].dataset), loaders[0].dataset.names
    order = stable_hash(f"{settings.seed} {names}")
    if run.progress.order != order:
        if run.progress.step:
            print("Other photos or another seed than the checkpoint's: its epoch begins anew")
        run.progress = Progress(photos, order)
    if rank() == 0 and not (run.history or run.progress.step):
        older = [] if checkpoint else [CHECKPOINT]  # a classic one is gone on with in its place
        move_aside(output, [*older, BEST_CHECKPOINT, "metrics.csv"])

    pairs = [loader.dataset.pairs for loader in loaders]
    for line in advice.at_start(settings, pretrained or checkpoint, *pairs):
        print(line)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    precision = str(utils.amp_dtype(device) or torch.float32).removeprefix("torch.")
    folder, held_out = printable(settings.train_img_dir), len(loaders[1].dataset)
    what = f"Crops of {settings.crop} pixels" if settings.crop else "Photos"
    print(f"{what}: {photos} for training, {held_out} for validation, from {folder}")
    print(f"Network: {parameters:,} parameters, on {device} in {precision}")
    listed = ", ".join(f"{name} {getattr(settings, name)}" for name in LISTED.split())
    print(f"Epochs {run.epoch + 1} to {settings.num_epochs}: {listed}", flush=True)
    return run, *loaders


def main(argv=None, again=None):
    """Train as the flags in argv say; returns the exit code. `again`: what else than this script
    and its flags to type to go on."""
    argv, started = sys.argv[1:] if argv is None else argv, time.perf_counter()
    parser = get_args_parser(Settings, "train.py")
    given = read_flags(parser, argv)
    device = utils.pick_device(given.get("device", DEVICE))
    with distributed.process_group(device) as device:
        parts = prepare(given, parser, device)
        if parts is None:
            return 0
        run = parts[0]
        flags = argv if "--load-model" in argv else [*argv, "--load-model"]
        again = again or [short_path(ROOT / "train.py"), *flags]
        program = f"torchrun --nproc_per_node={world_size()}" if world_size() > 1 else "python"
        go_on = f"to go on: {program} {shlex.join(again)}"
        try:
            train(*parts)
        except Stopped as stop:
            if rank() == 0:
                place = f"step {run.progress.step} of epoch {run.epoch + 1}"
                latest = display_path(run.output / CHECKPOINT)
                print(f"Stopped; {latest} holds the run up to {place}\n{go_on}", file=sys.stderr)
            return 128 + stop.args[0]
        except (BadInput, MemoryError, OSError, RuntimeError) as problem:
            if isinstance(problem, BrokenPipeError):
                raise
            raise BadInput(None, f"{message_of(problem)}; {go_on}") from None
        minutes, seconds = divmod(round(time.perf_counter() - started), 60)
        best = f"best Dice {run.best['dice']:.5f} after epoch {run.best['epoch']}"
        print(f"Done in {minutes} min {seconds} s: {best}")
        if run.best["dice"] <= run.constant:
            print(advice.nothing_learned(run.settings, run.constant))
        for name in (BEST_CHECKPOINT, CHECKPOINT, "metrics.csv", "saved_images"):
            print(f"  {display_path(run.output / name)}")
        test = display_path(ROOT / "test.py")
        print(f"  evaluate: python {test} --output-dir {display_path(run.output)}")
    return 0


if __name__ == "__main__":
    run_script(main)
