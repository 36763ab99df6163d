"""Transforms, the split by car, the data set, the sampler and the loaders."""

from contextlib import closing
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import write_pairs
from PIL import Image
from torch.utils.data import DataLoader

from dataset import (
    AUGMENTATIONS,
    CarvanaDataset,
    EpochSampler,
    car_id,
    get_eval_transform,
    get_loaders,
    get_train_transform,
    make_loader,
    split_by_car,
)
from support.errors import BadInput
from support.masks import read_mask
from support.pairs import Pair


def augmented(name, seed, channels=3):
    """(image, mask) of a bright disc on a colourful ground, augmented."""
    rows, columns = np.mgrid[:64, :96]
    mask = ((rows - 30) ** 2 + (columns - 40) ** 2 < 300).astype(np.uint8)
    photo = np.stack([rows * 2, columns, (rows + columns) // 2], axis=2).astype(np.uint8)
    photo[mask > 0] = 250, 240, 230
    transform = get_train_transform(64, 96, augment=name) if name else get_eval_transform(64, 96)
    transform.set_random_seed(seed)
    result = transform(image=photo[..., :channels].copy(), mask=mask)
    return result["image"], result["mask"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_photo_and_mask_move_together_and_masks_stay_masks(name, channels):
    overlaps = []
    for seed in range(20):
        image, mask = augmented(name, seed, channels)
        assert image.shape == (channels, 64, 96) and image.dtype == torch.float32
        assert image.min() >= 0 and image.max() <= 1 and image.isfinite().all()
        assert set(mask.unique().tolist()) <= {0, 1}
        bright = image.min(dim=0).values > (0.85 if name != "strong" else 0.6)
        overlaps.append(((bright & (mask > 0)).sum() / (bright | (mask > 0)).sum()).item())
    assert np.median(overlaps) > 0.9 and (name == "strong" or min(overlaps) > 0.9)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_changes_photos_and_masks(name):
    before, results = augmented(None, 0)[0], [augmented(name, seed) for seed in range(20)]
    assert any(not torch.equal(image, before) for image, _ in results)
    masks = {mask.numpy().tobytes() for _, mask in results}
    assert len(masks) == 2 if name == "flip" else len(masks) > 10


@pytest.mark.parametrize("get_transform", [get_train_transform, get_eval_transform])
def test_transforms_shrink_masks_by_area(tmp_path, monkeypatch, get_transform):
    monkeypatch.setitem(AUGMENTATIONS, "classic", [])
    dataset = CarvanaDataset(*write_pairs(tmp_path, size=(480, 320)), get_transform(32, 48))
    for (_, mask), pair in zip(map(dataset.__getitem__, range(10)), dataset.pairs, strict=True):
        assert np.abs(mask[0].numpy() - read_mask(pair.mask, (32, 48)) / 255).max() < 0.01


def names(*cars):
    return [Pair(f"{car:012x}_{view:02d}", "", "") for car in cars for view in (1, 2, 16)]


def test_a_car_is_on_one_side_and_stays_there_when_photos_are_added():
    train, val = split_by_car(names(*range(40)))
    assert len(train) + len(val) == 3 * 40
    # As in all versions so far: test.py must score the cars that a checkpoint has not seen.
    assert {int(pair.name[:12], 16) for pair in val} == {17, 23}
    more_train, more_val = split_by_car(names(*range(600)))
    assert set(train) <= set(more_train) and set(val) <= set(more_val)
    assert 3 * 30 < len(more_val) < 3 * 90


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_each_side_has_at_least_one_car(fraction):
    assert [len(side) for side in split_by_car(names(1, 2), fraction)] == [3, 3]
    with pytest.raises(BadInput, match="the only car"):
        split_by_car(names(1), fraction)


def test_a_cars_id_is_read_from_the_challenges_names_and_others_stand_for_themselves():
    assert car_id("0cdf5b5d0ce1_01") == car_id("0CDF5B5D0CE1_16") == "0cdf5b5d0ce1"
    for name in ("0cdf5b5d0ce1_17", "0cdf5b5d0ce1_1", "0cdf5b5d0ceg_01", "img_0001"):
        assert car_id(name) == name


@pytest.fixture
def folders(data):
    return data / "train_images", data / "train_masks"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (32, 40)])
@pytest.mark.parametrize("transform", [None, get_train_transform(32, 40)])
def test_items_are_normalized_photos_and_masks_from_0_to_1(folders, size, transform, channels):
    dataset = CarvanaDataset(*folders, transform, size, channels)
    for key in (0, *((epoch, 2) for epoch in range(5))):
        image, mask = dataset[key]
        shape = (32, 40) if size or transform else (48, 72)
        assert image.dtype == mask.dtype == torch.float32
        assert image.shape == (channels, *shape) and mask.shape == (1, *shape)
        assert 0 <= image.min() < 0.4 < image.max() <= 1 and (mask.min(), mask.max()) == (0, 1)
        assert (len(mask.unique()) > 2) == bool(size or transform), "shrunk ones hold shares"


def test_a_transform_of_the_callers_sees_the_photo_at_full_size(folders):
    def transform(image, mask):
        assert image.shape == (48, 72, 3) and mask.shape == (48, 72)
        return A.Compose([A.Resize(16, 24)])(image=image, mask=mask)

    image, mask = CarvanaDataset(*folders, transform)[0]
    assert image.shape == (3, 16, 24) and mask.shape == (1, 16, 24)


def test_the_flips_are_drawn_independently(folders):
    photos = CarvanaDataset(*folders, A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]))
    plain, seen = CarvanaDataset(*folders, A.Compose([A.NoOp()]))[0][0], set()
    flips = {axes: plain.flip(axes) for axes in ((), (1,), (2,), (1, 2))}
    for epoch in range(40):
        image = photos[epoch, 0][0]
        seen |= {axes for axes, flipped in flips.items() if torch.equal(image, flipped)}
    assert len(seen) == 4


