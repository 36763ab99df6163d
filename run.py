"""A run of train.py: what it carries from epoch to epoch, and where its files lie."""

import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from checkpoints import CHECKPOINT, CLASSIC, load_weights, numbers, save_checkpoint, short
from dataset import VAL_FRACTION, stable_hash
from distributed import gather, rank, world_size
from files import BadInput, printable, shown
from model import UNet
from optimizer import learning_rate, load_moments, make_optimizer, moving_average
from plots import save_curves, save_metrics
from settings import NOT_SAVED
from utils import amp_dtype, memory_format, set_up

# What Python and torch raise for a checkpoint that is not what it should be.
UNUSABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
COLUMNS = (  # of metrics.csv, at least
    "epoch",
    "train_loss",
    "val_loss",
    "accuracy",
    "dice",
    "iou",
    "learning_rate",
    "seconds",
    "photos_per_second",
)
SAVING_TIME = 20  # a save within an epoch waits until the last one's time has passed so often


class Run:
    """What a run carries from epoch to epoch; its checkpoint holds all of it."""

    def __init__(self, settings, device):
        torch.manual_seed(settings.seed)
        set_up(device)
        self.settings = settings
        self.model = UNet(in_channels=settings.in_channels, features=settings.features)
        self.model.to(device, memory_format=memory_format(device))
        self.model.checkpoint_activations = settings.checkpoint_activations
        if settings.sync_batchnorm:
            if device.type != "cuda" or world_size() == 1:
                raise BadInput("--sync-batchnorm: works on several GPUs only: leave it out")
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        # What training calls: the same weights, with what else training needs around them.
        self.trained_model = self.model
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.trained_model = DistributedDataParallel(self.model, device_ids=ids)
        if settings.compile:
            self.trained_model = torch.compile(self.trained_model)
        # What is evaluated and what the best checkpoint is for: the average, where there is one.
        self.averaged = None
        self.evaluated_model = self.model
        if settings.ema:
            average = moving_average(settings.ema)
            self.averaged = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
            self.evaluated_model = self.averaged.module
        self.optimizer = make_optimizer(settings, self.model.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(device) == torch.float16)
        self.history = []  # one row of metrics.csv an epoch
        self.order = None  # stands for the order of photos, see set_photos
        # How far the epoch under way is; None before its first step and while a step is being
        # taken, when there is nothing that could be gone on with. See part_of_epoch.
        self.part = None
        self.best_since = 1  # the epoch from which on validation was on the photos of today
        self.threshold = CLASSIC["threshold"]
        if settings.threshold != "auto":
            self.threshold = settings.threshold

    @property
    def epoch(self):
        """Epochs trained so far."""
        return self.history[-1]["epoch"] if self.history else 0

    @property
    def best(self):
        """The history's row with the best validation Dice, or None."""
        rows = [row for row in self.history if row["epoch"] >= self.best_since]
        return max(rows, key=lambda row: row["dice"], default=None)

    @property
    def learning_rate(self):
        """The last step's."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, epochs):
        """Take a step along the gradients gathered, `epochs` (a fraction) after the start."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, epochs)
        if self.settings.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged:
            self.averaged.update_parameters(self.model)

    def part_of_epoch(self, step, seen, photos, loss_sum, seconds):
        """What going on inside an epoch needs beside the weights, from after a step on.

        Args:
            step, seen: steps taken and photos seen in this epoch, by all processes together.
            photos: of the whole epoch.
            loss_sum: (1,), of this process's photos; (processes,) once it is gathered.
            seconds: that the epoch's training has taken so far.
        """
        return {
            "step": step,
            "seen": seen,
            "order": [self.order, photos],
            "loss_sum": loss_sum,
            "seconds": seconds,
        }

    def set_photos(self, names):
        """Say which photos there are to train on: a part of an epoch of others is forgotten."""
        self.order = stable_hash(f"{self.settings.seed} {names}")
        if self.part and self.part["order"] != [self.order, len(names)]:
            print("Other photos or another seed than the checkpoint's: its epoch begins anew")
            self.part = None

    def start_of_epoch(self, photos):
        """The part of the next epoch, of so many photos, that a checkpoint has trained already."""
        part = self.part or self.part_of_epoch(0, 0, photos, torch.zeros(1), 0.0)
        sums = part["loss_sum"]
        if len(sums) != world_size():  # of another number of processes
            sums = torch.cat([sums.sum(0, keepdim=True), sums.new_zeros(world_size() - 1)])
        return part | {"loss_sum": sums[rank()].reshape(1)}

    def gather_part(self):
        """Collect what each process by itself knows of the epoch under way; all must take part."""
        if len(self.part["loss_sum"]) != world_size():
            self.part["loss_sum"] = gather(self.part["loss_sum"])

    def end_epoch(self, row):
        """Take an epoch's scores into the history, and with that the next one up."""
        self.history.append(row)
        self.part = None

    def state(self, defaults):
        """The checkpoint: tensors and plain values only."""
        settings = self.settings
        raw = {}
        if self.averaged:  # which is the state_dict; these are the weights that are trained
            raw["raw_state_dict"] = self.model.state_dict()
            raw["averaged_steps"] = int(self.averaged.n_averaged)
        return {
            "state_dict": self.evaluated_model.state_dict(),
            "model": {
                "in_channels": settings.in_channels,
                "out_channels": 1,
                "features": settings.features,
            },
            "image_size": [settings.image_height, settings.image_width],
            "normalization": CLASSIC["normalization"],
            "threshold": self.threshold,
            "val_fraction": VAL_FRACTION,
            # From here on, what only resuming needs.
            **raw,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "epoch": self.epoch,
            "part": self.part,
            "best_dice": self.best["dice"] if self.best else None,
            "best_since": self.best_since,
            "history": self.history,
            "settings": {k: v for k, v in vars(settings).items() if k not in NOT_SAVED},
            "constants": defaults,
        }

    def start_from(self, checkpoint, filename):
        """Take over a checkpoint's weights, and nothing else."""
        load_weights(self.model, checkpoint, filename)
        if self.averaged:
            load_weights(self.averaged.module, checkpoint, filename)
            self.averaged.n_averaged.fill_(1)  # at 0 the first step would start it anew

    def restore(self, checkpoint, filename):
        """Take up where a checkpoint stopped; a classic one has only weights and Adam's moments.

        An optimizer of another kind than the checkpoint's starts without its state.
        """
        self.start_from(checkpoint, filename)
        try:
            if "raw_state_dict" in checkpoint:
                self.model.load_state_dict(checkpoint["raw_state_dict"])
            if self.averaged:
                self.averaged.n_averaged.fill_(checkpoint.get("averaged_steps", 1))
            if self.settings.threshold == "auto":
                self.threshold = checkpoint["threshold"]
            if checkpoint.get("settings", {}).get("optimizer", "adam") == self.settings.optimizer:
                load_moments(self.optimizer, self.settings.optimizer, checkpoint["optimizer"])
            if checkpoint.get("scaler"):  # empty from a run that needed none
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.history = check_history(checkpoint.get("history", []))
            self.part = check_part(checkpoint.get("part"))
            self.best_since = checkpoint.get("best_since", 1)
            if self.best_since not in range(1, self.epoch + 2):
                raise ValueError(f"best_since is {short(self.best_since)}")
            if "rng" in checkpoint:
                torch.set_rng_state(checkpoint["rng"])
                for device, state in enumerate(checkpoint["cuda_rng"][: torch.cuda.device_count()]):
                    torch.cuda.set_rng_state(state, device)
        except UNUSABLE as error:
            reason = printable(" ".join(str(error).split())[:300])
            raise BadInput(
                f"{shown(filename)}: its optimizer or history cannot be gone on with "
                f"({type(error).__name__}: {reason}): leave --load-model out to start afresh"
            ) from None

    def save_history(self, output):
        """metrics.csv and the curves, both from the history that the checkpoint carries."""
        save_metrics(self.history, output / "metrics.csv")
        save_curves(self.history, self.best, output / "saved_images" / "training_curves.png")

    @property
    def place(self):
        """How far the run is, in words; None before its first step."""
        if self.part is None:
            return f"the end of epoch {self.epoch}" if self.epoch else None
        return f"step {self.part['step']} of epoch {self.epoch + 1}"


