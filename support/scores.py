"""From logits to masks; of several classes a map, weights, and scores from counts of pixels."""

import contextlib

import numpy as np
import torch

from support.errors import BadInput, printable
from support.pairs import for_all

MOST = 10  # of the weights that auto gives


def logit(probability):
    """The logit of a probability; where it is 0 or 1, infinite."""
    return torch.tensor(probability, dtype=torch.float64).logit().item()


def predicted_masks(logits, threshold):
    """(..., K, H, W), True where a pixel is of a class: its probability is the highest, and above
    the threshold; at 0.5, its logit above 0."""
    above = logits > logit(threshold)
    if logits.shape[-3] == 1:
        return above
    return torch.zeros_like(above).scatter_(-3, logits.argmax(-3, keepdim=True), True) & above


def without_ignored(logits, masks):
    """Both, with ignored pixels (-1 in the masks) as background predicted with certainty: they cost
    no loss, move no weight, and are in no overlap."""
    return logits.masked_fill(masks < 0, -100), masks.clamp(min=0)


def label_map(masks):
    """Masks of K classes, (..., K, H, W), as one of 0 for background and 1 to K, (..., H, W)."""
    numbers = torch.arange(1, masks.shape[-3] + 1, dtype=torch.uint8, device=masks.device)
    return ((masks > 0.5) * numbers.view(-1, 1, 1)).sum(-3, dtype=torch.uint8)


def class_weights(settings, dataset):
    """The weights (K, 1, 1) that --class-weights asks for. `auto`: of each class the square root of
    the commonest one's pixels over its own, at most MOST. Raises BadInput."""
    flag, count = "--class-weights", len(settings.classes)
    if settings.class_weights == ("auto",):

        def count_pixels(pair):
            return np.bincount(dataset.read(pair)[1].ravel(), minlength=256)

        counts = sum(for_all(count_pixels, list(dict.fromkeys(dataset.pairs)), flag))
        counts = counts[1 : count + 1]
        weights = np.sqrt(counts.max() / counts.clip(min=1)).clip(max=MOST).round(2)
        named = zip(settings.classes, weights.tolist(), strict=True)
        print("Class weights:", ", ".join(f"{printable(name)} {weight}" for name, weight in named))
    else:
        weights = ()
        with contextlib.suppress(ValueError):
            weights = np.array(settings.class_weights, float)
        if len(weights) != count or not ((weights > 0) & np.isfinite(weights)).all():
            given = f"{' '.join(settings.class_weights)} is neither auto nor"
            raise BadInput(flag, f"{given} {count} numbers above 0", "name them")
    return torch.tensor(weights, dtype=torch.float32).view(-1, 1, 1)


def class_scores(both, total, true, pixels, classes):
    """Dice and IoU of each class, of all images' pixels together: "dice <name>", "iou <name>". And
    "dice" and "iou", the means over classes; "constant", if all were of the commonest class."""
    there = total > 0  # in these images, or in what is predicted
    scores = {"dice": 2 * both / total, "iou": both / (total - both)}
    means = {what: numbers[there].mean().item() for what, numbers in scores.items()}
    means["constant"] = ((2 * true / (true + pixels)).max() / there.sum()).item()
    for what, numbers in scores.items():
        named = zip(classes, numbers.tolist(), there, strict=True)
        means |= {f"{what} {name}": number for name, number, one in named if one}
    return means
