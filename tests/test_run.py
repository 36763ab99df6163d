import argparse

import pytest
import torch

from model import UNet
from run import Run

SETTINGS = {
    "seed": 0,
    "in_channels": 3,
    "features": [4],
    "checkpoint_activations": False,
    "sync_batchnorm": False,
    "compile": False,
    "optimizer": "adam",
    "learning_rate": 0.1,
    "scheduler": "none",
    "step_size": 2,
    "gamma": 0.1,
    "num_epochs": 6,
    "ema": 0.0,
    "clip_grad": 0.0,
    "threshold": 0.5,
    "image_height": 8,
    "image_width": 8,
}


def settings(**changes):
    return argparse.Namespace(**SETTINGS | changes)


def run_with_gradients(size, **changes):
    run = Run(settings(**changes), torch.device("cpu"))
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, size)
    return run


@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_gradients_are_clipped_to_their_norm(norm, monkeypatch):
    run = run_with_gradients(3.0, clip_grad=norm, optimizer="sgd")
    seen = []
    monkeypatch.setattr(
        run.optimizer,
        "step",
        lambda: seen.extend(parameter.grad.clone() for parameter in run.model.parameters()),
    )
    run.step(0)
    total = torch.cat([gradient.flatten() for gradient in seen]).norm().item()
    assert total == pytest.approx(norm, rel=1e-3) if norm else total > 100


def test_the_average_moves_by_its_share_and_is_what_the_checkpoint_offers():
    run = run_with_gradients(1.0, ema=0.7, optimizer="sgd")
    run.history = [{"epoch": 1, "dice": 0.5}]
    weight = run.model.final_conv.weight
    run.step(0)  # the first step's weights are where the average starts
    average = weight.detach().clone()
    for steps in range(1, 30):
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.step(0)
        decay = min(0.7, (1 + steps) / (10 + steps))
        average = decay * average + (1 - decay) * weight.detach()
    state = run.state({})
    assert torch.allclose(state["state_dict"]["final_conv.weight"], average, atol=1e-6)
    assert torch.equal(state["raw_state_dict"]["final_conv.weight"], weight)
    assert state["state_dict"].keys() == UNet(features=(4,)).state_dict().keys()
    assert "raw_state_dict" not in run_with_no_average().state({})


def run_with_no_average():
    run = Run(settings(), torch.device("cpu"))
    run.history = [{"epoch": 1, "dice": 0.5}]
    return run
