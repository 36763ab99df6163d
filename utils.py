"""What the scripts share after the batch: device, scores, pictures."""

import ctypes
import math
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from torch.utils.data import Subset
from torchvision.utils import save_image

from checkpoints import CLASSIC
from checkpoints import load_checkpoint as load_checkpoint  # for others to find here
from checkpoints import save_checkpoint as save_checkpoint
from distributed import sum_over_processes
from files import BadInput, fitting, printable, write_aside
from losses import bce

THRESHOLDS = [number / 20 for number in range(4, 17)]  # 0.2 to 0.8, for find_threshold

# The device ---------------------------------------------------------------------------------------


def pick_device(name="auto"):
    """A torch.device by its name, or as it is; "auto" takes CUDA, else Apple's MPS, else the CPU.

    Raises BadInput for one that is not there.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("it is none of cuda, mps and cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"--device {name}: cannot be used here ({reason}): try --device cpu"
        ) from None
    return device


def set_up(device):
    """Settings of torch and of the C library that make work on this device fast."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all batches have one size
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    elif device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # Keep freed memory for the next step. Given back, it has to be cleared by the system for
        # each large tensor anew, which costs a third of the time.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets a mapping of its own, which ends with it
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def amp_dtype(device):
    """The 16-bit type in which this device computes natively, or None for full precision.

    A CPU without bf16 instructions emulates them, at a tenth of its speed in float32.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else None
    return None


def memory_format(device):
    """How images and weights lie in memory while training: channels last, unless in float32.

    In float32 a CPU trains 1.3 times as fast in the default layout, though it evaluates 1.2 times
    as fast in channels last.
    """
    return torch.contiguous_format if amp_dtype(device) is None else torch.channels_last


def autocast(device):
    """A context in which the network computes in amp_dtype(device)."""
    dtype = amp_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# Scores -------------------------------------------------------------------------------------------


def logit(probability):
    """The logit of a probability between 0 and 1."""
    return math.log(probability / (1 - probability))


def predicted_masks(logits, threshold):
    """True where the probability is above the threshold; at 0.5, where the logit is above 0."""
    return logits > logit(threshold)


def logits_of(model, images, device, tta=False):
    """The network's answer to images (N, C, H, W) from a loader: logits (N, 1, H, W), float32.

    With `tta`, the mean of its answers to them and to their mirror images.
    """
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    with autocast(device):
        logits = model(images).float()
        if tta:
            logits = (logits + model(images.flip(-1)).float().flip(-1)) / 2
    return logits


def score_batch(logits, masks, threshold=0.5, loss_function=bce):
    """Scores of each image by itself, so that they do not depend on the batch it came in.

    Args:
        logits: (N, 1, h, w); brought to the masks' size if theirs is another.
        masks: (N, 1, H, W), 0 and 1.
        threshold: a pixel counts as object where its probability is above it.
        loss_function: one of losses.LOSSES.

    Returns a dict of tensors (N,) on the CPU, float64: `loss`, `correct` and `pixels` (counts),
    `accuracy`, `dice`, `iou` (0 to 1). Dice is 2|A∩B| / (|A|+|B|), and 1 where both masks are
    empty: the challenge's own definition.
    """
    logits = logits.float()
    if logits.shape[-2:] != masks.shape[-2:]:
        logits = F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)
    loss = loss_function(logits, masks)
    predicted, true = predicted_masks(logits, threshold), masks > 0.5
    both, total = overlap(predicted, true)
    correct = (predicted == true).flatten(1).sum(1).cpu().double()
    pixels = torch.full_like(correct, true[0].numel() if len(true) else 0)
    return {
        "loss": loss.cpu().double(),
        "correct": correct,
        "pixels": pixels,
        "accuracy": correct / pixels,
        "dice": dice(both, total),
        "iou": torch.where(total == 0, 1.0, both / (total - both)),
    }


def dice(both, total):
    """2|A∩B| / (|A|+|B|) from what overlap gives; 1 where both masks are empty."""
    return torch.where(total == 0, 1.0, 2 * both / total)


def overlap(predicted, true):
    """(|A∩B|, |A|+|B|) of masks (N, 1, H, W) of True and False: (N,) each, float64, on the CPU."""
    predicted, true = predicted.flatten(1), true.flatten(1)
    counts = torch.stack([(predicted & true).sum(1), predicted.sum(1) + true.sum(1)])
    return counts.cpu().double()


def predictions(loader, model, device, tta=False):
    """Yield (images, masks, logits) for each batch of a loader; see logits_of."""
    was_training = model.training
    model.eval()
    for images, masks in loader:
        with torch.inference_mode():
            logits = logits_of(model, images, device, tta)
        yield images, masks.to(device, non_blocking=True), logits
    model.train(was_training)


def score_loader(loader, model, device, threshold=0.5, tta=False, loss_function=bce):
    """score_batch over a loader: a dict of tensors (number of images,) in the loader's order."""
    scores = [
        score_batch(logits, masks, threshold, loss_function)
        for _, masks, logits in predictions(loader, model, device, tta)
    ]
    if not scores:  # one process of many, with fewer photos than processes
        scores = [score_batch(torch.empty(0, 1, 1, 1), torch.empty(0, 1, 1, 1))]
    return {name: torch.cat([batch[name] for batch in scores]) for name in scores[0]}


