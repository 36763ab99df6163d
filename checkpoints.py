"""Checkpoints: written whole, and read as if a stranger had made them.

Nothing in a file is run, and no memory is taken that the file itself does not fill: what it
declares is held to the network that its tensors' shapes describe before any of that is built.
"""

import math
import os
import pickle
import pickletools
import reprlib
import warnings
import zipfile

import torch

from augment import MAX_PIXEL_VALUE, MEAN, STD
from files import BadInput, nearby, printable, shown, write_aside
from model import UNet

CHECKPOINT, BEST_CHECKPOINT = "my_checkpoint.pth.tar", "best_checkpoint.pth.tar"
SHIPPED = "weights/unet_carvana_small.pth"

# What a network can have at most; the default has 4 levels and 512 channels.
MAX_LEVELS, MAX_CHANNELS = 12, 8192
LARGEST = 1e30  # of other numbers, of which some would not fit a float
MAX_SIDE, MAX_AREA = 16384, 2**24  # pixels of the photos that it sees

STRANGE = ("bytearray", "encode")  # torch calls these too, which make much of little
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # whose sizes cannot be checked first

# What a checkpoint of the classic recipe does not say.
CLASSIC = {
    "image_size": [160, 240],  # height, width
    "normalization": {"mean": MEAN, "std": STD, "max_pixel_value": MAX_PIXEL_VALUE},
    "threshold": 0.5,
}


def save_checkpoint(state, filename=CHECKPOINT):
    """Write a dict of tensors and plain values, whole or not at all (see write_aside)."""
    with write_aside(filename) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # how torch reports that the file took no more
            if "DataLoader" in str(error):  # a data worker that died at this moment
                raise
            raise OSError(f"{error}".splitlines()[0]) from error


def save_weights(checkpoint_file, filename):
    """Write of a checkpoint what evaluation and --pretrained need, the convolutions in float16.

    A twentieth of the size of the checkpoint, for passing on.
    """
    checkpoint = load_checkpoint(checkpoint_file)
    kept = ("model", "image_size", "normalization", "threshold")
    weights = {
        name: tensor.half() if tensor.dim() == 4 else tensor
        for name, tensor in checkpoint["state_dict"].items()
    }
    save_checkpoint({"state_dict": weights} | {name: checkpoint[name] for name in kept}, filename)


def find_checkpoint(*candidates):
    """The first of these paths that exists, else the last."""
    return nearby(next((path for path in candidates if path.exists()), candidates[-1]))


