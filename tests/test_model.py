import copy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from model import UNet


@pytest.mark.parametrize(
    "features, parameters",
    [((64, 128, 256, 512), 31_037_633), ((64, 128), 1_864_129), ((16, 32, 64, 128), 1_942_577)],
)
def test_parameter_counts_are_the_classic_ones(features, parameters):
    assert sum(p.numel() for p in UNet(features=features).parameters()) == parameters


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (16, 16), (17, 33), (31, 48), (64, 47)])
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_have_the_size_of_any_input(height, width, channels):
    model = UNet(in_channels=channels, features=(4, 8, 16)).eval()
    assert model(torch.rand(2, channels, height, width)).shape == (2, 1, height, width)


def test_any_number_of_levels():
    for features in ((4,), (4, 8), (4, 4, 4, 4, 4)):
        assert UNet(features=features).eval()(torch.rand(1, 3, 32, 48)).shape == (1, 1, 32, 48)


def functional_unet(w, x, levels):
    """The same network from the classic state dict's keys alone, in float64."""

    def double_conv(x, key):
        for conv, norm in ((0, 1), (3, 4)):
            x = F.conv2d(x, w[f"{key}.conv.{conv}.weight"], padding=1)
            mean, var = w[f"{key}.conv.{norm}.running_mean"], w[f"{key}.conv.{norm}.running_var"]
            x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
            gain, bias = w[f"{key}.conv.{norm}.weight"], w[f"{key}.conv.{norm}.bias"]
            x = (x * gain[:, None, None] + bias[:, None, None]).clamp(min=0)
        return x

    skips = []
    for level in range(levels):
        x = double_conv(x, f"downs.{level}")
        skips.append(x)
        x = F.max_pool2d(x, 2)
    x = double_conv(x, "bottleneck")
    for level in range(levels):
        skip = skips.pop()
        x = F.conv_transpose2d(
            x, w[f"ups.{2 * level}.weight"], w[f"ups.{2 * level}.bias"], stride=2
        )
        padded = torch.zeros(skip.shape, dtype=x.dtype)
        padded[..., : x.shape[2], : x.shape[3]] = x
        x = double_conv(torch.cat([skip, padded], 1), f"ups.{2 * level + 1}")
    return F.conv2d(x, w["final_conv.weight"], w["final_conv.bias"])


@pytest.mark.parametrize("size", [(32, 48), (37, 45)])
def test_a_classic_state_dict_gives_the_logits_of_an_independent_forward(size):
    torch.manual_seed(0)
    model = UNet(features=(8, 16, 32)).eval()
    state = {
        key: value if key.endswith("num_batches_tracked") else torch.rand(value.shape) - 0.4
        for key, value in model.state_dict().items()
    }
    state |= {key: value.abs() + 0.5 for key, value in state.items() if "running_var" in key}
    model.load_state_dict(state)
    x = torch.rand(2, 3, *size)

    expected = functional_unet({k: v.double() for k, v in state.items()}, x.double(), levels=3)

    scale = expected.abs().max().item()
    assert (model(x).double() - expected).abs().max().item() / scale < 1e-5


def test_checkpointed_activations_change_neither_gradients_nor_statistics():
    torch.manual_seed(0)
    model = UNet(features=(4, 8))
    x, start = torch.rand(2, 3, 21, 30), copy.deepcopy(model.state_dict())
    results = []
    for model.checkpoint_activations in (False, True):
        model.load_state_dict(start)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append([*gradients, *(buffer.clone() for buffer in model.buffers())])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_parameters_stand_in_the_classic_order():
    # A classic checkpoint's optimizer refers to them by number.
    groups = [name.split(".")[0] for name, _ in UNet(features=(4, 8)).named_parameters()]
    assert list(dict.fromkeys(groups)) == ["ups", "downs", "bottleneck", "final_conv"]


def test_model_py_prints_a_short_summary():
    out = subprocess.run([sys.executable, ROOT / "model.py"], capture_output=True, text=True)
    assert "31,037,633 parameters" in out.stdout and "1024 x 10 x 15" in out.stdout
    assert len(out.stdout.splitlines()) < 20 and not out.stderr