class Checkpoints:
    """Where a run's checkpoints go, and when it is time for one within an epoch."""

    def __init__(self, run, output, defaults):
        self.run, self.output, self.defaults = run, output, defaults
        self.saved = run.place  # how far the run was at the last save
        self.step = run.part["step"] if run.part else 0  # in its epoch, and the time, then
        self.time, self.took = time.perf_counter(), 0.0  # seconds that it took

    def due(self, last):
        """Whether to save after this step: each --save-every steps, and after an epoch's last, but
        not so often that a twentieth of the time would go into it."""
        every, steps = self.run.settings.save_every, self.run.part["step"] - self.step
        wanted = every > 0 and (last or steps >= every)
        return wanted and time.perf_counter() - self.time > SAVING_TIME * self.took

    def save(self, *names):
        """Write the run as it is. Raises FloatingPointError if that cannot be gone on with."""
        start = time.perf_counter()
        state = self.run.state(self.defaults)
        for weights in (state["state_dict"], state.get("raw_state_dict", {})):
            if not all(tensor.isfinite().all() for tensor in weights.values()):
                raise FloatingPointError("the weights are no longer numbers")
        for name in names:
            save_checkpoint(state, self.output / name)
        self.saved = self.run.place
        self.step = self.run.part["step"] if self.run.part else 0
        self.time = time.perf_counter()
        self.took = (self.time - start) / len(names)

    def save_unfinished(self):
        """Save an epoch under way that ends here, if it is whole and was not saved so far."""
        part, new = self.run.part, self.run.place != self.saved
        if rank() == 0 and new and part and len(part["loss_sum"]) == world_size():
            self.save(CHECKPOINT)

    def __str__(self):
        if self.saved is None:
            return "nothing was saved yet"
        return f"{shown(self.output / CHECKPOINT)} holds the run up to {self.saved}"


