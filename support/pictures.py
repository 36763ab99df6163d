"""The pictures made of a photo and what the network says of it: cut-outs, overlays, masks.

Everywhere: photo is an RGB image; mask (H, W), uint8, 0 and 255, or with colours (1 + K, 3) the
number of each pixel's class; logits (H, W), float32, at the photo's size, of the object or of the
likeliest class; threshold a probability. Pictures are Pillow's images, of the photo's size and
info.
"""

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from support.scores import label_map, logit, predicted_masks
from support.writing import save_picture, write_aside

EDGE = 0.1  # of a cut-out: wholly transparent below this probability, opaque above 1 - EDGE
TINT = (40, 120, 255)  # of what the mask covers, in an overlay
MASK_PNG = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]  # the fastest, and the smallest


def sigmoid(logits):
    """Probabilities, in the place of the logits: large photos have many."""
    return torch.from_numpy(logits).sigmoid_().numpy()


def scale(logits, size):
    """Logits (K, h, w) at another size, (H, W)."""
    if logits.shape[1:] == tuple(size):
        return logits
    return np.stack([cv2.resize(channel, size[::-1]) for channel in logits])


def find_objects(logits, threshold):
    """The mask of logits (K, H, W): of 0 and 255, or for K above 1 of 0 and 1 to K."""
    mask = np.empty(logits.shape[1:], np.uint8)
    for top in range(0, len(mask), 256):  # all at once would take several times the logits' memory
        rows = slice(top, top + 256)
        found = predicted_masks(torch.from_numpy(logits[:, rows]), threshold)
        mask[rows] = label_map(found).numpy()
    return mask * np.uint8(255) if len(logits) == 1 else mask


def cut_out(photo, logits, threshold):
    """The object alone, RGBA: the background is transparent, the edge soft."""
    picture = photo.copy()
    picture.putalpha(opacity(logits, threshold))
    return picture


def in_front_of(background, photo, logits, threshold):
    """The object in front of another picture (RGB), which is cropped and scaled to fit."""
    picture, edge = photo.copy(), ImageOps.invert(opacity(logits, threshold))
    picture.paste(ImageOps.fit(background, photo.size), mask=edge)
    return picture


def opacity(logits, threshold):
    """How opaque each pixel of a cut-out is, in shades of grey: one half at the threshold."""
    levels, steepness = sigmoid(logits - np.float32(logit(threshold))), 255 / (1 - 2 * EDGE)
    levels.clip(EDGE, 1 - EDGE, out=levels)
    return Image.fromarray(cv2.convertScaleAbs(levels, alpha=steepness, beta=-EDGE * steepness))


def overlay(photo, mask, colours=None):
    """The photo with a tint over what the mask covers, of each class its own."""
    tint = Image.new("RGB", photo.size, TINT) if colours is None else Image.fromarray(colours[mask])
    covered = Image.fromarray((mask > 0) * np.uint8(255))
    return Image.composite(Image.blend(photo, tint, 0.5), photo, covered)


def grey(logits, bits):
    """Probabilities as grey levels of 8 or 16 bits, white for 1."""
    most, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    return Image.fromarray(np.rint(sigmoid(logits.copy()) * most).astype(dtype))


def save_mask(mask, path, colours=None):
    """Write a mask as a PNG, grey, or with these colours as its palette; whole or not at all."""
    if colours is not None:
        picture = Image.fromarray(mask)
        picture.putpalette(colours.tobytes())
        return save_picture(picture, path)
    with write_aside(path) as file:
        file.write(cv2.imencode(".png", mask, MASK_PNG)[1])
