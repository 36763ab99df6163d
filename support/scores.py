"""What only masks of several classes need: their map, and scores from counts of pixels."""

import torch


def label_map(masks):
    """Masks of K classes, (..., K, H, W), as one of 0 for background and 1 to K, (..., H, W)."""
    numbers = torch.arange(1, masks.shape[-3] + 1, dtype=torch.uint8, device=masks.device)
    return ((masks > 0) * numbers.view(-1, 1, 1)).sum(-3, dtype=torch.uint8)


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
