"""Checkpoints as untrusted input: nothing in them is run, and all that they say is checked."""

import dataclasses
import os
import reprlib
import zipfile
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, PositiveFloat
from pydantic.dataclasses import dataclass

from support.errors import BadInput, printable, short_path
from support.flags import GroupPattern, PixelValue, Side
from support.masks import MAX_CLASSES, Labels
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
WEIGHTS_KEYS = ("state_dict", "model_state_dict", "model", "net")
ORIGINS = {  # a tensor that tells whose network it is
    "inc.double_conv.0.weight": "milesial/Pytorch-UNet",
    "segmentation_head.0.weight": "segmentation_models.pytorch",
}
LFS_POINTER = b"version https://git-lfs"
# What Python, torch and pydantic raise for contents that are not what they should be.
UNUSABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
FINITE = ConfigDict(allow_inf_nan=False)

# What a checkpoint says ---------------------------------------------------------------------------


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
        with open(filename, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                remedy = "fetch the file with git lfs pull"
                raise BadInput(filename, "a Git LFS pointer, not the checkpoint itself", remedy)
        with zipfile.ZipFile(filename) as archive:  # as torch.save writes since PyTorch 1.6
            declared = sum(member.file_size for member in archive.infolist())
        if declared > os.path.getsize(filename):
            raise ValueError("it declares more than it holds")
        checkpoint = with_weights(torch.load(filename, map_location="cpu", weights_only=True))
        if not all(isinstance(checkpoint.get(name, {}), dict) for name in DICTS):
            raise TypeError("a part that should be a dict is not")
    except BadInput:
        raise
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


def with_weights(content):
    """A checkpoint whose weights are in `state_dict`, however they were saved.

    Weights may be a bare state dict, or stand under one of WEIGHTS_KEYS, with prefixes that DDP or
    torch.compile add. Raises UNUSABLE.
    """
    for key in WEIGHTS_KEYS:
        weights = content.get(key)
        if isinstance(weights, dict) and any(map(torch.is_tensor, weights.values())):
            others = {name: value for name, value in content.items() if name != key}
            return others | {"state_dict": without_prefix(weights)}
    if content and all(map(torch.is_tensor, content.values())):
        return {"state_dict": without_prefix(content)}
    raise KeyError("state_dict")


def without_prefix(weights):
    """A state dict without the prefixes of DDP and torch.compile."""
    for prefix in ("module.", "_orig_mod.") * 2:  # either may be the outer one
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def origin_of(checkpoint):
    """Whose checkpoint this looks like, in words; "" if nothing tells."""
    if any("lightning" in str(key) for key in checkpoint):
        return "; it looks like a checkpoint of PyTorch Lightning"
    for name, project in ORIGINS.items():
        if name in checkpoint["state_dict"]:
            return f"; it looks like a network of {project}"
    return ""


def find_checkpoint(*candidates):
    """The first of these paths that exists, else the last."""
    return short_path(next((path for path in candidates if path.exists()), candidates[-1]))


def network_arguments(checkpoint):
    """The arguments of UNet: those that a checkpoint stores, else read off its tensors' shapes.

    Raises UNUSABLE.
    """
    weights = checkpoint["state_dict"]
    arguments = dict(checkpoint["model"]) if "model" in checkpoint else read_off(weights)
    channels, classes = arguments["in_channels"], arguments["out_channels"]
    if channels not in (1, 3) or not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"a network from {short(channels)} channels to {short(classes)} classes")
    if len(arguments.get("features", ())) > len(weights):
        raise ValueError("more levels than tensors")
    return arguments


def read_off(weights):
    """The arguments of a UNet whose tensors have the classic names. Raises UNUSABLE."""
    levels = sum(f"downs.{level}.conv.0.weight" in weights for level in range(len(weights)))
    features = [weights[f"downs.{level}.conv.0.weight"].shape[0] for level in range(levels)]
    return {
        "in_channels": weights["downs.0.conv.0.weight"].shape[1],
        "out_channels": weights["final_conv.weight"].shape[0],
        "features": features,
    }


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


def why_unfit(model, weights):
    """Why a state dict does not fit a model, in words; None if it does."""
    own = model.state_dict()
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    shapes = {
        name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
    }
    found = {"lacks": missing, "has also": unknown, "has other shapes of": shapes}
    return "; ".join(f"it {verb} {first_of(names)}" for verb, names in found.items() if names)


def first_of(names, most=3):
    """The first few of some names, for a message."""
    listed = ", ".join(printable(name) for name in sorted(names)[:most])
    return f"{listed}, ..." if len(names) > most else listed


def one_line(error):
    """An error's text, on one line, for a message."""
    return printable(" ".join(str(error).split())[:300])


def short(value):
    """A value from a checkpoint, for a message."""
    return printable(reprlib.repr(value))
