"""tools/bench.py: every row is measured, for both ways."""

import pytest
import torch
from conftest import SMALL

import train
from dataset import get_eval_transform
from support.pairs import find_pairs
from support.settings import get_args_parser, parse
from tools import bench


@pytest.mark.slow
def test_every_row_is_measured_for_both_ways(call, data, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.05)
    monkeypatch.setattr(bench, "REPEATS", 1)
    code, out, err = call(bench.main, "--data-dir", data, *SMALL, "--photos", 5)
    assert code == 0, err
    lines = {line[:40].strip(): line[40:].split() for line in out.splitlines()[1:]}
    assert list(lines) == list(bench.ROWS.values())
    for title, numbers in lines.items():
        assert len(numbers) == (1 if "prediction" in title else 3)
        assert all(float(number) > 0 for number in numbers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
def test_both_ways_train_on_the_same_photos(data, tmp_path):
    given = parse(get_args_parser(train.Settings, "bench.py"), SMALL)
    pairs = find_pairs(data / "train_images", data / "train_masks")
    args = get_eval_transform(32, 48), (32, 48), torch.device("cpu"), pairs, tmp_path
    for way in (bench.ours, bench.classic):
        photos, works = way(train.Settings(**given), *args)
        assert len(photos) == len(pairs) and {"train", "evaluate"} <= works.keys()
        image, mask = photos[0, 3]
        assert image.shape == (3, 32, 48) and mask.shape == (1, 32, 48)
        assert (image.dtype, mask.dtype) == (torch.float32, torch.float32)
