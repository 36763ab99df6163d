import pytest
import torch

from model import UNet
from support.tiles import TiledNetwork, in_tiles


@pytest.mark.parametrize("size", [(32, 32), (33, 70), (20, 30), (9, 100)])
def test_a_tiled_network_takes_images_of_any_size_in_tiles(size):
    network = UNet(features=(4, 8), out_channels=2).eval()
    tiled = TiledNetwork(network, 32)
    images = torch.rand(2, 3, *size)
    with torch.inference_mode():
        logits = tiled(images)
        assert torch.equal(logits, in_tiles(network, images, 32))
    assert logits.shape == (2, 2, *size) and logits.dtype == torch.float32


def test_an_image_of_one_tile_gets_the_networks_own_answer():
    network = UNet(features=(4, 8)).eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(TiledNetwork(network, 32)(images), network(images), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_float32_whatever_the_network_computes_in(dtype):
    tiled = TiledNetwork(torch.nn.Identity(), 8)
    assert tiled(torch.ones(1, 1, 20, 20, dtype=dtype)).dtype == torch.float32


def test_a_tiled_network_trains_evaluates_and_moves_with_the_network_in_it():
    network = UNet(features=(4,))
    tiled = TiledNetwork(network, 8).eval()
    assert not network.training and tiled.network is network
    assert list(tiled.parameters()) == list(network.parameters())
