"""Train the U-Net: photos and masks in; a checkpoint, a table, curves and pictures out.

    python train.py                                  the settings below; without data, a drawn demo
    python train.py --data-dir DIR                   photos and masks in DIR/train_images, ...
    python train.py --load-model                     resume the last run
    python train.py --epochs 20 --batch-size 8 --lr 3e-4
    torchrun --nproc_per_node=8 train.py             on eight GPUs, BATCH_SIZE photos on each

Every setting is also a flag; `python train.py --help` lists them. In reading order:

    constants, Settings      what can be chosen
    make_run                 what a run carries: model, optimizer, scaler, epoch, history
    learning_rate            the schedule, a function of the progress
    train_one_epoch          the loop: batch, forward, loss, backward, step; save if due
    train, validate          epoch after epoch, each with its scores, checkpoint and pictures
    main                     settings, data, model, resume, train, result

See docs/architecture.md for the contents of a checkpoint and for randomness.
"""

import support.startup  # noqa: F401  first: Ctrl-C during the slow import of torch

# isort: split

import copy
import math
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch.optim import Adam

import utils
from dataset import AUGMENTATIONS, NORMALIZATION, VAL_FRACTION, get_loaders, make_loader
from model import UNet
from support import checkpoints, distributed, plots, report
from support.checkpoint_files import CLASSIC
from support.command_line import arguments, run_script
from support.distributed import rank, world_size
from support.errors import display_path, short_path
from support.flags import (
    STRICT,
    Channels,
    ClassNames,
    GroupPattern,
    PixelValue,
    Side,
    UserPath,
    check,
    setting,
)
from support.loading import default_workers
from support.masks import Labels
from support.muon import Muon
from support.run import EpochProgress, Run, all_arguments
from support.scores import compute_class_weights, without_ignored
from support.settings import choose_settings, existing_photos, read_flags
from support.signals import Stopped, stop_request
from support.writing import check_output, move_aside
from utils import BEST_CHECKPOINT, CHECKPOINT, LOSSES, SHIPPED

ROOT = Path(__file__).resolve().parent  # relative paths in the settings start here

# Edit these; they are the defaults of the fields of Settings.
LEARNING_RATE = 1e-4
BATCH_SIZE = 16
NUM_EPOCHS = 10
NUM_WORKERS = None  # None: one per core, at most 8, with a GPU; 0 on a CPU
IMAGE_HEIGHT = 160  # 1280 originally
IMAGE_WIDTH = 240  # 1918 originally
FEATURES = (64, 128, 256, 512)  # (16, 32, 64, 128) has 1/16 of the parameters
PIN_MEMORY = True
LOAD_MODEL = False
DEVICE = "auto"  # CUDA, else Apple's MPS, else the CPU
TRAIN_IMG_DIR = "data/train_images"
TRAIN_MASK_DIR = "data/train_masks"
VAL_IMG_DIR = "data/val_images"  # without it, a tenth of the training cars is held out
VAL_MASK_DIR = "data/val_masks"

# What --optimizer offers. Each is called with the model's parameters and returns an optimizer; the
# schedule sets its learning rate.
OPTIMIZERS = {"adam": partial(Adam, fused=True), "muon": Muon}

# What --recipe offers: settings worth choosing together, instead of the defaults below. An explicit
# flag overrides the recipe.
RECIPES = {
    "classic": {},
    "better": {
        "augment": "flip",
        "optimizer": "muon",
        "learning_rate": 1e-2,
        "scheduler": "onecycle",
    },
}

MAX_PICTURES = 16  # validation photos that are drawn after each epoch
CHECK_EVERY = 20  # optimizer steps between checks of the loss on a GPU
WARMUP = 0.3  # of the run, in the one-cycle schedule


