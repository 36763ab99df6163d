"""test.py: what it prints, writes and reads."""

import re
import zipfile
from collections import Counter

import pytest
import torch
from conftest import assert_refused, rows, save_bright_network, write_pairs

import test as evaluation
from dataset import split_by_car
from model import UNet
from support.images import read_photo
from support.masks import read_mask
from support.pairs import find_pairs
from utils import BEST_CHECKPOINT, CHECKPOINT, SHIPPED, load_checkpoint, logits_of, save_checkpoint


@pytest.fixture
def score(call, tmp_path):
    """Score a classic network that finds the bright pixels on twelve photos: score(*flags)."""
    save_bright_network(tmp_path / CHECKPOINT)
    images, masks = write_pairs(tmp_path / "data", cars=6)
    own = ["--output-dir", tmp_path, "--image-dir", images, "--mask-dir", masks, "--device", "cpu"]
    return lambda *flags: call(evaluation.main, *own, *flags)


def dice(out):
    return float(re.search(r"^Dice score: (0\.\d{5})$", out, re.M)[1])


def test_it_prints_and_draws_and_writes_scores_at_the_classic_size(score, tmp_path):
    code, out, _ = score("--csv", tmp_path / "scores.csv")
    correct, pixels, percent = re.search(r"^Got (\d+)/(\d+) with acc (.*)$", out, re.M).groups()
    assert int(pixels) == 12 * 160 * 240 and percent == f"{100 * int(correct) / int(pixels):.2f}"
    assert re.search(r"^loss \d\.\d{5}, IoU 0\.\d{5}, spread of Dice 0\.\d{5}$", out, re.M)
    listed = re.findall(r"^  (0\.\d{5})  \w+$", out, re.M)
    assert code == 0 and len(listed) == 10 and listed == sorted(listed)
    table = rows(tmp_path, "scores.csv")
    assert list(table[0]) == ["photo", "loss", "accuracy", "dice", "iou"] and len(table) == 12
    assert dice(out) == pytest.approx(sum(float(row["dice"]) for row in table) / 12, abs=1e-5)
    pictures = {path.name for path in (tmp_path / "saved_images").iterdir()}
    assert pictures == {f"test_{name}.png" for name in ("worst", "median", "best", "histogram")}


def test_full_size_scores_against_the_masks_as_they_are(score):
    out = score("--full-size")[1]
    assert f"/{12 * 72 * 48} with acc" in out and dice(out) > 0.9


def test_scores_do_not_depend_on_the_batch_size(score, float32):
    printed = {re.sub(".* s per photo.*", "", score("--batch-size", n)[1]) for n in (1, 5, 16)}
    assert len(printed) == 1


def test_tta_averages_a_photo_with_its_mirror_image(call, finished, float32):
    for name, *more in (["plain.csv"], ["tta.csv", "--tta"]):
        flags = "--output-dir", finished, "--csv", finished / name, "--device", "cpu", *more
        call(evaluation.main, *flags)
    assert rows(finished, "plain.csv") != rows(finished, "tta.csv")
    model, images, cpu = UNet(features=(4, 8)).eval(), torch.rand(2, 3, 32, 48), torch.device("cpu")
    expected = logits_of(model, images, cpu) + logits_of(model, images.flip(-1), cpu).flip(-1)
    assert torch.allclose(logits_of(model, images, cpu, tta=True), expected / 2, atol=1e-5)


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often each file is decoded."""
    times = Counter()
    for name, read in (("read_photo", read_photo), ("read_mask", read_mask)):

        def counted(path, *args, read=read):
            times[path] += 1
            return read(path, *args)

        monkeypatch.setattr(f"support.pairs.{name}", counted)
    return times


def test_each_photo_is_decoded_once(score, decoded):
    score()
    # Of the worst, the median and the best photo pictures are drawn at the end.
    assert len(decoded) == 24 and sum(times - 1 for times in decoded.values()) == 2 * 3


def test_the_cars_that_training_held_out_are_scored_from_its_cache(call, finished, decoded, data):
    best, pairs = finished / BEST_CHECKPOINT, find_pairs(*sorted(data.iterdir()))
    flags = "--output-dir", finished, "--csv", finished / "scores.csv", "--device", "cpu"
    for fraction in (0.5, 0.1):
        save_checkpoint(load_checkpoint(best) | {"val_fraction": fraction}, best)
        _, out, err = call(evaluation.main, *flags)
        held_out = [pair.name for pair in split_by_car(pairs, fraction)[1]]
        assert [row["photo"] for row in rows(finished, "scores.csv")] == held_out, err
    row = max(rows(finished), key=lambda row: (float(row["dice"]), -float(row["val_loss"])))
    in_training = f"loss {float(row['val_loss']):.5f}, IoU {float(row['iou']):.5f}"
    assert in_training in out
    assert not decoded


@pytest.mark.slow
def test_the_weights_that_ship_cut_out_a_car_they_never_saw(call, carvana, tmp_path):
    for name in ("train", "train_masks"):
        with zipfile.ZipFile(carvana / "kaggle" / f"{name}.zip") as archive:
            photos = sorted(member for member in archive.namelist() if member[-1] != "/")
            archive.extractall(tmp_path, photos[:16])  # of one car
    own = "--image-dir", tmp_path / "train", "--mask-dir", tmp_path / "train_masks", "--full-size"
    _, out, err = call(evaluation.main, "--checkpoint", SHIPPED, "--output-dir", tmp_path, *own)
    assert f"/{16 * 1918 * 1280} with acc" in out and dice(out) > 0.99, err


@pytest.mark.parametrize(
    "wrong", [{"mask_suffix": 5}, {"group": "("}, {"ignore": -1}, {"train_img_dir": [1]}]
)
def test_settings_of_a_strange_checkpoint_are_refused_in_a_line(call, finished, wrong):
    checkpoint = load_checkpoint(finished / BEST_CHECKPOINT)
    checkpoint["settings"] |= wrong
    save_checkpoint(checkpoint, finished / BEST_CHECKPOINT)
    refused = call(evaluation.main, "--output-dir", finished)
    assert_refused(refused, "best_checkpoint.pth.tar: its settings make no sense", *wrong)
