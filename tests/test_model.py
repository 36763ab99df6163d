"""The network: sizes and the classic state dict."""

import pytest
import torch
from torch.nn import functional as F

from model import UNet


@pytest.mark.parametrize(
    "features, parameters",
    [((64, 128, 256, 512), 31_037_633), ((64, 128), 1_864_129), ((16, 32, 64, 128), 1_942_577)],
)
def test_parameter_counts_are_the_classic_ones(features, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(features=features).parameters()) == parameters


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16), (17, 33), (31, 48), (64, 47)])
@pytest.mark.parametrize("channels, features", [(1, (4,)), (3, (4, 8, 16)), (3, (2,) * 5)])
def test_logits_have_the_size_of_any_input(size, channels, features):
    model = UNet(in_channels=channels, features=features).eval()
    assert model(torch.rand(2, channels, *size)).shape == (2, 1, *size)


def functional_unet(w, x, levels):
    """The same network from the classic state dict's keys alone."""

    def double_conv(x, key):
        for conv, norm in ((0, 1), (3, 4)):
            x = F.conv2d(x, w[f"{key}.conv.{conv}.weight"], padding=1)
            parts = ("running_mean", "running_var", "weight", "bias")
            mean, var, gain, bias = (w[f"{key}.conv.{norm}.{p}"][:, None, None] for p in parts)
            x = ((x - mean) / torch.sqrt(var + 1e-5) * gain + bias).clamp(min=0)
        return x

    skips = []
    for level in range(levels):
        x = double_conv(x, f"downs.{level}")
        skips.append(x)
        x = F.max_pool2d(x, 2)
    x = double_conv(x, "bottleneck")
    for level in range(levels):
        skip, key = skips.pop(), f"ups.{2 * level}"
        x = F.conv_transpose2d(x, w[f"{key}.weight"], w[f"{key}.bias"], stride=2)
        padded = torch.zeros_like(skip)
        padded[..., : x.shape[2], : x.shape[3]] = x
        x = double_conv(torch.cat([skip, padded], 1), f"ups.{2 * level + 1}")
    return F.conv2d(x, w["final_conv.weight"], w["final_conv.bias"])


@pytest.mark.parametrize("size", [(32, 48), (37, 45)])
def test_a_classic_state_dict_gives_the_logits_of_an_independent_forward(size):
    torch.manual_seed(0)
    model = UNet(features=(8, 16, 32)).double().eval()
    state = {name: torch.rand(tensor.shape) - 0.4 for name, tensor in model.state_dict().items()}
    state |= {name: tensor.abs() + 0.5 for name, tensor in state.items() if "running_var" in name}
    model.load_state_dict(state)
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    expected = functional_unet(model.state_dict(), x, levels=3)
    assert torch.allclose(model(x), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_parameters_stand_in_the_classic_order():
    # A classic checkpoint's optimizer refers to them by number.
    groups = [name.split(".")[0] for name, _ in UNet(features=(4, 8)).named_parameters()]
    assert list(dict.fromkeys(groups)) == ["ups", "downs", "bottleneck", "final_conv"]
