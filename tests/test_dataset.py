import os
from types import SimpleNamespace

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from conftest import write_pairs
from PIL import Image

from dataset import (
    CarvanaDataset,
    EpochSampler,
    build_cache,
    get_loaders,
    get_train_transform,
    make_loader,
    split_by_car,
)
from files import BadInput, Pair, find_pairs, read_pair

# The data set


def test_items_are_normalized_photos_and_masks_of_0_and_1(data):
    folders = data / "train_images", data / "train_masks"
    transform = get_train_transform(32, 40)
    for item in (
        CarvanaDataset(*folders)[0],
        CarvanaDataset(*folders, size=(32, 40))[1],
        *(CarvanaDataset(*folders, transform, size=(32, 40))[epoch, 2] for epoch in range(20)),
        *(CarvanaDataset(*folders, transform)[epoch, 2] for epoch in range(5)),
    ):
        image, mask = item
        assert image.dtype == mask.dtype == torch.float32
        assert image.shape[1:] in ((32, 40), (48, 72)) and mask.shape == (1, *image.shape[1:])
        assert image.min() >= 0 and 0.5 < image.max() <= 1
        assert set(mask.unique().tolist()) == {0, 1}
    grey = CarvanaDataset(*folders, transform, size=(32, 40), channels=1)
    assert grey[0][0].shape == (1, 32, 40)


def test_a_transform_of_the_callers_sees_the_photo_at_full_size(data):
    seen = []

    def look(image, **_):
        seen.append(image.shape)
        return image

    transform = A.Compose(
        [A.Lambda(image=look, p=1), A.Resize(16, 24), A.Normalize(0.0, 1.0, 255.0), ToTensorV2()]
    )
    image, mask = CarvanaDataset(data / "train_images", data / "train_masks", transform)[0]
    assert seen == [(48, 72, 3)] and image.shape == (3, 16, 24) and mask.shape == (1, 16, 24)
    plain = A.Compose([A.Resize(16, 24)])
    assert CarvanaDataset(data / "train_images", data / "train_masks", plain)[0][0].shape[0] == 3


def epoch_of(data, workers, epoch, seed=0):
    transform = get_train_transform(32, 48)
    photos = CarvanaDataset(
        data / "train_images", data / "train_masks", transform, size=(32, 48), seed=seed
    )
    loader = make_loader(photos, 3, workers, sampler=EpochSampler(len(photos), seed))
    for now in range(epoch + 1):  # the workers live on
        loader.sampler.set_epoch(now)
        batches = list(loader)
    return torch.cat([image for image, _ in batches])


def test_augmentation_and_order_do_not_depend_on_the_workers(data):
    first = epoch_of(data, 0, epoch=1)
    assert torch.equal(first, epoch_of(data, 2, epoch=1))
    assert not torch.equal(first, epoch_of(data, 0, epoch=2))
    assert not torch.equal(first, epoch_of(data, 0, epoch=1, seed=1))


def test_the_flips_are_drawn_independently(data):
    photos = CarvanaDataset(
        data / "train_images",
        data / "train_masks",
        A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]),
    )
    plain = CarvanaDataset(data / "train_images", data / "train_masks", A.Compose([A.NoOp()]))[0][0]
    seen = set()
    for epoch in range(40):
        image = photos[epoch, 0][0]
        for h, v in ((0, 0), (0, 1), (1, 0), (1, 1)):
            flipped = plain.flip([2]) if h else plain
            if torch.equal(image, flipped.flip([1]) if v else flipped):
                seen.add((h, v))
    assert len(seen) == 4


@pytest.mark.parametrize("cache", [True, False])
def test_bad_files_that_only_decoding_shows_are_reported_together(data, cache):
    photos = sorted((data / "train_images").iterdir())
    for path in photos[:3]:
        path.write_bytes(path.read_bytes()[:-200])
    coloured = np.random.default_rng(0).integers(0, 255, (48, 72, 3)).astype(np.uint8)
    mask = sorted((data / "train_masks").iterdir())[-1]
    mask.unlink()
    Image.fromarray(coloured).save(mask.with_suffix(".png"))
    with pytest.raises(BadInput) as problem:
        get_loaders(
            data / "train_images", data / "train_masks", None, None, 2, size=(16, 24), cache=cache
        )
    assert "(4)" in str(problem.value) and "truncated" in str(problem.value)
    assert not list(data.glob(".cache/*")), "no half cache may stay"


# The split


def names(*cars):
    return [Pair(f"{car:012x}_{view:02d}", "", "") for car in cars for view in (1, 2, 16)]


