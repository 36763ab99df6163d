"""A checkpoint as untrusted input: nothing in it is run, and all that it says is checked."""

import math
import os
import reprlib
import zipfile

import torch

from support.errors import BadInput, printable, short_path
from support.images import MAX_CLASSES, Labels
from support.muon import Muon, moment_names

DICTS = ("settings", "constants", "optimizer")  # what else it may hold
MAX_SIDE = 16384  # pixels of the photos that a network sees
# What Python and torch raise for contents that are not what they should be.
UNUSABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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
            raise TypeError("what should be a dict is none")
    except OSError as error:
        remedy = "name another, or train one with python train.py"
        raise BadInput(filename, f"no checkpoint to read ({error.strerror})", remedy) from None
    except Exception as error:  # a broken file makes torch raise whatever it likes
        if "allocate memory" in str(error):
            raise
        what = "no checkpoint of tensors and plain values with a state_dict, or cut off"
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
        raise ValueError(f"from 1 or 3 channels to classes were expected, {channels} to {classes}")
    return {"in_channels": channels, "out_channels": classes, "features": features}


def start_from(model, checkpoint):
    """Take over a checkpoint's weights; of one for other classes, all but the last layer."""
    weights, count = checkpoint["state_dict"], len(checkpoint["classes"])
    if count != model.final_conv.out_channels:
        weights = {k: v for k, v in weights.items() if not k.startswith("final_conv")}
        print(f"The last layer, for {count} classes there, starts anew")
    model.load_state_dict(weights, strict=False)


def labels_of(checkpoint):
    """How the run of a checkpoint read the values in masks: Labels. Raises one of UNUSABLE."""
    settings = checkpoint.get("settings", {})
    values, ignore = settings.get("mask_value") or (), settings.get("ignore")
    numbers = tuple(map(int, values)), None if ignore is None else int(ignore)
    return Labels(len(checkpoint["classes"]), *numbers)


def check_facts(checkpoint, network):
    """Raises one of UNUSABLE where what a checkpoint says beside its weights, of a network of these
    arguments, makes no sense."""
    labels_of(checkpoint)
    channels, classes, crop = network["in_channels"], checkpoint["classes"], checkpoint["crop"]
    size, scale = list(checkpoint["image_size"]), dict(checkpoint["normalization"])
    mean, std = (v if isinstance(v, (list, tuple)) else [v] for v in (scale["mean"], scale["std"]))
    numbers = [*mean, *std, scale["max_pixel_value"]]
    plain = all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
    fits = {
        "image_size": len(size) == 2 and all(type(n) is int and 0 < n <= MAX_SIDE for n in size),
        "threshold": isinstance(checkpoint["threshold"], float) and 0 < checkpoint["threshold"] < 1,
        "val_fraction": 0 <= float(checkpoint.get("val_fraction", 0)) <= 1,
        "classes": len(classes) == network["out_channels"] and set(map(type, classes)) == {str},
        "crop": crop is None or type(crop) is int and 0 < crop <= MAX_SIDE,
        "normalization": plain and {len(mean), len(std)} <= {1, channels} and len(scale) == 3,
    }
    for name in fits:
        if not fits[name] or name == "normalization" and min(*std, scale["max_pixel_value"]) <= 0:
            raise ValueError(f"{name} is {short(checkpoint[name])}")


def check_history(history, columns):
    """The rows of a history, one an epoch. Raises one of UNUSABLE where one lacks a column."""
    for number, row in enumerate(history, start=1):
        finite = all(math.isfinite(value) for value in row.values())
        if not row.keys() >= set(columns) or row["epoch"] != number or not finite:
            raise ValueError(f"row {number} of the history is {short(row)}")
    return list(history)


def check_progress(part):
    """How far an epoch is, {name: value}. Raises one of UNUSABLE where that makes no sense."""
    order, photos = part["order"] if "photos" not in part else (part["order"], part["photos"])
    step, seen, seconds = part["step"], part["seen"], part["seconds"]
    if not 0 < step <= seen <= photos or not 0 < seconds < math.inf:
        raise ValueError(f"its epoch under way is {short(part)}")
    losses = torch.as_tensor(part["loss_sum"], dtype=torch.float64)  # several in older ones
    return part | {"photos": photos, "order": order, "loss_sum": losses.sum().item()}


def load_optimizer(optimizer, saved):
    """Take over a saved optimizer's state, of one of the same kind. Raises one of UNUSABLE.

    Its tensors may lie in memory in another order than the parameters, as on another device: they
    are laid out as the parameters are, for fused steps do not look.
    """
    muon = isinstance(optimizer, Muon)
    parameters, state = optimizer.param_groups[0]["params"], {}
    for number, kept in saved["state"].items():
        state[number] = {"step": torch.tensor(float(kept["step"]))}
        for name in moment_names(parameters[number]) if muon else ("exp_avg", "exp_avg_sq"):
            if kept[name].shape != parameters[number].shape:
                raise ValueError(f"{name} is {list(kept[name].shape)}")
            state[number][name] = torch.empty_like(parameters[number]).copy_(kept[name])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    optimizer.param_groups[0]["lr"] = float(saved["param_groups"][0]["lr"])


def short(value):
    """A value of a checkpoint's in a message."""
    return printable(reprlib.repr(value))