@dataclass(frozen=True, config=STRICT)
class Settings:
    """All settings of a run: each field is also a flag, with the same default, bounds and help.

    A value is checked in the same way whether it comes from here, from a flag or from a checkpoint.
    choose_settings decides which takes precedence: a flag, else a constant edited since, else the
    checkpoint, else the recipe or the demo, else the default. `group` is the heading in --help of a
    field and of those after it.
    """

    train_img_dir: UserPath = setting(TRAIN_IMG_DIR, "training photos", group="data")
    train_mask_dir: UserPath = setting(TRAIN_MASK_DIR, "masks of the training photos")
    val_img_dir: UserPath | None = setting(
        VAL_IMG_DIR, "validation photos; if missing, a tenth of the training cars is held out"
    )
    val_mask_dir: UserPath | None = setting(VAL_MASK_DIR, "masks of the validation photos")
    mask_suffix: str | None = setting(None, "suffix of mask names, or two patterns PHOTO=MASK")
    classes: ClassNames = setting(("object",), "names of what masks show, or how many there are")
    mask_value: tuple[PixelValue, ...] = setting(
        (), "pixel value of each class, if not 1, 2, ...; for one class: every value of the object"
    )
    ignore: PixelValue | None = setting(None, "pixel value to exclude from loss and scores")
    group: GroupPattern | None = setting(
        None, "regular expression; photos whose names share its group stay on one side of the split"
    )
    cache: bool = setting(True, "keep decoded photos on disk, to decode each only once")
    cache_dir: UserPath | None = setting(
        None, "folder for decoded photos; if missing, .cache beside the photos", saved=False
    )
    num_workers: int | None = setting(NUM_WORKERS, "processes that load data", ge=0, le=1024)
    pin_memory: bool = setting(PIN_MEMORY, "pin host memory, for faster copies to CUDA")
    augment: Literal[tuple(AUGMENTATIONS)] = setting("classic", "see AUGMENTATIONS in dataset.py")

    image_height: Side = setting(IMAGE_HEIGHT, "height that photos are scaled to", group="network")
    image_width: Side = setting(IMAGE_WIDTH, "width that photos are scaled to")
    crop: int = setting(
        0, "train on crops of this side, in pixels, of unscaled photos; 0: do not", ge=0, le=16384
    )
    in_channels: Channels = setting(3, "3 for RGB photos, 1 for grey ones")
    features: tuple[PositiveInt, ...] = setting(FEATURES, "channels of each level", min_length=1)
    pretrained: UserPath | None = setting(
        None, "checkpoint whose weights to start from", saved=False, bare_value=SHIPPED
    )

    num_epochs: PositiveInt = setting(
        NUM_EPOCHS, "number of passes over the training set", "--epochs", group="training"
    )
    batch_size: PositiveInt = setting(
        BATCH_SIZE, "photos per batch, in each process", "--batchsize", le=65536
    )
    accumulate: PositiveInt = setting(
        1, "gradient accumulation: batches per optimizer step", le=65536
    )
    loss: Literal[tuple(LOSSES)] = setting("bce", "see LOSSES in utils.py")
    class_weights: tuple[str, ...] = setting((), "loss weight of each class, or auto")
    optimizer: Literal[tuple(OPTIMIZERS)] = setting("adam", "see OPTIMIZERS in train.py")
    learning_rate: float = setting(LEARNING_RATE, "peak learning rate", "--lr", gt=0)
    scheduler: Literal["none", "step", "onecycle"] = setting("none", "learning-rate schedule")
    step_size: PositiveInt = setting(
        10, "epochs between learning-rate drops; implies --scheduler step", "--stepsize"
    )
    gamma: float = setting(
        0.1, "factor applied to the learning rate at each drop; implies --scheduler step", gt=0
    )
    checkpoint_activations: bool = setting(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    seed: int = setting(42, "of initialization, shuffling and augmentation", ge=0, le=2**32 - 1)
    recipe: Literal[tuple(RECIPES)] = setting("classic", "see RECIPES in train.py", saved=False)

    load_model: bool = setting(LOAD_MODEL, "resume the last run", saved=False, group="run")
    save_every: int = setting(
        20, "save every N batches, less often if saving is slow; 0: only after each epoch", ge=0
    )
    output_dir: UserPath = setting(".", "for checkpoints, metrics.csv and pictures", saved=False)
    device: str = setting(DEVICE, "cuda, mps or cpu", saved=False)

    @property
    def size(self):
        """(height, width) of the network's input in training."""
        return (self.crop, self.crop) if self.crop else (self.image_height, self.image_width)

    @property
    def labels(self):
        """How pixel values in mask files map to classes."""
        return Labels(len(self.classes), self.mask_value, self.ignore)


# The run ------------------------------------------------------------------------------------------


def make_run(settings, device, stored_arguments=None):
    """Return a new Run, whose weights are initialized from the seed.

    stored_arguments: those of UNet in the checkpoint to resume, which count where they differ.
    """
    torch.manual_seed(settings.seed)
    arguments = {
        "in_channels": settings.in_channels,
        "out_channels": len(settings.classes),
        "features": list(settings.features),
        **(stored_arguments or {}),
        "checkpoint_activations": settings.checkpoint_activations,
    }
    model = UNet(**arguments)
    model.to(device, memory_format=utils.memory_format(device))
    needs_scaler = utils.amp_dtype(device) == torch.float16
    return Run(
        settings=settings,
        device=device,
        output_dir=ROOT / settings.output_dir,
        model=model,
        model_arguments=all_arguments(UNet, arguments),
        parallel_model=distributed.in_parallel(model, device),
        optimizer=OPTIMIZERS[settings.optimizer](model.parameters()),
        scaler=torch.amp.GradScaler(device.type, enabled=needs_scaler),
        normalization=NORMALIZATION,
        val_fraction=VAL_FRACTION,
        threshold=CLASSIC["threshold"],
    )


# Training -----------------------------------------------------------------------------------------


def learning_rate(settings, epochs_done):
    """The learning rate after `epochs_done` epochs, which may be fractional.

    It depends only on the progress, so there is no scheduler state to save.
    """
    peak = settings.learning_rate
    if settings.scheduler == "step":
        return peak * settings.gamma ** (int(epochs_done) // settings.step_size)
    if settings.scheduler == "onecycle":
        return one_cycle(peak, epochs_done / settings.num_epochs)
    return peak


def one_cycle(peak, progress):
    """The one-cycle schedule, at a progress from 0 to 1.

    From peak / 25 up to the peak during the warm-up, then down to peak / 250,000, both along a
    cosine: PyTorch's OneCycleLR without its change of momentum, after Smith and Topin
    (https://arxiv.org/abs/1708.07120).
    """
    if progress < WARMUP:
        lowest = peak / 25
        weight = (1 - math.cos(math.pi * progress / WARMUP)) / 2
    else:
        lowest = peak / 250_000
        weight = (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2
    return lowest + (peak - lowest) * weight


def train_one_epoch(run, loader, stop):
    """Train what is left of an epoch, from run.progress on.

    Args:
        run: a Run; its model, optimizer, scaler and progress change.
        loader: the training loader of get_loaders.
        stop: a StopRequest, checked between steps.

    Returns (mean loss per photo, photos per second) of the whole epoch, two floats; the loss is 0
    in all processes but the first. Raises Stopped after a signal, BadInput once the loss is not
    finite.
    """
    settings = run.settings
    progress = run.progress
    loss_function = utils.make_loss(settings.loss, run.class_weights)
    global_batch = settings.batch_size * world_size()  # photos, over all processes

    run.parallel_model.train()
    loader.sampler.set_epoch(run.epoch + 1, start=progress.photos_done)
    n_steps_left = math.ceil(len(loader) / settings.accumulate)
    with report.epoch_bar(run, loader) as bar:
        batches = iter(bar)
        for step in range(n_steps_left):
            step_started = time.perf_counter()
            rate = learning_rate(settings, run.epoch + progress.share_done)
            for group in run.optimizer.param_groups:
                group["lr"] = rate

            # The gradients of all batches of a step add up to those of one large batch.
            photos_in_step = progress.photos_in_next(settings.accumulate * global_batch)
            for images, masks in islice(batches, settings.accumulate):
                photos_in_batch = progress.photos_in_next(global_batch)
                images, masks, n_real = distributed.drop_repeats(images, masks, photos_in_batch)
                images, masks = utils.to_device(images, masks, run.device)
                with utils.autocast(run.device):
                    logits = run.parallel_model(images)  # (N, K, H, W)
                if settings.ignore is not None:
                    logits, masks = without_ignored(logits, masks)
                losses = utils.photo_losses(loss_function, logits, masks)[:n_real]  # (N,)
                # DDP averages over processes, so scale by world_size to get the mean over photos.
                loss = losses.sum() * (world_size() / photos_in_step)
                run.scaler.scale(loss).backward()
                progress.add(photos_in_batch, losses.detach())

            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)

            # Reading the loss synchronizes with the GPU, so there it is read only now and then, and
            # so are signals and the time to save.
            is_check_step = (
                run.device.type == "cpu" or step % CHECK_EVERY == 0 or step == n_steps_left - 1
            )
            if is_check_step:
                run.check_finite(progress.loss_sum.item(), "loss")
            progress.seconds += time.perf_counter() - step_started
            if is_check_step:
                bar.set_postfix_str(report.postfix(losses.mean(), progress), refresh=False)
                must_save, signal_number = run.sync_decisions(stop)
                if signal_number:
                    raise Stopped(signal_number)
                if must_save:
                    save(run, CHECKPOINT)

    progress.loss_sum = distributed.sum_on_first(progress.loss_sum, run.device)
    return progress.loss_sum / progress.n_photos, progress.photos_per_second


def save(run, *names):
    """Write the run under each of these names, each file atomically. All processes take part.

    A checkpoint holds what evaluation needs (weights, the network's arguments, image size,
    normalization, threshold, classes, settings) and what resuming needs (the states of optimizer,
    scaler and random numbers, history, progress within the epoch). The first process writes; it
    also takes over the losses that the others have summed. If a weight is not finite, raises
    BadInput and leaves the files unchanged.
    """
    with run.throttle.timed(run.progress.batches_done, len(names)):
        run.progress.loss_sum = distributed.sum_on_first(run.progress.loss_sum, run.device)
        tensors = run.model.state_dict().values()
        run.check_finite(sum(tensor.sum().item() for tensor in tensors), "sum of the weights")
        if rank() == 0:
            state = checkpoints.pack(run)
            for name in names:
                utils.save_checkpoint(state, run.output_dir / name)


def train(run, train_loader, val_loader):
    """Train the epochs that are left. After each, validate, save, and write table and pictures.

    Raises Stopped after a signal, after saving all progress.
    """
    with stop_request() as stop:  # signals are held during the final save, too
        try:
            while not run.is_finished:
                train_loss, speed = train_one_epoch(run, train_loader, stop)
                run.history.append(validate(run, val_loader, stop, train_loss, speed))
                run.progress = EpochProgress(run.progress.n_photos, run.progress.order_hash)
                names = [CHECKPOINT]
                if run.best is run.history[-1]:
                    # The best first: if killed between the two, a resumed run redoes part of the
                    # epoch but loses nothing.
                    names = [BEST_CHECKPOINT, CHECKPOINT]
                save(run, *names)
                report.epoch(run)
                if rank() == 0:
                    write_outputs(run, val_loader)
        except Stopped:
            save(run, CHECKPOINT)
            raise
        finally:
            train_loader.close()
            val_loader.close()


def validate(run, loader, stop, train_loss, photos_per_second):
    """Score the validation photos after an epoch.

    Returns the epoch's row of metrics.csv, a dict of numbers, with Dice and IoU of each class if
    there are several; also sets run.constant_dice. Raises Stopped after a signal, BadInput once the
    loss is not finite.
    """
    started = time.perf_counter()
    scores = utils.check_accuracy(
        stop.watch(loader),
        utils.for_whole_photos(run.model, run.settings.crop),
        run.device,
        threshold=run.threshold,
        loss_function=utils.make_loss(run.settings.loss, run.class_weights),
        classes=run.settings.classes,
    )
    val_loss = scores.pop("loss")
    run.check_finite(val_loss, "validation loss")
    run.constant_dice = scores.pop("constant")
    return {
        "epoch": run.epoch + 1,
        "train_loss": train_loss,
        "val_loss": val_loss,
        **scores,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "seconds": run.progress.seconds + time.perf_counter() - started,
        "photos_per_second": photos_per_second,
    }


def write_outputs(run, val_loader):
    """Write the table, the curves, and pictures of at most MAX_PICTURES validation photos.

    The photos are evenly spaced, so that they show different cars.
    """
    plots.save_history(run.history, run.best, run.output_dir)
    subset = copy.copy(val_loader.dataset)
    subset.pairs = subset.pairs[:: math.ceil(len(subset) / MAX_PICTURES)]
    loader = make_loader(subset, val_loader.batch_size)
    network = utils.for_whole_photos(run.model, run.settings.crop)
    folder = run.output_dir / "saved_images"
    utils.save_predictions_as_imgs(
        loader, network, folder, run.device, run.threshold, run.normalization
    )


# The parts of main --------------------------------------------------------------------------------


def settings_from_data(from_flags):
    """The settings that follow from the photos that are there, as {name: value}.

    If there are none and no flag names any, draws the demo set; its settings then count.
    """
    defaults = check(Settings, {})
    from_photos = existing_photos(defaults, from_flags, ROOT)
    if from_photos is not None:
        return from_photos
    from data.draw_demo import use_demo

    with distributed.first_before_others():
        return use_demo(ROOT / "data" / "demo")


def load_checkpoints(call):
    """Return (checkpoint to resume, checkpoint whose weights to start from); {} if there is none.

    call: the settings of this call, of which those count that are never stored in a checkpoint.
    """
    latest = ROOT / call.output_dir / CHECKPOINT
    if call.load_model and latest.exists():
        return utils.load_checkpoint(latest), {}
    if call.load_model:
        print(f"{display_path(latest)}: no checkpoint to resume, so this run starts from scratch")
    if not call.pretrained:
        return {}, {}
    source = ROOT / call.pretrained
    pretrained = utils.load_checkpoint(short_path(source), must_fit=False)
    print(f"Starting from {display_path(source)}, with its architecture and image size")
    return {}, pretrained


def make_loaders(run):
    """The loaders of training and validation photos; see get_loaders.

    Under torchrun the first process decodes the photos for all. Raises BadInput that lists every
    bad file.
    """

    def resolve(folder):
        return folder and short_path(ROOT / folder)

    settings = run.settings
    n_workers = settings.num_workers
    with distributed.first_before_others():
        return get_loaders(
            resolve(settings.train_img_dir),
            resolve(settings.train_mask_dir),
            resolve(settings.val_img_dir),
            resolve(settings.val_mask_dir),
            settings.batch_size,
            num_workers=default_workers(run.device) if n_workers is None else n_workers,
            pin_memory=settings.pin_memory,
            size=settings.size,
            channels=settings.in_channels,
            seed=settings.seed,
            cache=settings.cache,
            cache_dir=resolve(settings.cache_dir),
            augment=settings.augment,
            mask_suffix=settings.mask_suffix,
            labels=settings.labels,
            group=settings.group,
            crop=settings.crop,
            normalization=run.normalization,
        )


def prepare_run(run, dataset, resumed):
    """Set class weights and progress for the training set; move an earlier run's files aside.

    resumed: whether the run continues a checkpoint, which then stays in its place.
    """
    settings = run.settings
    if settings.class_weights:
        weights = compute_class_weights(settings.class_weights, settings.classes, dataset)
        run.class_weights = weights.to(run.device)
    run.start_epoch_on(dataset.names)
    has_trained = run.history or run.progress.batches_done
    if rank() == 0 and not has_trained:
        names = [BEST_CHECKPOINT, "metrics.csv"]
        if not resumed:
            names.append(CHECKPOINT)
        move_aside(run.output_dir, names)


def main(argv=None, resume_command=None):
    """Train with the settings given in argv; return the exit code.

    resume_command: the words to type to resume, when called from another script.
    """
    started = time.perf_counter()
    argv = arguments(argv)
    from_flags = read_flags(Settings, argv)
    call = check(Settings, from_flags)  # of which load_model, device, ... count at once
    with distributed.process_group(utils.pick_device(call.device)) as device:
        checkpoint, pretrained = load_checkpoints(call)
        from_data = {} if "settings" in checkpoint else settings_from_data(from_flags)
        settings = choose_settings(Settings, RECIPES, from_flags, from_data, checkpoint, pretrained)
        run = make_run(settings, device, checkpoint.get("model"))
        latest = run.output_dir / CHECKPOINT
        check_output(run.output_dir)
        if pretrained:
            checkpoints.start_from(run, pretrained)
        if checkpoint:
            checkpoints.unpack(checkpoint, run, latest)
            report.restore_table(run)
        if run.is_finished:
            report.nothing_left(run, latest)
            return 0

        train_loader, val_loader = make_loaders(run)
        prepare_run(run, train_loader.dataset, resumed=bool(checkpoint))
        report.announce(
            run,
            train_loader.dataset,
            val_loader.dataset,
            dtype=utils.amp_dtype(device),
            has_weights=bool(checkpoint or pretrained),
        )
        words = resume_command or [short_path(ROOT / "train.py"), *argv]
        how_to_resume = report.command_to_resume(words)
        try:
            with report.problems_with(how_to_resume):
                train(run, train_loader, val_loader)
        except Stopped as stopped:
            report.stopped(run, latest, how_to_resume)
            return stopped.exit_code
        outputs = (BEST_CHECKPOINT, CHECKPOINT, "metrics.csv", "saved_images")
        report.result(run, started, outputs, ROOT / "test.py")
    return 0


if __name__ == "__main__":
    run_script(main)
