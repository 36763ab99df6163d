"""A run of train.py: what it carries from epoch to epoch, and where its files lie."""

import math

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dataset import VAL_FRACTION
from distributed import world_size
from files import BadInput, shown
from model import UNet
from plots import save_curves, save_metrics
from utils import (
    CLASSIC,
    amp_dtype,
    load_weights,
    memory_format,
    set_up,
)

NOT_SAVED = (
    "load_model",
    "output_dir",
    "device",
    "tensorboard",
)  # settings of one call, not of the run

WARM_UP = 0.3  # share of the run in which the learning rate of "onecycle" rises


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
        self.saved_epoch = 0
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
            "best_dice": self.best["dice"],
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


def moving_average(decay):
    """For AveragedModel: an exponential moving average that forgets faster over its first steps.

    The decay after n steps is (1 + n) / (10 + n), up to `decay`: the random weights of the start
    would count for as long as they do for 500 steps at 0.998.
    """

    def update(averaged, current, steps):
        steps = int(steps)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, steps)

    return update


def make_optimizer(settings, parameters):
    """The optimizer by its name, with the field's usual momentum and PyTorch's own defaults."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    momentum = {"momentum": 0.9, "nesterov": True} if settings.optimizer == "sgd" else {}
    return kind[settings.optimizer](parameters, lr=settings.learning_rate, fused=True, **momentum)


def learning_rate(settings, epochs):
    """The learning rate after so many epochs, a fraction counting part of one.

    A function of the progress alone: nothing of it has to be stored, and a run that is resumed with
    more epochs is on the longer schedule at once. "cosine" and "onecycle" are PyTorch's
    CosineAnnealingLR and OneCycleLR (without its change of momentum).
    """
    top, progress = settings.learning_rate, epochs / settings.num_epochs
    if settings.scheduler == "step":
        return top * settings.gamma ** (int(epochs) // settings.step_size)
    if settings.scheduler == "cosine":
        return top * falling(progress)
    if settings.scheduler == "onecycle":
        start, end = top / 25, top / 25 / 1e4
        if progress < WARM_UP:
            return top - (top - start) * falling(progress / WARM_UP)
        return end + (top - end) * falling((progress - WARM_UP) / (1 - WARM_UP))
    return top


def falling(progress):
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2


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
