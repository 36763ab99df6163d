"""What the scripts share around the network: device, losses, scores, checkpoints, pictures."""

import inspect
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dataset import get_loaders  # noqa: F401  the tutorials import it from here
from model import UNet
from support import checkpoint_files, distributed
from support.checkpoint_files import CLASSIC
from support.command_line import is_dead_worker
from support.cpu import keep_freed_memory
from support.errors import BadInput, printable
from support.flags import class_names
from support.plots import draw_panel, palette
from support.scores import class_scores, label_map, predicted_masks, without_ignored
from support.tiles import TiledNetwork
from support.writing import save_picture, write_aside

CHECKPOINT = "my_checkpoint.pth.tar"  # the latest
BEST_CHECKPOINT = "best_checkpoint.pth.tar"  # of the best validation Dice
SHIPPED = str(Path(__file__).resolve().parent / "weights" / "unet_carvana.pth")

# The device ---------------------------------------------------------------------------------------


def pick_device(name="auto", tune=True):
    """A torch.device by its name; "auto" takes CUDA, else Apple's MPS, else the CPU.

    With `tune` this whole process is set up for it. Raises BadInput if it is not available.
    """
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("it is not cuda, mps or cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise BadInput(f"--device {name}", f"cannot be used ({why})", "try --device cpu") from None
    if tune and device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all batches have the same size
    elif tune and device.type == "cpu":
        keep_freed_memory()
    return device


def amp_dtype(device):
    """The 16-bit type in which this device computes natively, or None.

    A CPU without bf16 emulates it, at a tenth of its speed in float32.
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
    """How images and weights lie in memory while training: channels last, except in float32.

    There a CPU trains 1.3 times as fast in the default layout, though evaluation is slower in it.
    """
    return torch.contiguous_format if amp_dtype(device) is None else torch.channels_last


def to_device(images, masks, device):
    """A batch on a device, its images in the memory format of training."""
    images = images.to(device, non_blocking=True, memory_format=memory_format(device))
    return images, masks.to(device, non_blocking=True)


def autocast(device):
    """A context in which the network computes in amp_dtype(device)."""
    dtype = amp_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# Losses: from logits and masks, (N, K, H, W), to one number per photo, (N,), in float32 -----------

SMOOTH = 1.0  # pixels; gives an empty mask that is predicted empty a Dice of 1


def bce(logits, masks, weights=None):
    """Binary cross-entropy, mean over pixels and classes.

    `weights`, (K, 1, 1), multiply the loss of each class's pixels.
    """
    loss = F.binary_cross_entropy_with_logits(
        logits.float(), masks, reduction="none", pos_weight=weights
    )
    return loss.flatten(1).mean(1)


def dice_loss(logits, masks):
    """1 - 2|A∩B| / (|A|+|B|) with probabilities (V-Net, https://arxiv.org/abs/1606.04797)."""
    probabilities = logits.float().sigmoid().flatten(2)
    masks = masks.flatten(2)
    both = (probabilities * masks).sum(2)
    total = probabilities.sum(2) + masks.sum(2)
    return (1 - (2 * both + SMOOTH) / (total + SMOOTH)).mean(1)


def bce_dice(logits, masks, weights=None):
    """The sum of both: cross-entropy for each pixel, Dice for the whole mask."""
    return bce(logits, masks, weights) + dice_loss(logits, masks)


# What --loss offers. A function may also give one number for the whole batch, as PyTorch's do.
LOSSES = {"bce": bce, "bce-dice": bce_dice}


def make_loss(name, class_weights=None, device=None):
    """One of LOSSES, with these weights, (K,) or (K, 1, 1), for the classes' pixels.

    Raises BadInput if there are weights and the loss takes none.
    """
    loss = LOSSES[name]
    if class_weights is None:
        return loss
    if "weights" not in inspect.signature(getattr(loss, "forward", loss)).parameters:
        reason = f"--loss {name} takes no weights"
        raise BadInput("--class-weights", reason, "leave it out, or choose another --loss")
    weights = torch.as_tensor(class_weights, dtype=torch.float32, device=device)
    return partial(loss, weights=weights.view(-1, 1, 1))


def photo_losses(loss_function, logits, masks):
    """One loss per photo, (N,), from logits and masks, (N, K, H, W).

    A loss that gives one number for the whole batch gives it for each photo.
    """
    losses = loss_function(logits.float(), masks)
    return losses.expand(len(logits)) if losses.dim() == 0 else losses


def saved_loss(checkpoint, device):
    """The loss that a checkpoint's network was trained with."""
    name = checkpoint.get("settings", {}).get("loss")
    weights = checkpoint.get("class_weights")
    return make_loss(name if name in LOSSES else "bce", weights, device)


# Scores -------------------------------------------------------------------------------------------


def logits_of(model, images, device, tta=False):
    """The network's output for images (N, C, H, W) from a loader: logits (N, K, H, W), float32.

    With `tta`, the mean of its outputs for them and for their mirror images.
    """
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    with autocast(device), torch.inference_mode():
        logits = model(images).float()
        if tta:
            logits = (logits + model(images.flip(-1)).float().flip(-1)) / 2
    return logits


def score_batch(logits, masks, threshold=0.5, loss_function=bce):
    """Scores of each image by itself, so that they do not depend on the batch it came in.

    Args:
        logits: (N, K, h, w); scaled to the masks' size if theirs is different.
        masks: (N, K, H, W), the object above 0.5, and -1 for pixels to ignore.
        threshold: a pixel counts as object above this probability.
        loss_function: one of LOSSES.

    Returns a dict of tensors on the CPU, float64. Of shape (N,): `loss`; `correct` and `pixels`,
    counts; `accuracy`, `dice` and `iou`, 0 to 1; `constant`, the Dice of marking everything. Of
    shape (N, K), in pixels: `both` (|A∩B|), `total` (|A|+|B|), `true` (|B|). Dice is
    2|A∩B| / (|A|+|B|), and 1 where both masks are empty: the challenge's own definition; with
    several classes it is their mean.
    """
    logits = logits.float()
    if logits.shape[-2:] != masks.shape[-2:]:
        logits = F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)
    known = (masks[:, :1] >= 0).flatten(2)
    logits, masks = without_ignored(logits, masks)
    loss = photo_losses(loss_function, logits, masks)
    predicted = predicted_masks(logits, threshold).flatten(2)
    true = masks.flatten(2) > 0.5
    right = (predicted == true).all(1, keepdim=True) & known

    def count(pixels):  # on the CPU, since MPS has no float64
        return pixels.sum(2).cpu().double()

    both, n_true = count(predicted & true), count(true)
    total = count(predicted) + n_true
    correct, pixels = count(right)[:, 0], count(known)[:, 0]
    everything = (n_true + pixels[:, None]).clamp(min=1)
    return {
        "loss": loss.cpu().double(),
        "correct": correct,
        "pixels": pixels,
        "accuracy": correct / pixels.clamp(min=1),
        "dice": torch.where(total == 0, 1.0, 2 * both / total).mean(1),
        "iou": torch.where(total == 0, 1.0, both / (total - both)).mean(1),
        "constant": (2 * n_true / everything).max(1).values,
        "both": both,
        "total": total,
        "true": n_true,
    }


def predictions(loader, model, device, tta=False):
    """Yield (images, masks, logits) for each batch of a loader; see logits_of."""
    was_training = model.training
    model.eval()
    for images, masks in loader:
        yield images, masks.to(device, non_blocking=True), logits_of(model, images, device, tta)
    model.train(was_training)


def score_loader(loader, model, device, threshold=0.5, tta=False, loss_function=bce, n_classes=1):
    """score_batch over a loader: a dict of tensors, one row per image, in the loader's order."""
    no_photos = torch.empty(0, n_classes, 1, 1, device=device)  # a process may have none
    scores = [score_batch(no_photos, no_photos, threshold, loss_function)]
    for _, masks, logits in predictions(loader, model, device, tta):
        scores.append(score_batch(logits, masks, threshold, loss_function))
    return {name: torch.cat([batch[name] for batch in scores]) for name in scores[0]}


def check_accuracy(loader, model, device, threshold=0.5, loss_function=bce, classes=None):
    """Print the two classic lines; return means over images: loss, accuracy, dice, iou.

    For the other arguments and results see report_accuracy. Under torchrun each process gives a
    loader of its share of the photos.
    """
    distributed.share_buffers(model)
    device = torch.device(device)
    n_classes = len(classes or ["object"])
    scores = score_loader(loader, model, device, threshold, False, loss_function, n_classes)
    return report_accuracy(scores, device, classes)


def report_accuracy(scores, device, classes=None):
    """Print and return what check_accuracy does, from the scores that score_loader gave.

    Photos of ignored pixels alone count nowhere. The dict that is returned has `constant`, too, and
    with several `classes`, their names, what class_scores gives.
    """
    counted = scores["pixels"] > 0
    n_photos = distributed.reduce(counted.sum(), device).clamp(min=1)
    totals = {
        name: distributed.reduce(values[counted].sum(0), device) for name, values in scores.items()
    }
    names = ("loss", "accuracy", "dice", "iou", "constant")
    means = {name: (totals[name] / n_photos).item() for name in names}
    correct, pixels = int(totals["correct"]), int(totals["pixels"])
    if len(totals["true"]) > 1:
        classes = classes or class_names(len(totals["true"]))
        counts = totals["both"], totals["total"], totals["true"]
        means |= class_scores(*counts, pixels, classes)
    print(f"Got {correct}/{pixels} with acc {100 * correct / max(pixels, 1):.2f}")
    print(f"Dice score: {means['dice']:.5f}", flush=True)
    return means


# Checkpoints --------------------------------------------------------------------------------------


def save_checkpoint(state, filename=CHECKPOINT):
    """Write a dict of tensors and plain values, whole or not at all. Raises BadInput."""
    with write_aside(filename) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # how torch reports that the file took no more
            if is_dead_worker(error):  # which the main process learns at any moment
                raise
            raise OSError(f"{error}".splitlines()[0]) from error


def load_checkpoint(source=CHECKPOINT, model=None, must_fit=True):
    """Read a checkpoint of this repository, or a classic one, which may hold weights alone.

    Args:
        source: a file, as untrusted input: nothing in it is run (weights_only); or the dict that
            torch.load gave.
        model: a module that takes over the weights, if given.
        must_fit: whether the weights have to fit the UNet of model.py, or `model`.

    Returns the dict, on the CPU, with finite weights in `state_dict`, the arguments of UNet in
    `model` (read off the tensors' shapes if it stores none), and what CLASSIC holds filled in where
    it is missing. Raises BadInput.
    """
    is_file = not isinstance(source, dict)
    filename = source if is_file else "the checkpoint"
    checkpoint = {"state_dict": {}}
    try:
        if is_file:
            checkpoint = CLASSIC | checkpoint_files.read_checkpoint(source)
        else:
            checkpoint = CLASSIC | checkpoint_files.with_weights(source)
        checkpoint["model"] = checkpoint_files.network_arguments(checkpoint)
        weights = checkpoint["state_dict"]
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("its weights are not finite")
        n_classes = checkpoint["model"]["out_channels"]
        checkpoint["classes"] = checkpoint["classes"] or class_names(n_classes)
        checkpoint |= checkpoint_files.check_facts(checkpoint)
        with torch.device("meta"):  # takes no memory
            network = model or UNet(**checkpoint["model"])
        why = checkpoint_files.why_unfit(network, weights) if must_fit else None
    except checkpoint_files.UNUSABLE as error:
        origin = checkpoint_files.origin_of(checkpoint)
        reason = f"not a checkpoint of this U-Net ({checkpoint_files.one_line(error)}){origin}"
        raise BadInput(filename, reason, "name another file") from None
    if why:
        reason = f"does not fit model.py as it is now: {why} (written by another model.py?)"
        raise BadInput(filename, reason, "name another file, or undo the change to model.py")
    if model is not None:
        model.load_state_dict(weights)
    return checkpoint


def build_model(checkpoint, device="cpu"):
    """The network of a checkpoint that load_checkpoint gave, on a device, in evaluation mode."""
    model = UNet(**checkpoint["model"])
    model.load_state_dict(checkpoint["state_dict"])
    return model.to(device, memory_format=torch.channels_last).eval()


def for_whole_photos(model, crop=None):
    """The network as evaluation calls it: one that was trained on crops works tile by tile."""
    return TiledNetwork(model, crop) if crop else model


# Pictures -----------------------------------------------------------------------------------------


def save_predictions_as_imgs(loader, model, folder, device, threshold=0.5, normalization=None):
    """Write pictures of a loader's photos and masks into a folder, as PNG.

    For each batch the classic grids of masks, `pred_<batch>.png` and `gt_<batch>.png`; for each
    photo a panel, `panel_<photo's name>.png`, see panel_of.
    """
    folder = Path(folder)
    names = iter(getattr(loader.dataset, "names", None) or map(str, range(len(loader.dataset))))
    for batch, parts in enumerate(predictions(loader, model, torch.device(device))):
        images, masks, logits = (part.cpu() for part in parts)
        save_grid(predicted_masks(logits, threshold), folder / f"pred_{batch}.png")
        save_grid(masks, folder / f"gt_{batch}.png")
        for *photo, name in zip(images, masks, logits, names, strict=False):
            panel = panel_of(name, *photo, threshold, normalization)
            save_picture(panel, folder / f"panel_{name}.png")


def save_grid(masks, path):
    """Write a batch's masks, (N, K, H, W), as a grid of pictures in the classes' colours."""
    from torchvision.utils import save_image  # takes a second, for which predict.py need not wait

    colours = torch.from_numpy(palette(masks.shape[1]))[label_map(masks).int()]  # (N, H, W, 3)
    with write_aside(path) as file:
        save_image(colours.movedim(-1, 1) / 255, file, format="png")


def panel_of(name, image, mask, logits, threshold=0.5, normalization=None):
    """One photo's result, a PIL image: photo | true mask | prediction | where they differ.

    Args:
        image (C, H, W), mask (K, H, W), logits (K, H, W): the network's input and output.
        normalization: that of the image, to undo it; None for the classic one.
    """
    applied = normalization or CLASSIC["normalization"]
    photo = image.permute(1, 2, 0).numpy() * applied["std"] + applied["mean"]  # (H, W, C)
    photo = (photo * applied["max_pixel_value"]).clip(0, 255).astype(np.uint8)
    true = label_map(mask).numpy()
    predicted = label_map(predicted_masks(logits, threshold)).numpy()
    dice = score_batch(logits[None], mask[None], threshold)["dice"].item()
    caption = f"{printable(name)}   Dice {dice:.4f}"
    return draw_panel(caption, photo, true, predicted, palette(len(mask)))