def test_the_place_of_a_crop_says_nothing_about_mirroring(tmp_path):
    (tmp_path / "photos").mkdir(), (tmp_path / "masks").mkdir()
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None], 8, axis=0)  # each pixel tells its column
    for number in range(40):
        Image.fromarray(ramp).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
        Image.fromarray(ramp // 32 * 255).save(tmp_path / "masks" / f"{number}.png")
    transform = A.Compose([A.HorizontalFlip(p=0.5), A.pytorch.ToTensorV2()])
    photos = CarvanaDataset(tmp_path / "photos", tmp_path / "masks", transform, crop=8)
    mirrored = {"left": [], "right": []}
    for epoch in range(20):
        for index in range(40):
            row = photos[epoch, index][0][0, 0]
            side = "left" if row.min() < 28 else "right"
            mirrored[side].append(bool(row[0] > row[-1]))
    for flips in mirrored.values():
        assert abs(np.mean(flips) - 0.5) < 0.1, "which 62 % and 28 % were not"


def images_of(folders, workers, epoch, seed=0):
    photos = CarvanaDataset(*folders, get_train_transform(32, 48), size=(32, 48), seed=seed)
    sampler = EpochSampler(len(photos), seed)
    with closing(make_loader(photos, 3, workers, sampler=sampler)) as loader:
        for now in range(epoch + 1):  # the workers live on
            sampler.set_epoch(now)
            images = torch.cat([image for image, _ in loader])
    return images


def test_augmentation_and_order_do_not_depend_on_the_workers(folders):
    first = images_of(folders, 0, epoch=1)
    assert torch.equal(first, images_of(folders, 2, epoch=1))
    assert not torch.equal(first, images_of(folders, 0, epoch=2))
    assert not torch.equal(first, images_of(folders, 0, epoch=1, seed=1))


def test_a_sampler_resumes_within_an_epoch():
    sampler = EpochSampler(10, seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    assert sorted(whole) == [(2, index) for index in range(10)]
    sampler.set_epoch(2, start=4)
    assert list(sampler) == whole[4:] and len(sampler) == 6


def epochs_of(loader, number=2):
    """The images of so many epochs, each (N, C, H, W), in the order of the photos."""
    return [torch.cat([images for images, _ in loader]) for _ in range(number)]


def ramps(folder, number=8):
    """A data set of the same photo several times, rotated by whatever is drawn for each."""
    (folder / "photos").mkdir(), (folder / "masks").mkdir()
    photo = Image.linear_gradient("L").resize((32, 32))
    for index in range(number):
        photo.save(folder / "photos" / f"{index}.png")
        photo.point(lambda value: value // 128 * 255).save(folder / "masks" / f"{index}.png")
    transform = A.Compose([A.Rotate(limit=90, p=1.0), A.pytorch.ToTensorV2()])
    return CarvanaDataset(folder / "photos", folder / "masks", transform)


@pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (2, True)])
def test_a_plain_data_loader_augments_afresh_in_each_epoch_and_worker(
    tmp_path, workers, persistent
):
    loader = DataLoader(
        ramps(tmp_path),
        2,
        num_workers=workers,
        persistent_workers=persistent,
        multiprocessing_context="forkserver" if workers else None,
    )
    images = torch.cat(epochs_of(loader))
    assert len({image.numpy().tobytes() for image in images}) == len(images) == 16


def test_manual_seed_repeats_what_a_plain_data_loader_draws(tmp_path):
    loader = DataLoader(ramps(tmp_path), 2, shuffle=True)
    torch.manual_seed(5)
    first = epochs_of(loader)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, epochs_of(loader), strict=True))


