"""The pictures made of a photo and what the network says of it: cut-outs, overlays, masks.

Everywhere: photo is an RGB image; mask (H, W), uint8, 0 and 255; logits (H, W), float32, at the
photo's size; threshold a probability. Pictures are Pillow's images, of the photo's size.
"""

import cv2
import numpy as np
from PIL import Image, ImageOps

from files import open_image, write_aside
from predictor import sigmoid
from utils import logit

EDGE = 0.1  # of a cut-out: wholly transparent below this probability, opaque above 1 - EDGE
TINT = (40, 120, 255)  # of what the mask covers, in an overlay

# Rows unfiltered and compressed as runs: a third of Pillow's time, and smaller too.
MASK_PNG = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
MASK_PNG += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]


def cut_out(photo, logits, threshold):
    """The object alone, RGBA: the background is transparent, the edge soft."""
    picture = photo.copy()
    picture.putalpha(Image.fromarray(opacity(logits, threshold)))
    return picture


def in_front_of(background, photo, logits, threshold):
    """The object in front of another picture (RGB), which is cropped and scaled to fit."""
    edge = Image.fromarray(opacity(logits, threshold))
    return Image.composite(photo, ImageOps.fit(background, photo.size), edge)


def opacity(logits, threshold):
    """How opaque each pixel of a cut-out is: (H, W), uint8, 0 to 255, one half at the threshold."""
    levels = sigmoid(logits - np.float32(logit(threshold)))
    levels -= EDGE
    levels *= 255 / (1 - 2 * EDGE)
    return np.rint(levels.clip(0, 255, out=levels), out=levels).astype(np.uint8)


def overlay(photo, mask):
    """The photo with a tint over what the mask covers."""
    tinted = Image.blend(photo, Image.new("RGB", photo.size, TINT), 0.5)
    return Image.composite(tinted, photo, Image.fromarray(mask))


def grey(logits, bits):
    """Probabilities as grey levels of 8 or 16 bits, white for 1."""
    most, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    return Image.fromarray(np.rint(sigmoid(logits.copy()) * most).astype(dtype))


def colour_profile(path):
    """A photo's ICC profile, without which a cut-out's colours would be taken for others."""
    with open_image(path) as image:
        return image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None


def save_mask(mask, path):
    """Write a mask as a PNG of 0 and 255, whole or not at all."""
    with write_aside(path) as file:
        file.write(cv2.imencode(".png", mask, MASK_PNG)[1])
