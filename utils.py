"""What the scripts share around the network: device, losses, scores, checkpoints, pictures."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dataset import MAX_PIXEL_VALUE, MEAN, STD
from model import UNet
from support import checkpoints, distributed
from support.cpu import tune_for_cpu
from support.errors import BadInput, printable
from support.plots import draw_panel, palette
from support.scores import class_scores, label_map, predicted_masks, without_ignored
from support.settings import class_names
from support.tiles import in_tiles
from support.writing import save_picture, write_aside

CHECKPOINT, BEST_CHECKPOINT = "my_checkpoint.pth.tar", "best_checkpoint.pth.tar"
SHIPPED = str(Path(__file__).resolve().parent / "weights" / "unet_carvana.pth")

# What a checkpoint of the classic recipe does not say; image_size is (height, width).
CLASSIC = {
    "image_size": [160, 240],
    "normalization": {"mean": MEAN, "std": STD, "max_pixel_value": MAX_PIXEL_VALUE},
    "threshold": 0.5,
    "classes": None,  # names of what masks show; None: "object", or of several 1, 2, ...
    "crop": None,  # side of the squares, at photos' own size, that it was trained on, in pixels
}

# The device ---------------------------------------------------------------------------------------


def pick_device(name="auto", tune=True):
    """A torch.device by its name; "auto" takes CUDA, else Apple's MPS, else the CPU. With `tune`
    this whole process is set up for it. Raises BadInput for one that is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("it is none of cuda, mps and cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise BadInput(f"--device {name}", f"cannot be used ({why})", "try --device cpu") from None
    if tune and device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all batches have one size
    elif tune and device.type == "cpu":
        tune_for_cpu()
    return device


def amp_dtype(device):
    """The 16-bit type in which this device computes natively, or None: a CPU without bf16 emulates
    it, at a tenth of its speed in float32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else None
    return None


def memory_format(device):
    """How images and weights lie in memory while training: channels last, unless in float32, where
    a CPU trains 1.3 times as fast in the default layout, though evaluation is slower in it."""
    return torch.contiguous_format if amp_dtype(device) is None else torch.channels_last


def autocast(device):
    """A context in which the network computes in amp_dtype(device)."""
    dtype = amp_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# Losses: from logits and masks, (N, K, H, W), to one number a photo, (N,), in float32 -------------

SMOOTH = 1.0  # pixels; makes an empty mask that is predicted empty a perfect one


def bce(logits, masks, weights=None):
    """Mean binary cross-entropy; pixels of a class count as often as `weights`, (K, 1, 1), say."""
    options = {"reduction": "none", "pos_weight": weights}
    loss = F.binary_cross_entropy_with_logits(logits.float(), masks, **options)
    return loss.flatten(1).mean(1)


def dice_loss(logits, masks):
    """1 - 2|A∩B| / (|A|+|B|) with probabilities (V-Net, https://arxiv.org/abs/1606.04797)."""
    probabilities, masks = logits.float().sigmoid().flatten(2), masks.flatten(2)
    both, total = (probabilities * masks).sum(2), probabilities.sum(2) + masks.sum(2)
    return (1 - (2 * both + SMOOTH) / (total + SMOOTH)).mean(1)


def bce_dice(logits, masks, weights=None):
    """The sum of both: cross-entropy for each pixel, Dice for the whole."""
    return bce(logits, masks, weights) + dice_loss(logits, masks)


LOSSES = {"bce": bce, "bce-dice": bce_dice}

# Scores -------------------------------------------------------------------------------------------


def logits_of(model, images, device, tta=False):
    """The network's answer to images (N, C, H, W) from a loader: logits (N, K, H, W), float32.

    With `tta`, the mean of its answers to them and to their mirror images. A network of crops (see
    build_model) is asked tile by tile.
    """

    def answer(images):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        with autocast(device), torch.inference_mode():
            logits = model(images).float()
            if tta:
                logits = (logits + model(images.flip(-1)).float().flip(-1)) / 2
        return logits

    side = getattr(model, "crop", None)
    return in_tiles(answer, images, side) if side else answer(images)


def score_batch(logits, masks, threshold=0.5, loss_function=bce):
    """Scores of each image by itself, so that they do not depend on the batch it came in.

    Args:
        logits: (N, K, h, w); brought to the masks' size if theirs is another.
        masks: (N, K, H, W), the object above 0.5, and -1 for pixels that count nowhere.
        threshold: a pixel counts as object above this probability; loss_function: one of LOSSES.

    Returns a dict of tensors (N,) on the CPU, float64: `loss`, `correct` and `pixels` (counts),
    `accuracy`, `dice`, `iou` (0 to 1). Dice is 2|A∩B| / (|A|+|B|), and 1 where both masks are
    empty: the challenge's own definition; of several classes it is the mean. `constant` is the
    Dice of marking everything. Also (N, K), pixels: `both` (|A∩B|), `total` (|A|+|B|), `true`.
    """
    logits = logits.float()
    if logits.shape[-2:] != masks.shape[-2:]:
        logits = F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)
    known = (masks[:, :1] >= 0).flatten(2)
    logits, masks = without_ignored(logits, masks)
    loss = loss_function(logits, masks)
    predicted, true = predicted_masks(logits, threshold).flatten(2), masks.flatten(2) > 0.5
    right = (predicted == true).all(1, keepdim=True) & known
    counts = [mask.sum(2) for mask in (predicted & true, predicted, true, right, known)]
    # No float64 on MPS.
    loss, both, predicted, true, correct, pixels = (x.cpu().double() for x in (loss, *counts))
    correct, pixels, total = correct[:, 0], pixels[:, 0], predicted + true
    return {
        "loss": loss,
        "correct": correct,
        "pixels": pixels,
        "accuracy": correct / pixels.clamp(min=1),
        "dice": torch.where(total == 0, 1.0, 2 * both / total).mean(1),
        "iou": torch.where(total == 0, 1.0, both / (total - both)).mean(1),
        "constant": (2 * true / (true + pixels[:, None])).max(1).values,
        "both": both,
        "total": total,
        "true": true,
    }


def predictions(loader, model, device, tta=False):
    """Yield (images, masks, logits) for each batch of a loader; see logits_of."""
    was_training = model.training
    model.eval()
    for images, masks in loader:
        yield images, masks.to(device, non_blocking=True), logits_of(model, images, device, tta)
    model.train(was_training)


def score_loader(loader, model, device, threshold=0.5, tta=False, loss_function=bce):
    """score_batch over a loader: a dict of tensors (number of images,) in the loader's order."""
    batches = predictions(loader, model, device, tta)
    scores = [score_batch(logits, masks, threshold, loss_function) for _, masks, logits in batches]
    if not scores:  # a process may have no photos
        scores = [score_batch(*torch.empty(2, 0, model.final_conv.out_channels, 1, 1))]
    return {name: torch.cat([batch[name] for batch in scores]) for name in scores[0]}


def check_accuracy(loader, model, device, threshold=0.5, loss_function=bce, classes=None):
    """Print the two classic lines; return means over images: loss, accuracy, dice, iou (see
    report_accuracy). Under torchrun each process gives a loader of its part of the photos."""
    distributed.share_buffers(model)
    device = torch.device(device)
    scores = score_loader(loader, model, device, threshold, loss_function=loss_function)
    return report_accuracy(scores, device, classes)


def report_accuracy(scores, device, classes=None):
    """What check_accuracy prints and returns, from scores that score_loader gave; of several
    `classes`, their names, also what class_scores gives."""
    names = "loss", "accuracy", "dice", "iou", "constant", "correct", "pixels"
    counts = torch.cat([scores[name].sum(0) for name in ("both", "total", "true")])  # (3 K,)
    sums = [len(scores["dice"]), *(scores[name].sum() for name in names), *counts]
    count, *sums = distributed.reduce(sums, device)
    means = {name: part / count for name, part in zip(names[:5], sums, strict=False)}
    correct, pixels = int(sums[5]), int(sums[6])
    if len(counts) > 3:
        sums, names = torch.tensor(sums[7:]).view(3, -1), classes or class_names(len(counts) // 3)
        means |= class_scores(*sums, pixels, names)
    print(f"Got {correct}/{pixels} with acc {100 * correct / pixels:.2f}")
    print(f"Dice score: {means['dice']:.5f}", flush=True)
    return means


# Checkpoints --------------------------------------------------------------------------------------


def save_checkpoint(state, filename=CHECKPOINT):
    """Write a dict of tensors and plain values, whole or not at all. Raises BadInput."""
    with write_aside(filename) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # how torch reports that the file took no more
            if "DataLoader" in str(error):  # a data worker that died at this moment
                raise
            raise OSError(f"{error}".splitlines()[0]) from error


def load_checkpoint(filename=CHECKPOINT, model=None):
    """Read a checkpoint of ours, or a classic one with only `state_dict` and `optimizer`.

    Args:
        filename: the file, as untrusted input: nothing in it is run (weights_only).
        model: a UNet that takes over the weights, if given.

    Returns the dict, on the CPU, with `model` (the arguments of UNet, read off the tensors' shapes)
    and what CLASSIC holds filled in where it is missing. Its weights are those of such a UNet, and
    finite. Raises BadInput.
    """
    checkpoint = CLASSIC | checkpoints.read_checkpoint(filename)
    weights = checkpoint["state_dict"]
    try:
        arguments = checkpoint["model"] = checkpoints.network_arguments(weights)
        with torch.device("meta"):  # takes no memory
            UNet(**arguments).load_state_dict(dict(weights), assign=True)  # names and shapes
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("its weights are no numbers")
        checkpoint["classes"] = checkpoint["classes"] or class_names(arguments["out_channels"])
        checkpoints.check_facts(checkpoint, arguments)
        if model is not None:
            model.load_state_dict(weights)
    except checkpoints.UNUSABLE as error:
        why = printable(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        reason = f"no checkpoint of this U-Net ({why})"
        raise BadInput(filename, reason, "name another file") from None
    return checkpoint


def build_model(checkpoint, device="cpu"):
    """The network of a checkpoint that load_checkpoint gave, on a device, in evaluation mode. Its
    `crop` says whether logits_of asks it by tiles."""
    model = UNet(**checkpoint["model"])
    model.load_state_dict(checkpoint["state_dict"])
    model.crop = checkpoint["crop"]
    return model.to(device, memory_format=torch.channels_last).eval()


# Pictures -----------------------------------------------------------------------------------------


def save_predictions_as_imgs(loader, model, folder, device, threshold=0.5, normalization=None):
    """Write the classic grids of each batch's masks, `pred_<batch>.png` and `gt_<batch>.png`, and a
    panel of each photo (see panel_of), `panel_<photo's name>.png`."""
    from torchvision.utils import save_image  # takes a second, for which predict.py need not wait

    folder, device, count = Path(folder), torch.device(device), 0
    names = getattr(loader.dataset, "names", None) or list(map(str, range(len(loader.dataset))))
    for batch, parts in enumerate(predictions(loader, model, device)):
        images, masks, logits = (part.cpu() for part in parts)
        for kind, some in (("pred", predicted_masks(logits, threshold)), ("gt", masks)):
            colours = torch.from_numpy(palette(masks.shape[1]))[label_map(some).int()]
            with write_aside(folder / f"{kind}_{batch}.png") as file:
                save_image(colours.movedim(-1, 1) / 255, file, format="png")
        for name, *photo in zip(names[count:], images, masks, logits, strict=False):
            panel = panel_of(name, *photo, threshold, normalization)
            save_picture(panel, folder / f"panel_{name}.png")
        count += len(images)


def panel_of(name, image, mask, logits, threshold=0.5, normalization=None):
    """One photo's result, a PIL image: photo | true mask | prediction | where they differ.

    Args:
        image (C, H, W), mask (K, H, W), logits (K, H, W): as the network saw and gave them.
        normalization: what the image went through, to undo it; None for the classic one.
    """
    n = normalization or CLASSIC["normalization"]
    photo = (image.permute(1, 2, 0).numpy() * n["std"] + n["mean"]) * n["max_pixel_value"]
    dice = score_batch(logits[None], mask[None], threshold)["dice"].item()
    maps = [label_map(some).numpy() for some in (mask, predicted_masks(logits, threshold))]
    caption = f"{printable(name)}   Dice {dice:.4f}"
    return draw_panel(caption, photo.clip(0, 255).astype(np.uint8), *maps, palette(len(mask)))
