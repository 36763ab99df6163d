"""tools/bench.py: every row is measured, for both ways."""

import pytest
import torch
from conftest import SMALL

import train
import utils
from dataset import get_eval_transform
from support.pairs import find_pairs
from support.settings import get_args_parser, parse
from tools import bench


@pytest.fixture
def measure(call, data, monkeypatch):
    """bench.py in moments: measure(*flags) -> {the table's row: its numbers}."""

    def measure(*flags):
        monkeypatch.setattr(bench, "SECONDS", 0.05)
        monkeypatch.setattr(bench, "REPEATS", 1)
        monkeypatch.setattr(bench, "INTERVAL", 0)
        code, out, err = call(bench.main, "--data-dir", data, *SMALL, "--photos", 5, *flags)
        assert code == 0, err
        rows = {line[:60].strip(): line[60:].split() for line in out.splitlines()[1:]}
        assert all(float(number) > 0 for numbers in rows.values() for number in numbers)
        return rows

    return measure


@pytest.mark.slow
def test_every_row_is_measured_for_both_ways(measure):
    rows = measure()
    assert list(rows) == [title for row, title in bench.ROWS.items() if row != "compiled"]
    for title, numbers in rows.items():
        assert len(numbers) == (1 if "prediction" in title else 3)


@pytest.mark.slow
def test_rows_are_measured_beside_others(measure, monkeypatch):
    monkeypatch.setattr(bench, "BESIDE", ("step",))
    rows = measure("--beside")
    assert len(rows) == 3 and all(len(numbers) == 3 for numbers in rows.values())


@pytest.mark.slow
def test_a_profile_says_what_takes_the_time(call, data, trained, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.05)
    monkeypatch.setattr(utils, "SHIPPED", str(trained / utils.CHECKPOINT))
    code, out, err = call(bench.main, "--data-dir", data, *SMALL, "--photos", 5, "--profile")
    assert code == 0 and out.count("GFLOP a photo") == 2 and "aten::convolution_backward" in out


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