def test_a_car_is_on_one_side_and_stays_there_when_photos_are_added():
    train, val = split_by_car(names(*range(300)))
    train_cars, val_cars = ({pair.name[:12] for pair in side} for side in (train, val))
    assert not train_cars & val_cars and len(train) + len(val) == 900
    assert 15 < len(val_cars) < 45
    more_train, more_val = split_by_car(names(*range(600)))
    assert set(train) <= set(more_train) and set(val) <= set(more_val)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_each_side_has_at_least_one_car(fraction):
    train, val = split_by_car(names(1, 2), fraction)
    assert len(train) == len(val) == 3


def test_photos_with_other_names_are_split_each_by_itself():
    train, val = split_by_car([Pair(f"IMG_{i}", "", "") for i in range(100)])
    assert 2 < len(val) < 25 and len(train) + len(val) == 100


def test_a_single_car_cannot_be_split():
    with pytest.raises(BadInput, match="the only car"):
        split_by_car(names(1))


# The cache


def test_cached_and_uncached_arrays_are_equal(data):
    pairs = find_pairs(data / "train_images", data / "train_masks")
    for channels in (1, 3):
        cache = build_cache(pairs, (16, 24), channels, data / "train_images")
        for pair in pairs:
            for cached, read in zip(
                cache.read(pair), read_pair(pair, (16, 24), channels), strict=True
            ):
                assert cached.shape == read.shape and (cached == read).all()


def test_a_cache_is_built_once_and_again_when_a_photo_changes(data):
    def build():
        pairs = find_pairs(data / "train_images", data / "train_masks")
        return pairs, build_cache(pairs, (16, 24), 3, data / "train_images")

    pairs, first = build()
    stamp = os.stat(first.path).st_mtime_ns
    assert os.stat(build()[1].path).st_mtime_ns == stamp
    Image.new("RGB", (72, 48), "white").save(pairs[4].photo)
    _, second = build()
    assert (second.read(pairs[4])[0] > 250).all()
    assert [path.name for path in (data / ".cache").iterdir()] == [second.path.name]


@pytest.mark.parametrize("cache", [True, False])
def test_masks_that_are_all_empty_are_refused(data, cache):
    for path in (data / "train_masks").iterdir():
        Image.new("L", (72, 48)).save(path)
    with pytest.raises(BadInput, match="train_masks: no mask has a pixel of an object"):
        get_loaders(
            data / "train_images", data / "train_masks", None, None, 2, size=(16, 24), cache=cache
        )
    assert not list(data.glob(".cache/*"))


def test_a_disk_without_room_is_noticed_before_anything_is_decoded(data, monkeypatch):
    monkeypatch.setattr("dataset.shutil.disk_usage", lambda path: SimpleNamespace(free=15_359))
    monkeypatch.setattr("dataset.read_pair", None)
    with pytest.raises(BadInput, match=r"0\.00 GiB.*--cache-dir or --no-cache"):
        get_loaders(data / "train_images", data / "train_masks", None, None, 2, size=(16, 24))
    assert not (data / ".cache").exists()


def test_folders_of_equal_name_may_share_a_cache_folder(tmp_path):
    folders = [write_pairs(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for _ in range(2):
        loaders = get_loaders(
            *folders[0], *folders[1], 4, size=(16, 24), cache_dir=tmp_path / "cache"
        )
        assert [len(list(loader)) for loader in loaders] == [3, 3]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_sent_to_a_worker_leaves_its_map_behind(data):
    pairs = find_pairs(data / "train_images", data / "train_masks")
    cache = build_cache(pairs, (16, 24), 3, data / "train_images")
    cache.read(pairs[0])
    assert cache.__getstate__()["table"] is None


def test_validation_photos_of_their_own_are_used(data):
    write_pairs(data, cars=2, side="val", seed=9)
    loaders = get_loaders(
        *(data / name for name in ("train_images", "train_masks", "val_images", "val_masks")),
        batch_size=4,
        size=(16, 24),
    )
    assert [len(loader.dataset) for loader in loaders] == [10, 4]


class Probe(torch.utils.data.Dataset):
    """Hands over the memory that the worker's process holds, beside the photos."""

    def __init__(self, photos):
        self.photos = photos

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, key):
        image, _ = self.photos[key]
        with open("/proc/self/status") as status:
            peak = next(line for line in status if line.startswith("VmHWM"))
        return image.sum(), int(peak.split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("cache", [True, False])
def test_peak_memory_of_a_worker_does_not_grow_over_epochs(data, cache):
    write_pairs(data, cars=20, size=(480, 320), seed=1)
    loader, _ = get_loaders(
        data / "train_images", data / "train_masks", None, None, 4, size=(160, 240), cache=cache
    )
    loader = make_loader(Probe(loader.dataset), 4, 1, sampler=loader.sampler)
    peaks = []
    for epoch in range(40):
        loader.sampler.set_epoch(epoch)
        peaks.append(max(peak.max().item() for _, peak in loader))
    assert peaks[-1] - peaks[19] < 4 * 1024, f"kB after each epoch: {peaks}"