def load_checkpoint(filename=CHECKPOINT, model=None):
    """Read a checkpoint of ours, or a classic one with only `state_dict` and `optimizer`.

    Args:
        filename: the file; nothing in it is run (weights_only).
        model: a UNet that takes over the weights, if given.

    Returns the dict, on the CPU, with `model` (the arguments of UNet, read off the tensors' shapes)
    and what CLASSIC holds filled in where it is missing. Its weights are those of such a UNet, and
    finite. Raises BadInput.
    """
    try:
        declared_sizes(filename)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles, which are refused below
            checkpoint = torch.load(filename, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(
            f"{shown(filename)}: no such checkpoint: train one with python train.py"
        ) from None
    except (PermissionError, IsADirectoryError) as error:
        raise BadInput(
            f"{shown(filename)}: cannot be read ({error.strerror}): name a file"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes torch raise whatever it likes
        if "allocate memory" in str(error):
            raise
        problem = "no checkpoint, or cut off: use another copy"
        if isinstance(error, BadInput):
            problem = error
        elif isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            problem = (
                "holds more than tensors and plain values, and could run code if it were loaded: "
                "get it from someone you trust"
            )
        raise BadInput(f"{shown(filename)}: {problem}") from None

    problem = "no dict with a state_dict was found"
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict):
        checkpoint = CLASSIC | checkpoint
        problem = unlike_a_unet(checkpoint) or out_of_bounds(checkpoint)
    if problem:
        raise BadInput(f"{shown(filename)}: no checkpoint of a U-Net: {problem}: name another file")
    if model is not None:
        load_weights(model, checkpoint, filename)
    return checkpoint


def declared_sizes(filename):
    """Hold what the file says it contains to its own size, since torch believes it.

    Raises BadInput, without the file's name, or what zipfile and the system raise.
    """
    with open(filename, "rb") as file:
        if file.read(len(OLD_FORMAT)) == OLD_FORMAT:
            raise BadInput("saved as before PyTorch 1.6: load and save it again with a newer one")
    with zipfile.ZipFile(filename) as archive:  # as torch.save writes since PyTorch 1.6
        members = archive.infolist()
        if min(member.header_offset for member in members) != 0:
            raise BadInput("begins with something else, where others look: use another copy")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise BadInput("is compressed, as torch.save leaves no file: use another copy")
        for member in members:
            if member.filename.endswith("data.pkl"):
                refuse_strange(archive.read(member))
    size, declared = os.path.getsize(filename), sum(member.file_size for member in members)
    if declared > size:
        raise BadInput(f"declares {declared} bytes in a file of {size}: use another copy")


def refuse_strange(pickled):
    """Raises BadInput, without the file's name, for a pickle that calls one of STRANGE."""
    for code, value, _ in pickletools.genops(pickled):
        if code.name == "GLOBAL" and value.split()[-1] in STRANGE:
            raise BadInput(
                f"holds more than tensors and plain values ({printable(value)}): get it from "
                "someone you trust"
            )


def unlike_a_unet(checkpoint):
    """What is wrong with a checkpoint's weights, in words, or None; sets its `model`.

    Compared with a network that takes no memory, on the device "meta".
    """
    weights = checkpoint["state_dict"]
    arguments = checkpoint["model"] = model_arguments(weights)
    if arguments is None:
        found = ", ".join(printable(name) for name in list(weights)[:3])
        return (
            "tensors such as downs.0.conv.0.weight and final_conv.weight were expected, "
            f"{found or 'none'} found"
        )
    if arguments["out_channels"] != 1 or arguments["in_channels"] not in (1, 3):
        return (
            "from 1 or 3 channels to 1 were expected, from {in_channels} to {out_channels} found"
        ).format(**arguments)
    if len(arguments["features"]) > MAX_LEVELS or max(arguments["features"]) > MAX_CHANNELS:
        found = f"{len(arguments['features'])} and {max(arguments['features'])}"
        return f"up to {MAX_LEVELS} levels and {MAX_CHANNELS} channels were expected, {found} found"

    if any(tensor_size(tensor) > stored_size(tensor) for tensor in tensors_of(checkpoint)):
        return "a tensor declares more than the file holds"
    stored = {t.untyped_storage().data_ptr(): stored_size(t) for t in tensors_of(weights)}
    if sum(map(tensor_size, tensors_of(weights))) > sum(stored.values()):
        return "its weights declare more than the file holds"
    with torch.device("meta"):
        expected = UNet(**arguments).state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    problems += [f"{printable(name)} is unexpected" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        if wrong := wrong_tensor(weights[name], expected[name]):
            problems.append(f"{name}: {wrong}")
    more = [f"and {len(problems) - 3} more"] if len(problems) > 3 else []
    return "; ".join(sorted(problems)[:3] + more) or None


def model_arguments(weights):
    """The arguments of UNet that give a network of these tensors, or None."""
    first = [f"downs.{i}.conv.0.weight" for i in range(len(weights))]
    levels = sum(name in weights for name in first)
    try:
        features = [int(weights[name].shape[0]) for name in first[:levels]]
        ends = int(weights[first[0]].shape[1]), int(weights["final_conv.weight"].shape[0])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        return None
    if not features or min(*features, *ends) < 1:
        return None
    return {"in_channels": ends[0], "out_channels": ends[1], "features": features}


def tensors_of(checkpoint):
    """All tensors in dicts and lists; each of these once, however often it is repeated."""
    rest, seen = [checkpoint], set()
    while rest:
        item = rest.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            rest += item.values() if isinstance(item, dict) else item


def tensor_size(tensor):
    """Bytes that a tensor takes once it is copied."""
    return tensor.numel() * tensor.element_size()


def stored_size(tensor):
    """Bytes that a tensor takes in a file; of a sparse one and the like, none."""
    return tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0


def wrong_tensor(found, expected):
    """What is wrong with one of the weights, or None."""
    if not isinstance(found, torch.Tensor):
        return f"a tensor was expected, {type(found).__name__} found"
    if found.shape != expected.shape:
        return f"{list(expected.shape)} was expected, {list(found.shape)} found"
    plain = found.layout == torch.strided and found.device.type == "cpu" and not found.is_quantized
    if not plain or found.is_floating_point() != expected.is_floating_point():
        return f"{expected.dtype} was expected, {found.dtype} ({found.layout}) found"
    if not found.float().isfinite().all():
        return "numbers were expected, nan or inf found"
    return None


def out_of_bounds(checkpoint):
    """What is wrong with what a checkpoint says beside its weights, in words, or None."""
    size, n = checkpoint["image_size"], checkpoint["normalization"]
    if not (numbers(size, 2, int) and all(0 < side <= MAX_SIDE for side in size)):
        return f"image_size: two numbers up to {MAX_SIDE} were expected, {short(size)} found"
    if math.prod(size) > MAX_AREA:
        return f"image_size: at most {MAX_AREA} pixels were expected, {math.prod(size)} found"
    threshold = checkpoint["threshold"]
    if not (numbers([threshold], 1) and 0 < threshold < 1):
        return f"threshold: a number between 0 and 1 was expected, {short(threshold)} found"
    fraction = checkpoint.get("val_fraction", 0.5)
    if not (numbers([fraction], 1) and 0 <= fraction <= 1):
        return f"val_fraction: a number from 0 to 1 was expected, {short(fraction)} found"
    if not normalizes(n, checkpoint["model"]["in_channels"]):
        return f"normalization: mean, std and max_pixel_value were expected, {short(n)} found"
    return None


def normalizes(found, channels):
    """Whether this is a normalization: numbers for all channels together or for each."""
    if not isinstance(found, dict) or found.keys() != CLASSIC["normalization"].keys():
        return False
    lists = {name: v if isinstance(v, (list, tuple)) else [v] for name, v in found.items()}
    fits = all(len(v) in (1, channels) and numbers(v, len(v)) for v in lists.values())
    return fits and min(*lists["std"], *lists["max_pixel_value"]) > 0


def numbers(values, count, kind=(int, float)):
    """Whether this is a list of so many finite numbers."""
    listed = isinstance(values, (list, tuple)) and len(values) == count
    return listed and all(isinstance(value, kind) and abs(value) < LARGEST for value in values)


def short(value):
    """A value of a checkpoint's in a message."""
    return printable(reprlib.repr(value))


def load_weights(model, checkpoint, filename):
    """Put a checkpoint's weights into a model. Raises BadInput where they do not fit."""
    try:
        model.load_state_dict(dict(checkpoint["state_dict"]))  # without notes on versions
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"{shown(filename)}: its weights do not fit the network: {reason}: name another file"
        ) from None


def build_model(checkpoint, filename, device):
    """The network of a checkpoint that load_checkpoint gave, on a device, in evaluation mode."""
    model = UNet(**checkpoint["model"])
    load_weights(model, checkpoint, filename)
    return model.to(device, memory_format=torch.channels_last).eval()
