"""Advice on runs from which little can be learned: what scripts print about it, a line each."""

import math

import numpy as np
from PIL import Image

from support.distributed import world_size
from support.masks import read_mask
from support.pairs import in_threads

# Advice is given below these.
FEW_STEPS = 200
FEW_PHOTOS = 100
FEW_PIXELS = 0.01  # share of pixels that show an object
LOW_DICE = 0.95  # of a perfect prediction, scaled back to the size of the masks

MASKS = 24  # of the held-out photos; more would take too long to read


def at_start(settings, pretrained, pairs, held_out):
    """Advice on a run before it starts, a list of lines.

    Args:
        settings: the run's Settings.
        pretrained: whether it starts from trained weights.
        pairs, held_out: lists of Pair, to train and to validate on; with --crop, a pair to train on
            comes once for each crop.
    """
    n_photos = len(set(pairs))
    lines = on_length(settings, len(pairs))
    if n_photos < FEW_PHOTOS and not pretrained:
        # The network of --pretrained takes colour photos.
        weights = "--pretrained, and " if settings.in_channels == 3 else ""
        lines.append(f"Only {n_photos} photos to train on: try {weights}--augment strong")
    return lines + on_masks(settings, held_out)


def on_length(settings, n_photos):
    """Advice on a run of few steps; `n_photos` are those of an epoch."""
    photos_per_step = settings.batch_size * settings.accumulate * world_size()
    steps_per_epoch = math.ceil(n_photos / photos_per_step)
    steps = steps_per_epoch * settings.num_epochs
    if steps >= FEW_STEPS:
        return []
    epochs = math.ceil(FEW_STEPS / steps_per_epoch)
    return [f"Only {steps} steps: --epochs {epochs} or a smaller --batch-size makes more"]


def on_masks(settings, held_out):
    """Advice on masks of small objects, or of details that the network's size of photos loses."""
    size = None if settings.crop else settings.size
    coverage, dice = mask_facts(held_out, size, settings.labels)
    lines = []
    if coverage < FEW_PIXELS:
        lines.append(f"Objects cover {coverage:.2%} of the pixels: try --loss bce-dice, and --crop")
    if dice < LOW_DICE:
        found = f"At {settings.image_height}x{settings.image_width} masks lose detail"
        remedy = "use a larger --image-height and --image-width, or --crop"
        lines.append(f"{found}: scaled back, Dice is {dice:.3f} at best; {remedy}")
    return lines


def mask_facts(pairs, size, labels):
    """(share of pixels that show an object, mean Dice of a perfect prediction at `size` scaled back
    to the masks' own size), of up to MASKS masks; `size` is (height, width), or None for no loss.
    """

    def facts_of(pair):
        mask = read_mask(pair.mask, None, labels)
        small = mask if size is None else read_mask(pair.mask, size, labels)
        objects = labels.objects(mask)
        dices = [dice_scaled_back(small, mask, n, labels) for n in np.unique(mask[objects])]
        return objects.mean(), np.mean(dices or [1])

    some = pairs[:: math.ceil(len(pairs) / MASKS)]
    return np.mean(list(in_threads(facts_of, some, ahead=4)), axis=0).tolist()


def dice_scaled_back(small, mask, number, labels):
    """The Dice of a small mask (h, w), scaled to the size of the mask (H, W) that it was made from,
    for the object of this number."""
    share = small / np.float32(255) if labels.is_soft_mask else np.float32(small == number)
    # By Pillow: OpenCV in threads may leave locks behind that data workers would wait for.
    scaled_back = Image.fromarray(share).resize(mask.shape[::-1], Image.Resampling.BILINEAR)
    predicted, true = np.asarray(scaled_back) > 0.5, mask == number
    return 2 * (true & predicted).sum() / (true.sum() + predicted.sum())


def nothing_learned(settings, constant):
    """Advice on a run whose best Dice is not above `constant`, that of marking everything."""
    remedy = f"more --epochs, another --lr than {settings.learning_rate:g}"
    remedy += ", or --loss bce-dice" if settings.loss == "bce" else ""
    return f"Nothing was learned: marking everything has a Dice of {constant:.5f}; try {remedy}"
