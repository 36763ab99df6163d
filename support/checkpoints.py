"""What a run's checkpoint holds: packed for saving, unpacked for resuming."""

import dataclasses

import torch
from pydantic import TypeAdapter

from support.checkpoint_files import FINITE, UNUSABLE, first_of, one_line, short
from support.distributed import rank
from support.errors import BadInput
from support.flags import flag_of
from support.run import EpochProgress

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
        take_normalization(run, checkpoint)
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


def take_normalization(run, checkpoint):
    """Take over the normalization that a checkpoint's weights were trained with."""
    saved = checkpoint["normalization"]
    if as_lists(saved) != as_lists(run.normalization):
        print(f"normalization: the checkpoint's counts, {saved}, instead of {run.normalization}")
    run.normalization = saved


def as_lists(normalization):
    """A normalization whose tuples are lists, for comparing."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in normalization.items()
    }


def load_optimizer(optimizer, saved):
    """Take over the state that an optimizer saved; prints a line if it does not fit.

    Works for any optimizer: its own step makes the state first, by a step of length 0, so that the
    names, shapes and memory layout of all tensors are those that it expects.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        if saved["state"]:
            make_state(optimizer, parameters)
        for number, parameter in enumerate(parameters):
            copy_state(saved["state"].get(number, {}), optimizer.state[parameter])
        for group, kept in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group["lr"] = float(kept["lr"])
    except UNUSABLE as error:
        optimizer.state.clear()
        print(f"The optimizer starts without the checkpoint's state ({one_line(error)})")


def copy_state(kept, fresh):
    """Copy the saved state of one parameter into what the optimizer has made for it.

    Raises ValueError where names or shapes differ.
    """
    if kept.keys() != fresh.keys():
        raise ValueError(f"it has {short(list(kept))}, not {short(list(fresh))}")
    for name, value in kept.items():
        if not torch.is_tensor(fresh[name]):
            fresh[name] = value
        elif torch.as_tensor(value).shape != fresh[name].shape:
            raise ValueError(f"{name} has another shape than its parameter")
        else:
            fresh[name].copy_(torch.as_tensor(value))


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


def start_from(run, checkpoint):
    """Take over the tensors of another run's checkpoint that fit, and its normalization.

    Prints which tensors do not fit. Raises BadInput if none does.
    """
    weights, own = checkpoint["state_dict"], run.model.state_dict()
    fitting = {
        name: tensor
        for name, tensor in weights.items()
        if name in own and tensor.shape == own[name].shape
    }
    if not fitting:
        reason = "no tensor of it fits the network of model.py"
        raise BadInput("--pretrained", reason, "name another file")
    run.model.load_state_dict(fitting, strict=False)
    take_normalization(run, checkpoint)
    others = own.keys() - fitting.keys()
    if others:
        print(f"These do not fit, so they start with random weights: {first_of(others)}")