def find_threshold(loader, model, device):
    """The one of THRESHOLDS with the best mean Dice over a loader's images, of all processes."""
    sums = torch.zeros(len(THRESHOLDS))
    for _, masks, logits in predictions(loader, model, device):
        for index, threshold in enumerate(THRESHOLDS):
            both, total = overlap(predicted_masks(logits, threshold), masks > 0.5)
            sums[index] += dice(both, total).sum()
    sums = sum_over_processes(sums.to(device)).tolist()
    # Of equally good ones that nearest to 0.5.
    return max(zip(sums, THRESHOLDS, strict=True), key=lambda one: (one[0], -abs(one[1] - 0.5)))[1]


def check_accuracy(loader, model, device, threshold=0.5):
    """Print the two classic lines; return means over images: loss, accuracy, dice, iou."""
    return report_accuracy(score_loader(loader, model, torch.device(device), threshold))


def report_accuracy(scores):
    """What check_accuracy prints and returns, from scores that score_loader gave."""
    correct, pixels = int(scores["correct"].sum()), int(scores["pixels"].sum())
    means = {name: scores[name].mean().item() for name in ("loss", "accuracy", "dice", "iou")}
    print(f"Got {correct}/{pixels} with acc {100 * correct / pixels:.2f}")
    print(f"Dice score: {means['dice']:.5f}", flush=True)
    return means


# Pictures -----------------------------------------------------------------------------------------


def save_predictions_as_imgs(loader, model, folder, device, threshold=0.5, normalization=None):
    """Write, for each batch, the classic grids of predicted and true masks, `pred_<batch>.png` and
    `gt_<batch>.png`, and for each photo a panel (see draw_panel), `panel_<photo's name>.png`.

    Returns the panels, {photo's name: PIL image}.
    """
    folder, device = Path(folder), torch.device(device)
    names, panels = iter(photo_names(loader.dataset)), {}
    for batch, parts in enumerate(predictions(loader, model, device)):
        images, masks, logits = (part.cpu() for part in parts)
        predicted = predicted_masks(logits, threshold).float()
        with write_aside(folder / f"pred_{batch}.png") as file:
            save_image(predicted, file, format="png")
        with write_aside(folder / f"gt_{batch}.png") as file:
            save_image(masks, file, format="png")
        for image, mask, logit, name in zip(images, masks, logits, names, strict=False):
            panels[name] = draw_panel(name, image, mask, logit, threshold, normalization)
            save_picture(panels[name], folder / f"panel_{fitting(name)}.png")
    return panels


def photo_names(dataset):
    """Names of a dataset's photos, in its order; of data sets of other kinds, their numbers."""
    if isinstance(dataset, Subset):
        names = photo_names(dataset.dataset)
        return [names[index] for index in dataset.indices]
    return getattr(dataset, "names", None) or [str(index) for index in range(len(dataset))]


def draw_panel(name, image, mask, logits, threshold=0.5, normalization=None):
    """One photo's result: photo | true mask | prediction | where they differ, under a caption.

    Args:
        image (C, H, W), mask (1, H, W), logits (1, H, W): as the network saw and gave them.
        normalization: what the image went through, to undo it; None for the classic one.

    In the last picture missed pixels are red, pixels too many are blue. Returns a PIL image.
    """
    n = normalization or CLASSIC["normalization"]
    photo = image.permute(1, 2, 0).numpy() * n["std"] + n["mean"]
    photo = (photo.clip(0, 1) * 255).astype(np.uint8)
    photo = np.broadcast_to(photo, (*photo.shape[:2], 3))
    true, predicted = mask[0].numpy() > 0.5, predicted_masks(logits, threshold)[0].numpy()

    differ = np.repeat(photo.mean(axis=2, keepdims=True) * 0.5, 3, axis=2).astype(np.uint8)
    differ[true & ~predicted] = (230, 60, 50)
    differ[predicted & ~true] = (60, 130, 255)
    black_white = [np.repeat(m[..., None] * np.uint8(255), 3, axis=2) for m in (true, predicted)]
    tiles = np.concatenate([photo, *black_white, differ], axis=1)

    dice = score_batch(logits[None], mask[None], threshold)["dice"].item()
    width = photo.shape[1]
    font = ImageFont.load_default(max(9, width // 20))
    line = int(font.size * 1.6)
    panel = Image.new("RGB", (tiles.shape[1], tiles.shape[0] + 2 * line), "white")
    panel.paste(Image.fromarray(tiles), (0, 2 * line))
    draw = ImageDraw.Draw(panel)
    draw.text((4, line * 0.15), f"{printable(name)}   Dice {dice:.4f}", "black", font)
    titles = ("photo", "true mask", "prediction", "red: missed, blue: too much")
    for column, title in enumerate(titles):
        draw.text((column * width + 4, line * 1.15), title, "gray", font)
    return panel


def save_picture(image, path, **options):
    """Write a PIL image as PNG, whole or not at all; `options` are those of Pillow's writer."""
    with write_aside(path) as file:
        image.save(file, format="png", **options)
