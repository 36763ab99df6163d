"""A network's answer to an image of any size, put together from tiles of one size."""

import math

import torch


def in_tiles(answer, images, side):
    """Logits (N, K, H, W) of images (N, C, H, W), put together from `answer(tile)` of tiles of
    `side` pixels that overlap by a quarter or more. Towards its edge, where the network sees less
    around a pixel, a tile counts less."""
    result = None
    for top, weights_down in tile_weights(images.shape[-2], side):
        for left, weights_right in tile_weights(images.shape[-1], side):
            tile = images[..., top : top + side, left : left + side]
            logits = answer(tile)
            if result is None:
                shape = *logits.shape[:2], *images.shape[-2:]
                result = torch.zeros(shape, device=logits.device)
            place = result[..., top : top + side, left : left + side]
            place += logits * torch.outer(weights_down, weights_right).to(logits.device)
    return result


def tile_weights(length, side):
    """[(start, weights)] of tiles along one side of an image; a pixel's weights add up to 1."""
    count = 1 + max(0, math.ceil((length - side) / (0.75 * side)))
    starts = torch.linspace(0, max(0, length - side), count).round().long().tolist()
    ramp = torch.arange(1.0, side + 1)
    ramp, total = torch.minimum(ramp, ramp.flip(0)), torch.zeros(length)
    for start in starts:
        total[start : start + side] += ramp[:length]
    return [(start, ramp[:length] / total[start : start + side]) for start in starts]
