"""A run of train.py: what it carries from epoch to epoch, and where its files lie."""

import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dataset import VAL_FRACTION
from distributed import world_size
from files import BadInput
from model import UNet
from utils import (
    CLASSIC,
    amp_dtype,
    load_weights,
    memory_format,
    save_curves,
    save_metrics,
    set_up,
)

NOT_SAVED = ("load_model", "output_dir", "device")  # settings of one call, not of the run


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
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.learning_rate, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(device) == torch.float16)
        self.history = []  # one row of metrics.csv an epoch
        self.saved_epoch = 0
        self.best_since = 1  # the epoch from which on validation was on the photos of today

    @property
    def epoch(self):
        """Epochs trained so far."""
        return self.history[-1]["epoch"] if self.history else 0

    @property
    def best(self):
        """The history's row with the best validation Dice, or None."""
        rows = [row for row in self.history if row["epoch"] >= self.best_since]
        return max(rows, key=lambda row: row["dice"], default=None)

    def set_learning_rate(self):
        """The coming epoch's: multiplied by gamma after every step_size epochs."""
        settings = self.settings
        drops = self.epoch // settings.step_size if settings.step_size else 0
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * settings.gamma**drops
        return group["lr"]

    def state(self, defaults):
        """The checkpoint: tensors and plain values only."""
        settings = self.settings
        return {
            "state_dict": self.model.state_dict(),
            "model": {
                "in_channels": settings.in_channels,
                "out_channels": 1,
                "features": settings.features,
            },
            "image_size": [settings.image_height, settings.image_width],
            "normalization": CLASSIC["normalization"],
            "threshold": CLASSIC["threshold"],
            "val_fraction": VAL_FRACTION,
            # From here on, what only resuming needs.
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "epoch": self.epoch,
            "best_dice": self.best["dice"],
            "best_since": self.best_since,
            "history": self.history,
            "settings": {k: v for k, v in vars(settings).items() if k not in NOT_SAVED},
            "constants": defaults,
        }

    def restore(self, checkpoint, filename):
        """Take up where a checkpoint stopped; a classic one has only weights and Adam's moments."""
        load_weights(self.model, checkpoint, filename)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint.get("scaler"):  # empty from a run that needed none
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.history = list(checkpoint.get("history", []))
            self.saved_epoch = self.epoch
            self.best_since = checkpoint.get("best_since", 1)
            if "rng" in checkpoint:
                torch.set_rng_state(checkpoint["rng"])
                for device, state in enumerate(checkpoint["cuda_rng"][: torch.cuda.device_count()]):
                    torch.cuda.set_rng_state(state, device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BadInput(
                f"{filename}: its optimizer or history cannot be gone on with "
                f"({type(error).__name__}: {error}): leave --load-model out to start afresh"
            ) from None

    def save_history(self, output):
        """metrics.csv and the curves, both from the history that the checkpoint carries."""
        save_metrics(self.history, output / "metrics.csv")
        save_curves(self.history, self.best, output / "saved_images" / "training_curves.png")

    def saved_so_far(self, filename):
        """What a run that stops now leaves behind, as a sentence."""
        if self.saved_epoch == 0:
            return "nothing was saved before the end of the first epoch"
        return f"{filename} holds the run up to the end of epoch {self.saved_epoch}"


def check_output(output):
    """Raises BadInput where the output folder cannot be made or written to."""
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BadInput(f"{shown(output)}: cannot be written: name another --output-dir")


def move_aside(output, names):
    """Rename those of `names` that are there, and the pictures, to `*.previous`.

    Where that is taken, to `*.2.previous` and so on: nothing is overwritten.
    """
    pictures = output / "saved_images"
    files = [output / name for name in names if (output / name).exists()]
    drawn = list(pictures.glob("[!.]*"))
    if not files and not drawn:
        return

    taken = {path.name for path in output.glob("*.previous")}
    suffix, number = ".previous", 1
    while any(file.name + suffix in taken for file in (*files, pictures)):
        number += 1
        suffix = f".{number}.previous"
    for file in files:
        file.rename(output / (file.name + suffix))
    if drawn:
        old_pictures = output / (pictures.name + suffix)
        old_pictures.mkdir()
        for file in drawn:
            file.rename(old_pictures / file.name)
    print(
        f"An earlier run's files in {shown(output)} are now called *{suffix}; to go on with that "
        "run instead, stop, rename them back and add --load-model"
    )


def shown(path):
    """A path as short as it can be typed from here."""
    return min(str(path), os.path.relpath(path), key=len)
