"""tools/bench.py: every row is measured, for both ways."""

import pytest
import torch
from conftest import SMALL

import train
import utils
from dataset import get_eval_transform
from support.flags import check
from support.pairs import find_pairs
from support.settings import read_flags
from tools import bench


@pytest.mark.slow
def test_every_row_is_measured_for_both_ways(call, data, trained, monkeypatch):
    monkeypatch.setattr(bench, "TURNS", 1)
    monkeypatch.setattr(utils, "SHIPPED", str(trained / utils.CHECKPOINT))
    code, out, err = call(bench.main, "--data-dir", data, *SMALL, "--photos", 5)
    assert code == 0, err
    rows = {line[:42].strip(): line[42:].split() for line in out.splitlines()[1:]}
    assert list(rows) == list(bench.ROWS.values())
    for title, numbers in rows.items():
        assert len(numbers) == (2 if "prediction" in title else 5)
        assert all(float(number) > 0 for number in numbers)


@pytest.mark.parametrize("kind", [bench.Ours, bench.Classic])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
def test_both_ways_train_on_the_same_photos(data, tmp_path, kind):
    settings = check(train.Settings, read_flags(train.Settings, SMALL))
    pairs = find_pairs(data / "train_images", data / "train_masks")
    way = kind(settings, pairs, tmp_path)
    photos = way.loader(get_eval_transform(32, 48)).dataset
    assert len(photos) == len(pairs)
    image, mask = photos[0, 3]
    assert image.shape == (3, 32, 48) and mask.shape == (1, 32, 48)
    assert (image.dtype, mask.dtype) == (torch.float32, torch.float32)
    way.train()
    way.evaluate()
