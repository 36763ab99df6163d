"""What a run's checkpoint holds, and checkpoints as untrusted input: nothing in them is run."""

import dataclasses
import os
import reprlib
import zipfile
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, PositiveFloat, TypeAdapter
from pydantic.dataclasses import dataclass

from support.distributed import rank
from support.errors import BadInput, printable, short_path
from support.flags import GroupPattern, PixelValue, Side, flag_of
from support.masks import MAX_CLASSES, Labels
from support.run import EpochProgress
from support.settings import FOLDERS

# What a checkpoint of the classic recipe does not say.
CLASSIC = {
    "image_size": [160, 240],  # height, width
    "normalization": {"mean": 0.0, "std": 1.0, "max_pixel_value": 255.0},
    "threshold": 0.5,
    "classes": None,  # names of what masks show; None: "object", or 1, 2, ... for several
    "crop": None,  # side of the squares, in pixels, that the network was trained on
}
DICTS = ("settings", "constants", "optimizer")  # the other dicts that a checkpoint may hold
# What Python, torch and pydantic raise for contents that are not what they should be.
UNUSABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
FINITE = ConfigDict(allow_inf_nan=False)

# Writing ------------------------------------------------------------------------------------------


def pack(run):
    """A train.Run as a dict of tensors and plain values, for torch.save."""
    settings = run.settings
    weights = run.class_weights
    state = {
        "state_dict": run.model.state_dict(),
        "model": run.model_arguments,
        "image_size": list(settings.size),
        "crop": settings.crop or None,
        "classes": list(settings.classes),
        "class_weights": None if weights is None else weights.flatten().tolist(),
        "normalization": run.normalization,
        "threshold": run.threshold,
        "val_fraction": run.val_fraction,
        "settings": saved_fields(settings),
    }
    only_for_resuming = {
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "epoch": run.epoch,
        "progress": dataclasses.asdict(run.progress) if run.progress.batches_done else None,
        "best_dice": run.best["dice"] if run.best else None,
        "history": run.history,
        "constants": dataclasses.asdict(type(settings)()),
    }
    return state | only_for_resuming


def saved_fields(settings):
    """{name: value} of the settings that belong to a run rather than to one call."""
    fields = type(settings).__pydantic_fields__.items()
    return {name: getattr(settings, name) for name, field in fields if flag_of(field).saved}


# Resuming -----------------------------------------------------------------------------------------


def unpack(checkpoint, run, filename):
    """Continue in `run`, a train.Run, where a checkpoint stopped.

    A classic checkpoint has only weights and Adam's moments. If the optimizer is another than the
    checkpoint's, it starts without moments. Raises BadInput that names the file.
    """
    try:
        # Runs of older versions could average their weights; the moments belong to the raw ones.
        run.model.load_state_dict(checkpoint.get("raw_state_dict", checkpoint["state_dict"]))
        if checkpoint.get("settings", {}).get("optimizer", "adam") == run.settings.optimizer:
            load_optimizer(run.optimizer, checkpoint["optimizer"])
        if checkpoint.get("scaler"):  # empty if the run needed none
            run.scaler.load_state_dict(checkpoint["scaler"])
        run.threshold = checkpoint["threshold"]
        run.history = check_history(checkpoint.get("history", []))
        if progress := progress_of(checkpoint):
            run.progress = EpochProgress(**progress)
            if rank() > 0:
                run.progress.loss_sum = 0.0  # the first process has the sum of all
        torch.set_rng_state(checkpoint.get("rng", torch.get_rng_state()))
    except UNUSABLE as error:
        reason = f"its optimizer or history cannot be resumed ({one_line(error)})"
        raise BadInput(filename, reason, "leave --load-model out to start afresh") from None


def load_optimizer(optimizer, saved):
    """Take over the state that an optimizer of the same kind saved. Raises one of UNUSABLE.

    The state is made by a step of length 0 first, so that its tensors have the names, shapes and
    memory layout that the optimizer expects; the saved one may come from another device.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved_state = saved["state"]
    if saved_state:
        make_state(optimizer, parameters)
    for number, parameter in enumerate(parameters if saved_state else ()):
        fresh, kept = optimizer.state[parameter], saved_state[number]
        if fresh.keys() != kept.keys():
            raise ValueError(f"the state of parameter {number} has {short(list(kept))}")
        for name, value in kept.items():
            value = torch.as_tensor(value)
            if value.shape != torch.as_tensor(fresh[name]).shape:
                raise ValueError(f"{name} of parameter {number} is {list(value.shape)}")
            fresh[name].copy_(value)
    for group, kept in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group["lr"] = float(kept["lr"])


def make_state(optimizer, parameters):
    """Let an optimizer make its state, by a step that changes no parameter."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def check_history(history):
    """The rows of metrics.csv, one per epoch. Raises one of UNUSABLE.

    A row may lack columns, since older versions had fewer, but not its epoch and Dice.
    """
    rows = TypeAdapter(list[dict[str, float]], config=FINITE).validate_python(history)
    for number, row in enumerate(rows, start=1):
        if row.get("epoch") != number or "dice" not in row:
            raise ValueError(f"row {number} of the history is {short(row)}")
    return [row | {"epoch": number} for number, row in enumerate(rows, start=1)]


def progress_of(checkpoint):
    """{name: value} of the progress in a checkpoint's unfinished epoch, or None.

    Older versions called it "part", with other names and, at first, a tensor of losses.
    """
    part = checkpoint.get("part")
    if not part:
        return checkpoint.get("progress")
    order, n_photos = part["order"] if "photos" not in part else (part["order"], part["photos"])
    losses = torch.as_tensor(part["loss_sum"], dtype=torch.float64)
    return {
        "n_photos": n_photos,
        "order_hash": order,
        "batches_done": part["step"],
        "photos_done": part["seen"],
        "loss_sum": losses.sum().item(),
        "seconds": part["seconds"],
    }


# Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True, config=FINITE)
class Normalization:
    """image = (photo / max_pixel_value - mean) / std, per channel or the same for all."""

    mean: float | list[float]
    std: PositiveFloat | list[PositiveFloat]
    max_pixel_value: PositiveFloat


@dataclass(frozen=True, config=FINITE)
class Facts:
    """What a checkpoint says about its network, beside the weights."""

    image_size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    crop: Side | None
    classes: list[str]
    normalization: Normalization
    threshold: Annotated[float, Field(gt=0, lt=1)]
    val_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    class_weights: list[PositiveFloat] | None = None


@dataclass(frozen=True)
class DataSettings:
    """The settings of a run that evaluation needs: which photos, and how to read their masks."""

    train_img_dir: str | None = None
    train_mask_dir: str | None = None
    val_img_dir: str | None = None
    val_mask_dir: str | None = None
    mask_suffix: str | None = None
    mask_value: tuple[PixelValue, ...] = ()
    ignore: PixelValue | None = None
    group: GroupPattern | None = None
    loss: str = "bce"

    def folders(self, root):
        """The folders of training photos, their masks, validation photos and their masks.

        The last two are None if validation is split from training. A classic checkpoint does not
        say, so the default folders under `root` count.
        """
        if self.train_img_dir:
            named = [getattr(self, name) for name in FOLDERS]
        else:
            named = [f"data/{folder}" for folder in FOLDERS.values()]
            if not (root / "data" / "val_images").is_dir():
                named[2:] = [None, None]
        return [folder and short_path(root / folder) for folder in named]

    def labels(self, n_classes):
        """How masks are read: Labels for so many classes."""
        return Labels(n_classes, self.mask_value, self.ignore)


def read_checkpoint(filename):
    """The dict that a file holds, with a dict `state_dict`, on the CPU. Raises BadInput.

    Only tensors and plain values are read (weights_only), and no more than the file's size.
    """
    try:
        with zipfile.ZipFile(filename) as archive:  # as torch.save writes since PyTorch 1.6
            declared = sum(member.file_size for member in archive.infolist())
        if declared > os.path.getsize(filename):
            raise ValueError("it declares more than it holds")
        checkpoint = torch.load(filename, map_location="cpu", weights_only=True)
        parts = checkpoint["state_dict"], *(checkpoint.get(name, {}) for name in DICTS)
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("a part that should be a dict is not")
    except OSError as error:
        remedy = "name another, or train one with python train.py"
        raise BadInput(filename, f"no checkpoint to read ({error.strerror})", remedy) from None
    except Exception as error:  # torch raises many types for broken files
        if "allocate memory" in str(error):
            raise
        what = "not a checkpoint of tensors and plain values with a state_dict, or cut off"
        remedy = "use another copy, from someone you trust"
        raise BadInput(filename, what, remedy) from None
    return checkpoint


def find_checkpoint(*candidates):
    """The first of these paths that exists, else the last."""
    return short_path(next((path for path in candidates if path.exists()), candidates[-1]))


def network_arguments(weights):
    """The arguments of UNet that give a network with these tensors' shapes. Raises UNUSABLE."""
    levels = sum(f"downs.{level}.conv.0.weight" in weights for level in range(len(weights)))
    features = [weights[f"downs.{level}.conv.0.weight"].shape[0] for level in range(levels)]
    channels = weights["downs.0.conv.0.weight"].shape[1]
    classes = weights["final_conv.weight"].shape[0]
    if channels not in (1, 3) or not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"a network from {channels} channels to {classes} classes")
    return {"in_channels": channels, "out_channels": classes, "features": features}


def check_facts(checkpoint):
    """{name: value} of what a checkpoint says about its network, checked. Raises UNUSABLE."""
    names = [field.name for field in dataclasses.fields(Facts)]
    facts = Facts(**{name: checkpoint[name] for name in names if name in checkpoint})
    network = checkpoint["model"]
    if len(facts.classes) != network["out_channels"]:
        raise ValueError(f"classes is {short(facts.classes)}")
    for values in (facts.normalization.mean, facts.normalization.std):
        if isinstance(values, list) and len(values) not in (1, network["in_channels"]):
            raise ValueError(f"normalization is {short(checkpoint['normalization'])}")
    if facts.class_weights and len(facts.class_weights) != len(facts.classes):
        raise ValueError(f"class_weights is {short(facts.class_weights)}")
    return dataclasses.asdict(facts)


def data_settings(checkpoint, filename):
    """The DataSettings of a checkpoint that load_checkpoint gave. Raises BadInput."""
    saved = checkpoint.get("settings", {})
    names = [field.name for field in dataclasses.fields(DataSettings)]
    try:
        return DataSettings(**{name: saved[name] for name in names if name in saved})
    except UNUSABLE as error:
        reason = f"its settings make no sense ({one_line(error)})"
        raise BadInput(filename, reason, "name another file") from None


def start_from(model, checkpoint):
    """Take over a checkpoint's weights; all but the last layer's, if that has other classes."""
    weights, count = checkpoint["state_dict"], len(checkpoint["classes"])
    if count != model.final_conv.out_channels:
        weights = {k: v for k, v in weights.items() if not k.startswith("final_conv")}
        print(f"The last layer, for {count} classes there, starts with random weights")
    model.load_state_dict(weights, strict=False)


def one_line(error):
    """An error's text, on one line, for a message."""
    return printable(" ".join(str(error).split())[:300])


def short(value):
    """A value from a checkpoint, for a message."""
    return printable(reprlib.repr(value))
