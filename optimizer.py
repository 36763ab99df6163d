"""How the weights change: optimizers, their learning rate over a run, the weights' average."""

import math

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

WARM_UP = 0.3  # share of the run in which the learning rate of "onecycle" rises


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


def load_moments(optimizer, kind, saved):
    """Take over the state of a saved optimizer of the same kind.

    Its tensors may lie in memory in another order than the parameters, as on another device, which
    the fused steps do not look at: they are laid out as the parameters are. Raises exceptions of
    any kind where they are not what the optimizer keeps.
    """
    names = ["momentum_buffer"] if kind == "sgd" else ["exp_avg", "exp_avg_sq"]
    own, state = optimizer.state_dict(), {}
    for number, kept in saved["state"].items():
        parameter = optimizer.param_groups[0]["params"][number]
        state[number] = {} if kind == "sgd" else {"step": torch.tensor(float(kept["step"]))}
        for name in names:
            if kept[name].shape != parameter.shape:
                raise ValueError(f"{name} is {list(kept[name].shape)}")
            state[number][name] = torch.empty_like(parameter).copy_(kept[name])
    optimizer.load_state_dict(own | {"state": state})
    for group in optimizer.param_groups:
        group["lr"] = float(saved["param_groups"][0]["lr"])


def moving_average(decay):
    """For AveragedModel: an exponential moving average that forgets faster over its first steps.

    The decay after n steps is (1 + n) / (10 + n), up to `decay`: the random weights of the start
    would count for as long as they do for 500 steps at 0.998.
    """

    def update(averaged, current, steps):
        steps = int(steps)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, steps)

    return update
