"""The pictures made of a photo and the network's answer: masks, cut-outs, overlays.

Except in `draw`, photo is an RGB image; mask (H, W), uint8, 0 and 255, or with several classes 0 to
K; logits (H, W), float32, of the photo's size, of the object or of each pixel's likeliest class;
threshold a probability; colours (1 + K, 3), uint8, of several classes. Pictures are Pillow's
images, of the photo's size and info.
"""

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from support.images import open_image, photo_size, read_photo
from support.plots import palette
from support.scores import label_map, logit, predicted_masks
from support.writing import save_picture, write_aside

EDGE = 0.1  # of a cut-out: transparent below this probability, opaque above 1 - EDGE
TINT = (40, 120, 255)  # of what the mask covers, in an overlay
ROWS = 256  # of a mask, found at a time
MASK_PNG = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]  # the fastest and the smallest
FROM_PHOTO = {"cutout", "background", "overlay"}  # kinds of pictures that show the photo


def draw(photo, logits, paths, threshold, background=None, bits=8):
    """Write pictures of a photo.

    Args:
        photo: path of its file, or another source; see support/images.py.
        logits: (K, h, w), float32, of any size.
        paths: {kind: path to write}; kinds are mask, cutout, background, overlay, probability.
        threshold: a probability.
        background: RGB image, for the kind of that name.
        bits: of grey levels for the kind "probability": 8 or 16.

    Returns the photo's mask, as find_objects does, at the photo's size. Raises BadInput.
    """
    logits = scale(logits, photo_size(photo))  # as test.py --full-size does
    mask = find_objects(logits, threshold)
    colours = palette(len(logits)) if len(logits) > 1 else None
    likeliest = likeliest_class(logits)
    image = read_with_profile(photo) if paths.keys() & FROM_PHOTO else None
    if "mask" in paths:
        save_mask(mask, paths["mask"], colours)
    if "cutout" in paths:
        save_fast(cut_out(image, likeliest, threshold), paths["cutout"])
    if "background" in paths:
        save_fast(in_front_of(background, image, likeliest, threshold), paths["background"])
    if "overlay" in paths:
        save_fast(overlay(image, mask, colours), paths["overlay"])
    if "probability" in paths:
        save_fast(grey(likeliest, bits), paths["probability"])
    return mask


def read_with_profile(photo):
    """A photo as an RGB image with its colour profile, without which its colours would change."""
    image = Image.fromarray(read_photo(photo))
    with open_image(photo) as file:
        if file.mode in ("RGB", "RGBA"):  # the profile of another mode does not fit RGB
            image.info["icc_profile"] = file.info.get("icc_profile")
    return image


# Logits -------------------------------------------------------------------------------------------


def sigmoid(logits):
    """Probabilities; they overwrite the logits, since large photos have many."""
    return torch.from_numpy(logits).sigmoid_().numpy()


def scale(logits, size):
    """Logits (K, h, w) at another size, (H, W): (K, H, W)."""
    if logits.shape[1:] == tuple(size):
        return logits
    return np.stack([cv2.resize(channel, size[::-1]) for channel in logits])


def likeliest_class(logits):
    """Logits (H, W) of each pixel's likeliest class, of logits (K, H, W)."""
    return logits.max(axis=0) if len(logits) > 1 else logits[0]


def find_objects(logits, threshold):
    """The mask (H, W), uint8, of logits (K, H, W): 0 and 255, or for K above 1 0 and 1 to K."""
    mask = np.empty(logits.shape[1:], np.uint8)
    for top in range(0, len(mask), ROWS):  # all at once would take several times the logits' memory
        rows = slice(top, top + ROWS)
        found = predicted_masks(torch.from_numpy(logits[:, rows]), threshold)
        mask[rows] = label_map(found).numpy()
    return mask * np.uint8(255) if len(logits) == 1 else mask


# Pictures -----------------------------------------------------------------------------------------


def cut_out(photo, logits, threshold):
    """The object alone, RGBA: the background is transparent, the edge soft."""
    picture = photo.copy()
    picture.putalpha(opacity(logits, threshold))
    return picture


def in_front_of(background, photo, logits, threshold):
    """The object in front of another RGB image, which is cropped and scaled to fit."""
    picture = photo.copy()
    transparency = ImageOps.invert(opacity(logits, threshold))
    picture.paste(ImageOps.fit(background, photo.size), mask=transparency)
    return picture


def opacity(logits, threshold):
    """Opacity of each pixel of a cut-out, as an 8-bit grey image: one half at the threshold."""
    levels = sigmoid(logits - np.float32(logit(threshold)))
    levels.clip(EDGE, 1 - EDGE, out=levels)
    steepness = 255 / (1 - 2 * EDGE)
    return Image.fromarray(cv2.convertScaleAbs(levels, alpha=steepness, beta=-EDGE * steepness))


def overlay(photo, mask, colours=None):
    """The photo with a tint over what the mask covers; with `colours`, a tint for each class."""
    tint = Image.new("RGB", photo.size, TINT) if colours is None else Image.fromarray(colours[mask])
    covered = Image.fromarray((mask > 0) * np.uint8(255))
    return Image.composite(Image.blend(photo, tint, 0.5), photo, covered)


def grey(logits, bits):
    """Probabilities as a grey image of 8 or 16 bits; white is 1."""
    white = 2**bits - 1
    dtype = np.uint8 if bits == 8 else np.uint16
    return Image.fromarray(np.rint(sigmoid(logits.copy()) * white).astype(dtype))


# Files --------------------------------------------------------------------------------------------


def save_fast(picture, path):
    """Write a picture as a PNG, whole or not at all, compressed lightly for speed."""
    save_picture(picture, path, compress_level=1)


def save_mask(mask, path, colours=None):
    """Write a mask as a PNG, whole or not at all: grey, or with `colours` as its palette."""
    if colours is None:
        with write_aside(path) as file:
            file.write(cv2.imencode(".png", mask, MASK_PNG)[1])
    else:
        picture = Image.fromarray(mask)
        picture.putpalette(colours.tobytes())
        save_picture(picture, path)
