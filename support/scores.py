"""From logits to masks, and, with several classes, to a map, weights and scores of each class."""

import contextlib

import numpy as np
import torch

from support.errors import BadInput, printable
from support.pairs import for_all

MAX_WEIGHT = 10  # that --class-weights auto gives


def logit(probability):
    """The logit of a probability; infinite for 0 and 1."""
    return torch.tensor(probability, dtype=torch.float64).logit().item()


def predicted_masks(logits, threshold):
    """Predictions (..., K, H, W), bool, from logits of that shape: True for the class with the
    highest probability, if that is above the threshold; at 0.5, if its logit is above 0."""
    above = logits > logit(threshold)
    if logits.shape[-3] == 1:
        return above
    return torch.zeros_like(above).scatter_(-3, logits.argmax(-3, keepdim=True), True) & above


def without_ignored(logits, masks):
    """Logits and masks with ignored pixels (-1 in the masks) as background that is predicted with
    certainty: they add nothing to the loss, the gradients and any overlap."""
    return logits.masked_fill(masks < 0, -100), masks.clamp(min=0)


def label_map(masks):
    """Masks of K classes, (..., K, H, W), as one map (..., H, W), uint8: 0 for background, else the
    class, 1 to K."""
    numbers = torch.arange(1, masks.shape[-3] + 1, dtype=torch.uint8, device=masks.device)
    return ((masks > 0.5) * numbers.view(-1, 1, 1)).sum(-3, dtype=torch.uint8)


def compute_class_weights(wanted, classes, dataset):
    """The weights (K, 1, 1), float32, that --class-weights asks for. Raises BadInput.

    `wanted` are the flag's words: a number for each of the K names in `classes`, or "auto", which
    counts the pixels of `dataset`, a CarvanaDataset, and prints the weights.
    """
    if wanted == ("auto",):
        weights = balanced_weights(len(classes), dataset)
        named = zip(classes, weights.tolist(), strict=True)
        print("Class weights:", ", ".join(f"{printable(name)} {weight}" for name, weight in named))
    else:
        weights = np.array([])
        with contextlib.suppress(ValueError):
            weights = np.array(wanted, float)
        if len(weights) != len(classes) or not ((weights > 0) & np.isfinite(weights)).all():
            reason = f"{' '.join(wanted)} is neither auto nor {len(classes)} numbers above 0"
            raise BadInput("--class-weights", reason, "give one for each class")
    return torch.tensor(weights, dtype=torch.float32).view(-1, 1, 1)


def balanced_weights(n_classes, dataset):
    """The weight of each class, (K,): the square root of the commonest one's pixels over its own,
    at most MAX_WEIGHT."""

    def count_pixels(pair):
        _, mask = dataset.read(pair)
        return np.bincount(mask.ravel(), minlength=256)

    photos = list(dict.fromkeys(dataset.pairs))  # with --crop, each comes several times
    counts = sum(for_all(count_pixels, photos, "counting pixels"))[1 : n_classes + 1]
    return np.sqrt(counts.max() / counts.clip(min=1)).clip(max=MAX_WEIGHT).round(2)


def class_scores(both, total, true, pixels, classes):
    """Scores of classes, over the pixels of all images together, a dict.

    "dice <name>" and "iou <name>" for each class that is in the masks or in the predictions. "dice"
    and "iou" are the means over these, and 1 if there are none: then nothing was to be found, and
    nothing was. "constant" is the "dice" of predicting the commonest class everywhere.

    Args:
        both, total, true: pixels of each class, (K,): |A∩B|, |A|+|B| and |B| of predictions A and
            masks B.
        pixels: how many there are in all, without ignored ones.
        classes: the names of the K classes.
    """
    present = total > 0
    if not present.any():
        return {"dice": 1.0, "iou": 1.0, "constant": 0.0}
    scores = {"dice": 2 * both / total, "iou": both / (total - both)}
    means = {what: numbers[present].mean().item() for what, numbers in scores.items()}
    means["constant"] = ((2 * true / (true + pixels)).max() / present.sum()).item()
    for what, numbers in scores.items():
        for name, number, is_present in zip(classes, numbers.tolist(), present, strict=True):
            if is_present:
                means[f"{what} {name}"] = number
    return means
