"""What training makes small: losses from logits, one number a photo.

Each takes logits and masks, (N, 1, H, W), float32, masks of 0 and 1, and returns (N,). They compute
in float32 whatever the network computed in, and are finite for any finite logits and for empty
masks.
"""

from torch.nn import functional as F

SMOOTH = 1.0  # pixels; makes an empty mask that is predicted empty a perfect one


def bce(logits, masks):
    """Binary cross-entropy, mean over the photo's pixels."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), masks, reduction="none")
    return loss.flatten(1).mean(1)


def dice(logits, masks):
    """1 - 2|A∩B| / (|A|+|B|), with probabilities in place of the predicted mask.

    After Milletari et al., "V-Net", https://arxiv.org/abs/1606.04797, where the sums below the line
    are of squares.
    """
    both, total = overlap(logits, masks)
    return 1 - (2 * both + SMOOTH) / (total + SMOOTH)


def iou(logits, masks):
    """1 - |A∩B| / |A∪B|, likewise."""
    both, total = overlap(logits, masks)
    return 1 - (both + SMOOTH) / (total - both + SMOOTH)


def bce_dice(logits, masks):
    """The sum of both: cross-entropy for each pixel, Dice for the whole."""
    return bce(logits, masks) + dice(logits, masks)


def overlap(logits, masks):
    """(|A∩B|, |A|+|B|) of probabilities and masks, each (N,)."""
    probabilities, masks = logits.float().sigmoid().flatten(1), masks.flatten(1)
    return (probabilities * masks).sum(1), probabilities.sum(1) + masks.sum(1)


LOSSES = {"bce": bce, "dice": dice, "iou": iou, "bce-dice": bce_dice}