def check_history(history):
    """The history, as it is. Raises an exception where its rows are not what the curves need."""
    for number, row in enumerate(history, start=1):
        fits = row.keys() == history[0].keys() >= set(COLUMNS)
        if not fits or row["epoch"] != number or not numbers(list(row.values()), len(row)):
            raise ValueError(f"row {number} of the history is {short(row)}")
    return list(history)


def check_part(part):
    """The part of an epoch, as it is. Raises an exception where that cannot be gone on with."""
    if part is None:
        return None
    step, seen, order, sums = (part[name] for name in ("step", "seen", "order", "loss_sum"))
    whole = numbers([step, seen, *order], 4, int) and 0 < step <= seen <= order[1]
    if not whole or not numbers([part["seconds"]], 1) or part["seconds"] <= 0:
        raise ValueError(f"its epoch under way is {short(part)}")
    if sums.dim() != 1 or not sums.isfinite().all():
        raise ValueError(f"its loss is {short(sums)}")
    return part


def move_aside(output, names):
    """Rename those of `names` that are there, and the pictures, to `*.previous`.

    Where that is taken, to `*.2.previous` and so on: nothing is overwritten.
    """
    pictures = output / "saved_images"
    files = [output / name for name in names if (output / name).exists()]
    drawn = list(pictures.glob("[!.]*"))
    if not files and not drawn:
        return

    suffix, number = ".previous", 1
    while any(path.with_name(path.name + suffix).exists() for path in (*files, pictures)):
        number += 1
        suffix = f".{number}.previous"
    for file in files:
        file.rename(file.with_name(file.name + suffix))
    if drawn:
        old_pictures = output / (pictures.name + suffix)
        old_pictures.mkdir()
        for file in drawn:
            file.rename(old_pictures / file.name)
    print(
        f"An earlier run's files in {shown(output)} are now called *{suffix}; to go on with that "
        "run instead, stop, rename them back and add --load-model"
    )
