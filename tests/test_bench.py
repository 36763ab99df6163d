import json

import pytest
import torch

import bench
from dataset import get_eval_transform
from files import find_pairs
from settings import get_args_parser

TINY = "--features 4 8 --image-height 32 --image-width 48 --batch-size 4 --device cpu".split()


@pytest.mark.parametrize("photos", [4, 25])  # one batch; more than there are
def test_every_row_is_measured_for_both_ways(call, data, tmp_path, monkeypatch, forkserver, photos):
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: forkserver)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "SECONDS", 0.05)
    monkeypatch.setattr(bench, "REPEATS", 2)
    code, out, err = call(bench.main, "--data-dir", data, *TINY, "--photos", photos)
    assert code == 0, err
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["settings"]["photos"] == photos
    for measure, title in bench.ROWS.items():
        assert title in out
        rates = results["photos_per_second"][measure]
        assert list(rates) == ["ours", "classic"]
        assert all(len(times) == 2 and min(times) > 0 for times in rates.values())
    assert results["matmul_flops_per_second"] > 1e9
    assert results["seconds_a_photo_of_all_over_a_tenth"] > 0
    assert min(memory["host"] for memory in results["step_peak_gib"].values()) > 0.1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
@pytest.mark.parametrize("way", [bench.Ours, bench.Classic])
def test_a_way_goes_through_as_many_photos_as_it_is_told(way, data, tmp_path):
    args = get_args_parser(vars(bench.train)).parse_args([*TINY, "--cache-dir", str(tmp_path)])
    pairs = find_pairs(data / "train_images", data / "train_masks")
    batches = list(way(args, pairs, torch.device("cpu")).loader(6, 0, get_eval_transform(32, 48)))
    assert [image.shape for image, _ in batches] == [(4, 3, 32, 48), (2, 3, 32, 48)]
    assert all(
        image.shape[0] == len(mask) and mask.shape[1:] == (1, 32, 48) for image, mask in batches
    )


def test_the_count_of_operations_is_that_of_the_default_network():
    args = get_args_parser(vars(bench.train)).parse_args([])
    macs = 0  # of the forward pass, by hand
    for level, features in enumerate((64, 128, 256, 512, 1024)):
        pixels = (160 >> level) * (240 >> level)
        below = 3 if level == 0 else features // 2
        macs += pixels * 9 * (below * features + features * features)
        if level < 4:  # on the way up: the transposed convolution and the two after it
            macs += pixels * (2 * features * features + 9 * 3 * features * features)
    macs += 160 * 240 * 64
    first = 160 * 240 * 9 * 3 * 64  # needs no gradient of its input, the photo
    assert bench.flops_a_photo(args) == 2 * (3 * macs - first)


def test_bad_flags_are_answered_in_one_line(call, tmp_path):
    for flags, reason in (
        (["--photos", 3, "--batch-size", 4], "less than a batch of 4"),
        (["--data-dir", tmp_path / "none"], "no such folder"),
        (["--image-height", 8], "at least"),
    ):
        code, _, err = call(bench.main, "--device", "cpu", *flags)
        assert code == 2 and reason in err and len(err.splitlines()) == 1, err
