"""Photos in a GPU's memory give the batches that a data loader would."""

import numpy as np
import pytest
import torch
from conftest import assert_same

import dataset
from dataset import get_loaders
from support import loading
from support.images import Labels

CUDA = torch.device("cuda")


def loaders(data, device=None, **options):
    """Both loaders, as get_loaders gives them."""
    folders = data / "train_images", data / "train_masks", None, None
    return get_loaders(*folders, 4, size=(16, 24), augment="flip", device=device, **options)


@pytest.fixture
def roomy(monkeypatch):
    """A GPU, in this computer's own memory."""

    def copy(device, *caches):
        return {cache: torch.from_numpy(np.load(cache.path)) for cache in caches}

    monkeypatch.setattr(dataset, "copy_to", copy)


@pytest.mark.parametrize(
    "options",
    [{}, {"channels": 1}, {"labels": Labels(2, (255, 254))}, {"labels": Labels(1, (), 0)}],
)
def test_batches_are_those_of_a_data_loader_bit_for_bit(data, roomy, options):
    pairs = zip(loaders(data, **options), loaders(data, CUDA, **options), strict=True)
    for ordinary, moved in pairs:
        assert isinstance(moved, loading.DeviceLoader) and len(moved) == len(ordinary)
        for epoch, start in ((1, 0), (2, 3)) if hasattr(moved.sampler, "set_epoch") else ((0, 0),):
            if epoch:
                for loader in (ordinary, moved):
                    loader.sampler.set_epoch(epoch, start)
            assert_same(list(map(list, ordinary)), list(map(list, moved)))
        moved.close()


def test_some_photos_are_mirrored_and_others_in_another_epoch(data, roomy):
    training, _ = loaders(data, CUDA)
    keys = [[(epoch, index) for index in range(8)] for epoch in range(4)]
    mirrored = [[training.is_mirrored(key) for key in epoch] for epoch in keys]
    assert all(0 < sum(epoch) < 8 for epoch in mirrored) and mirrored[0] != mirrored[1]


def test_photos_stay_where_they_are_unless_a_gpu_has_room_for_them(data, monkeypatch, capsys):
    cache = loaders(data)[0].dataset.cache
    assert loading.copy_to(torch.device("cpu"), cache) == {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 10**12))
    assert loading.copy_to(CUDA, cache) == {} and not capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"cache": False},
        {"crop": 16},
        {"augment": "classic"},
        {"train_transform": dataset.A.Compose([dataset.A.NoOp()])},
    ],
)
def test_photos_to_be_changed_otherwise_are_not_moved(data, roomy, options):
    folders = data / "train_images", data / "train_masks", None, None
    both = get_loaders(*folders, 4, size=(16, 24), device=CUDA, **({"augment": "flip"} | options))
    assert not any(isinstance(loader, loading.DeviceLoader) for loader in both)
