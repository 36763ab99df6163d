"""The cache of decoded photos: equal to reading them, built once, whole or not there."""

import os
import pickle
import shutil

import numpy as np
import pytest
from conftest import write_pairs
from PIL import Image

from dataset import get_loaders
from support import cache
from support.cache import Cache
from support.masks import BINARY, Labels
from support.pairs import find_pairs, read_pair


def pairs_of(data):
    return find_pairs(data / "train_images", data / "train_masks")


def build(data, size=(16, 24), channels=3, pairs=None, labels=BINARY):
    """A cache of these pairs, or of those there are now."""
    built = Cache(pairs or pairs_of(data), size, channels, data / "train_images", labels=labels)
    built.build()
    return built


@pytest.mark.parametrize("channels", [1, 3])
def test_cached_and_uncached_arrays_are_equal(data, channels):
    built = build(data, channels=channels)
    for pair in pairs_of(data):
        cached, read = built.read(pair), read_pair(pair, (16, 24), channels)
        for one, other in zip(cached, read, strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other)


def test_a_cache_is_built_once(data, monkeypatch):
    first = build(data)
    monkeypatch.setattr(cache, "decode_all", None)
    assert build(data).path == first.path


@pytest.mark.parametrize("change", ["photo", "mask", "touched", "added", "removed"])
def test_a_cache_is_rebuilt_when_its_files_change(data, change):
    first, pair = build(data), pairs_of(data)[4]
    if change == "added":
        write_pairs(data, cars=1, seed=1)
    elif change == "removed":
        os.unlink(pair.photo), os.unlink(pair.mask)
    elif change == "touched":  # as when another of the same size comes in its place
        os.utime(pair.photo, (0, 0))
    else:
        Image.new("L", (72, 48), "white").save(getattr(pair, change))
    second = build(data)
    assert second.path != first.path and os.listdir(data / ".cache") == [second.path.name]
    for pair in pairs_of(data):
        assert all(map(np.array_equal, second.read(pair), read_pair(pair, (16, 24))))


def test_a_file_that_was_cut_off_is_rebuilt(data):
    path = build(data).path
    content = path.read_bytes()
    path.write_bytes(content[:-200])
    assert not Cache(pairs_of(data), (16, 24), 3, data / "train_images").exists
    build(data)
    assert path.read_bytes() == content


def test_caches_of_several_sizes_and_folders_lie_beside_each_other(data, tmp_path):
    sizes = {build(data, size).path for size in ((16, 24), (8, 12))}
    assert set((data / ".cache").iterdir()) == sizes and len(sizes) == 2
    for seed in (1, 2):  # folders of the same name
        folders = write_pairs(tmp_path / str(seed), seed=seed)
        for _ in range(2):
            get_loaders(*folders, None, None, 4, size=(16, 24), cache_dir=tmp_path / "caches")
    assert len(os.listdir(tmp_path / "caches")) == 2


@pytest.mark.parametrize("labels", [Labels(values=(255,)), Labels(ignore=7), Labels(2, (255, 7))])
def test_a_cache_of_other_labels_is_removed_only_when_its_own_files_change(data, labels):
    first, other = build(data), build(data, labels=labels)
    assert first.exists and other.exists and first.path != other.path
    os.utime(pairs_of(data)[0].photo, (0, 0))
    assert build(data, labels=labels).exists and not other.path.exists() and first.path.exists()
    assert build(data).exists and not first.path.exists()
    assert len(os.listdir(data / ".cache")) == 2


def test_a_cache_of_the_same_photos_with_other_masks_stays(data):
    images, masks = data / "train_images", data / "train_masks"
    for path in list(masks.iterdir()):
        for observer in ("1st", "2nd"):
            shutil.copy(path, masks / path.name.replace("_mask", f"_{observer}"))
        path.unlink()
    caches = [build(data, pairs=find_pairs(images, masks, f"_{n}")) for n in ("1st", "2nd")]
    assert caches[0].exists and caches[1].exists
    os.utime(caches[1].pairs[0].mask, (0, 0))
    build(data, pairs=find_pairs(images, masks, "_2nd"))
    assert caches[0].exists and not caches[1].exists


def test_a_cache_sent_to_a_worker_leaves_its_map_behind(data):
    built, pair = build(data), pairs_of(data)[0]
    photo = built.read(pair)[0]
    sent = pickle.dumps(built)
    assert len(sent) < 10_000 and np.array_equal(pickle.loads(sent).read(pair)[0], photo)
