"""What a training run carries from step to step; its checkpoint holds all of it."""

import contextlib
import dataclasses
import inspect
import math
import time
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from support import distributed
from support.cache import stable_hash
from support.distributed import rank
from support.errors import BadInput


@dataclass
class EpochProgress:
    """How far the current epoch is: what resuming within it needs beside the weights."""

    n_photos: NonNegativeInt  # in the whole epoch
    order_hash: int = 0  # of the seed and the photos' names; if it differs, the epoch restarts
    batches_done: NonNegativeInt = 0
    photos_done: NonNegativeInt = 0  # by all processes
    loss_sum: float = 0.0  # over photos; while training a tensor, of this process's photos
    seconds: float = 0.0  # of training alone

    def photos_in_next(self, most):
        """How many photos the next batch, or step, of `most` photos still has."""
        return min(most, self.n_photos - self.photos_done)

    def add(self, n_photos, losses):
        """Count a batch of so many photos, over all processes, and this process's losses, (N,)."""
        # Sums in float64 are the same in whatever order they are added. MPS does not have it.
        dtype = torch.float32 if losses.device.type == "mps" else torch.float64
        self.batches_done += 1
        self.photos_done += n_photos
        self.loss_sum = self.loss_sum + losses.sum(dtype=dtype)

    @property
    def share_done(self):
        """The share of the epoch that is done, 0 to 1."""
        return self.photos_done / self.n_photos

    @property
    def photos_per_second(self):
        """The speed of training alone, over all processes."""
        return self.photos_done / self.seconds

    def __post_init__(self):
        if self.batches_done and not self.batches_done <= self.photos_done <= self.n_photos:
            raise ValueError(f"an epoch cannot have come to {self}")


class SaveThrottle:
    """Decides when a run is saved within an epoch, so that saving takes a twentieth of the time."""

    def __init__(self):
        self.batches_done = 0  # at the last save
        self.ended = time.perf_counter()  # of the last save
        self.seconds_per_file = 0.0

    def is_due(self, save_every, batches_done):
        """Whether it is time to save, after so many batches of the epoch."""
        enough_batches = 0 < save_every <= batches_done - self.batches_done
        return enough_batches and time.perf_counter() - self.ended > 20 * self.seconds_per_file

    @contextlib.contextmanager
    def timed(self, batches_done, n_files):
        """A block that saves so many files."""
        started = time.perf_counter()
        yield
        self.batches_done = batches_done
        self.ended = time.perf_counter()
        self.seconds_per_file = (self.ended - started) / n_files


def all_arguments(network_class, given):
    """The arguments of a network's class: those given, and the defaults of all others.

    They are stored in checkpoints, so that a default that is edited later changes no older network.
    """
    bound = inspect.signature(network_class).bind(**given)
    bound.apply_defaults()
    return dict(bound.arguments)


@dataclasses.dataclass
class Run:
    """A training run. See support/checkpoints.py for how it is stored."""

    settings: Any  # train.Settings
    device: torch.device
    output_dir: Path
    model: torch.nn.Module
    model_arguments: dict  # of the model's class
    parallel_model: torch.nn.Module  # what training calls: the model itself, or in DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    normalization: dict  # mean, std and max_pixel_value of photos
    val_fraction: float  # of the cars, if validation is split from training
    threshold: float
    class_weights: torch.Tensor | None = None  # (K, 1, 1)
    history: list = field(default_factory=list)  # one row of metrics.csv per epoch
    progress: EpochProgress = field(default_factory=lambda: EpochProgress(0))
    throttle: SaveThrottle = field(default_factory=SaveThrottle)
    constant_dice: float = 0.0  # validation Dice of marking everything

    @property
    def epoch(self):
        """Epochs trained so far."""
        return len(self.history)

    @property
    def best(self):
        """The history's row with the best validation Dice, or None; of equals the lowest loss."""

        def merit(row):
            return row["dice"], -row.get("val_loss", math.inf)

        return max(self.history, key=merit, default=None)

    @property
    def is_finished(self):
        """Whether all epochs have been trained."""
        return self.epoch >= self.settings.num_epochs

    def start_epoch_on(self, names):
        """Set the progress to an epoch over the photos of these names.

        A resumed run continues its epoch if the photos and the seed are the same.
        """
        order_hash = stable_hash(f"{self.settings.seed} {names}")
        if self.progress.order_hash == order_hash:
            return
        if self.progress.batches_done:
            print("Other photos or another seed than the checkpoint's: its epoch restarts")
        self.progress = EpochProgress(len(names), order_hash)

    def check_finite(self, number, what):
        """Raises BadInput for a loss, or weights, that training has made infinite or nan."""
        if not math.isfinite(number):
            where = f"after batch {self.progress.batches_done} of epoch {self.epoch + 1}"
            remedy = f"try --lr {self.settings.learning_rate / 10:g}"
            raise BadInput(None, f"{where} the {what} is {number}", remedy)

    def sync_decisions(self, stop):
        """(whether to save now, number of a signal that came or 0), the same in all processes."""
        due = self.throttle.is_due(self.settings.save_every, self.progress.batches_done)
        wishes = [due and rank() == 0, stop.number]  # the first process writes, so it decides
        must_save, signal_number = distributed.reduce(wishes, self.device, "MAX").tolist()
        return bool(must_save), int(signal_number)
