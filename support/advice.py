"""What to say, a line each, of photos, masks and settings from which little can be learned."""

import re

import cv2
import numpy as np

from support.distributed import world_size
from support.errors import printable
from support.images import read_mask
from support.pairs import in_threads

FEW_STEPS, FEW_PHOTOS, FEW_PIXELS, LOW_DICE = 200, 100, 0.01, 0.95
MASKS = 24  # looked at, of those held out


def at_start(settings, pretrained, pairs, held_out):
    """Lines that are true of a run with these pairs to train and to validate on; `pretrained` is
    whether it starts from weights."""
    lines, photos = [], len(set(pairs))
    per_epoch = -(-len(pairs) // (settings.batch_size * settings.accumulate * world_size()))
    if (steps := per_epoch * settings.num_epochs) < FEW_STEPS:
        epochs = -(-FEW_STEPS // per_epoch)
        lines.append(f"Only {steps} steps: --epochs {epochs} or a smaller --batch-size makes more")
    if photos < FEW_PHOTOS and not pretrained:
        lines.append(f"Only {photos} photos to train on: try --pretrained, and --augment strong")
    covered, dice = mask_facts(held_out, None if settings.crop else settings.size, settings.labels)
    if covered < FEW_PIXELS:
        lines.append(f"Objects cover {covered:.2%} of the pixels: try --loss bce-dice, and --crop")
    if dice < LOW_DICE:
        size = f"{settings.image_height}x{settings.image_width}"
        remedy = "use a larger --image-height and --image-width, or --crop"
        lines.append(
            f"At {size} masks lose detail: scaled back, Dice is {dice:.3f} at best; {remedy}"
        )
    if not (settings.val_img_dir or settings.group):
        lines += neighbours([p.name for p in pairs], [p.name for p in held_out])
    return lines


def mask_facts(pairs, size, labels):
    """Of up to MASKS masks: (share of pixels that are objects', mean Dice of a perfect prediction
    at `size`, (height, width), scaled back to the masks' own)."""

    def facts(pair):
        mask = read_mask(pair.mask, None, labels)
        small = mask if size is None else read_mask(pair.mask, size, labels)
        dices = []
        for number in np.unique(mask[labels.objects(mask)]):
            share = small / np.float32(255) if labels.is_soft_mask else np.float32(small == number)
            scaled_back, true = cv2.resize(share, mask.shape[::-1]) > 0.5, mask == number
            dices.append(2 * (true & scaled_back).sum() / (true.sum() + scaled_back.sum()))
        return labels.objects(mask).mean(), np.mean(dices or [1])

    some = pairs[:: -(-len(pairs) // MASKS)]
    return np.mean(list(in_threads(facts, some, ahead=4)), axis=0).tolist()


def neighbours(names, held_out):
    """A line where a held-out photo's name is that of a training photo but for an L or R at its
    end, or a last number greater or less by one: views of one thing, frames of one video."""
    known = {name.lower(): name for name in names}
    for name in held_out:
        stem, number, side = re.fullmatch(r"(.*?)(\d*)([lr]?)", name.lower(), re.DOTALL).groups()
        near, group = [], r"(.*)[LR]"
        if side:
            near = [f"{stem}{number}{'r' if side == 'l' else 'l'}"]
        elif number:
            near = [f"{stem}{int(number) + step:0{len(number)}}" for step in (-1, 1)]
            group = r"(.*?)\d+" if len({re.sub(r"\d+$", "", n) for n in known}) > 1 else r"(.*)\d"
        for other in near:
            if other in known:
                both = f"{printable(name)} and, to train on, {printable(known[other])}"
                return [f"Held out are {both}: if they show one scene, try --group '{group}$'"]
    return []


def nothing_learned(settings, constant):
    """A line on a run whose best Dice is not above `constant`, that of marking everything."""
    remedy = f"more --epochs, another --lr than {settings.learning_rate:g}"
    remedy += ", or --loss bce-dice" if settings.loss == "bce" else ""
    return f"Nothing was learned: marking everything has a Dice of {constant:.5f}; try {remedy}"
