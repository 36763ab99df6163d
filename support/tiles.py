"""A network's answer to images of any size, put together from overlapping tiles of one size."""

import math

import torch

STRIDE = 0.75  # of a tile's side: neighbours overlap by a quarter or more


class TiledNetwork(torch.nn.Module):
    """A network trained on crops of `side` pixels, that takes images of any size.

    Shape: images (N, C, H, W) -> logits (N, K, H, W), float32.
    """

    def __init__(self, network, side):
        super().__init__()
        self.network = network
        self.side = side
        self.train(network.training)

    def forward(self, images):
        return in_tiles(self.network, images, self.side)


def in_tiles(network, images, side):
    """Logits (N, K, H, W), float32, of images (N, C, H, W), put together from tiles.

    `network` takes tiles (N, C, h, w), h and w at most `side`, and returns logits (N, K, h, w). A
    tile counts less towards its edge, where the network sees less around a pixel.
    """
    result = None
    for top, weights_down in tile_weights(images.shape[-2], side):
        for left, weights_right in tile_weights(images.shape[-1], side):
            tile = images[..., top : top + side, left : left + side]
            logits = network(tile)
            if result is None:
                shape = (*logits.shape[:2], *images.shape[-2:])
                result = torch.zeros(shape, dtype=torch.float32, device=logits.device)
            weights = torch.outer(weights_down, weights_right).to(logits.device)
            place = result[..., top : top + side, left : left + side]
            place += logits * weights
    return result


def tile_weights(length, side):
    """[(start, weights)] of the tiles along one side of an image, `length` pixels long; the weights
    of each pixel add up to 1."""
    n_tiles = 1 + max(0, math.ceil((length - side) / (STRIDE * side)))
    starts = torch.linspace(0, max(0, length - side), n_tiles).round().long().tolist()
    ramp = torch.arange(1.0, side + 1)
    ramp = torch.minimum(ramp, ramp.flip(0))[:length]  # 1, 2, ..., 2, 1
    total = torch.zeros(length)
    for start in starts:
        total[start : start + side] += ramp
    return [(start, ramp / total[start : start + side]) for start in starts]