def test_crops_are_drawn_afresh_too(folders):
    photos = CarvanaDataset(*folders, crop=16)
    assert len({photos[0][0].numpy().tobytes() for _ in range(8)}) > 1


def test_items_without_randomness_take_no_random_number(folders):
    before = torch.get_rng_state()
    photos = CarvanaDataset(*folders, size=(32, 48))
    assert torch.equal(photos[1][0], photos[1][0])
    assert torch.equal(torch.get_rng_state(), before), "validation changes nothing in training"


@pytest.mark.parametrize("workers", [0, 2])
def test_get_loaders_moves_on_by_an_epoch_by_itself(folders, workers):
    loader, _ = get_loaders(*folders, None, None, 3, num_workers=workers, size=(32, 48))
    with closing(loader):
        first, second = epochs_of(loader)
        loader.sampler.set_epoch(0)
        again = epochs_of(loader)
        assert torch.equal(first, again[0]) and torch.equal(second, again[1])
        loader.sampler.set_epoch(1)
        assert torch.equal(second, epochs_of(loader, 1)[0])
    assert not torch.equal(first, second)


def test_each_iteration_of_a_sampler_has_another_order():
    sampler = EpochSampler(10, seed=3)
    epochs = [list(sampler) for _ in range(3)]
    assert [{epoch for epoch, _ in keys} for keys in epochs] == [{0}, {1}, {2}]
    assert len({tuple(index for _, index in keys) for keys in epochs}) == 3
    sampler.set_epoch(7, start=4)
    assert [len(list(sampler)) for _ in range(2)] == [6, 10], "the start counts for one epoch"
    assert next(iter(sampler))[0] == 9


def test_a_plain_data_loaders_worker_names_the_bad_photo(folders):
    photos = CarvanaDataset(*folders)
    Path(photos.pairs[0].photo).write_bytes(b"no photo")
    loader = DataLoader(photos, 2, num_workers=1, multiprocessing_context="forkserver")
    with pytest.raises(RuntimeError, match=f"{photos.names[0]}.jpg: cannot be read"):
        list(loader)


def test_validation_photos_of_their_own_are_used(folders, data):
    loaders = get_loaders(*folders, *write_pairs(data, 2, side="val", seed=9), 4, size=(16, 24))
    assert [(len(loader.dataset), len(list(loader))) for loader in loaders] == [(10, 3), (4, 1)]


def test_validation_takes_no_random_numbers(folders):
    _, val_loader = get_loaders(*folders, None, None, 2, size=(16, 24))
    before = torch.get_rng_state()
    for _ in val_loader:
        val_loader.dataset[0]
    assert torch.equal(torch.get_rng_state(), before)
