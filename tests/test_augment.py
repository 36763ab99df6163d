import numpy as np
import pytest
import torch

from augment import AUGMENTATIONS, get_eval_transform, get_train_transform


def photo_and_mask(channels=3):
    """A disc, off the centre, on a colourful ground; the mask is where it is."""
    rows, columns = np.mgrid[:64, :96]
    mask = ((rows - 30) ** 2 + (columns - 40) ** 2 < 300).astype(np.uint8)
    photo = np.stack([rows * 2, columns, (rows + columns) // 2], axis=2).astype(np.uint8)
    photo[mask > 0] = 250, 240, 230
    return photo[..., :channels].copy(), mask


def drawn(name, seed, channels=3):
    transform = get_train_transform(64, 96, augment=name)
    transform.set_random_seed(seed)
    photo, mask = photo_and_mask(channels)
    result = transform(image=photo, mask=mask)
    return result["image"], result["mask"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_photo_and_mask_move_together_and_masks_stay_masks(name, channels):
    overlaps = []
    for seed in range(20):
        image, mask = drawn(name, seed, channels)
        assert image.shape == (channels, 64, 96) and image.dtype == torch.float32
        assert image.min() >= 0 and image.max() <= 1 and image.isfinite().all()
        assert set(mask.unique().tolist()) <= {0, 1}
        if name != "strong":  # which changes the colours
            bright = image.min(dim=0).values > 0.85
            overlaps.append(((bright & (mask > 0)).sum() / (bright | (mask > 0)).sum()).item())
    assert name == "strong" or min(overlaps) > 0.9


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_changes_photos_and_masks(name):
    before = get_eval_transform(64, 96)(image=photo_and_mask()[0])["image"]
    results = [drawn(name, seed) for seed in range(20)]
    assert any(not torch.equal(image, before) for image, _ in results)
    masks = {mask.numpy().tobytes() for _, mask in results}
    assert len(masks) == 2 if name == "flip" else len(masks) > 10


def test_strong_changes_light_and_colour():
    means = torch.stack([drawn("strong", seed)[0].mean(dim=(1, 2)) for seed in range(30)])
    assert (means.std(dim=0) > 0.02).all()
    ratios = means[:, 0] / means[:, 2]
    assert ratios.std() > 0.02
