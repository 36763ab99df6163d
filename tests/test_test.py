import csv
import re

import numpy as np
import pytest
import torch
from conftest import write_pairs
from PIL import Image

import test as evaluation
import train
from files import find_pairs, read_mask
from model import UNet
from utils import save_checkpoint


@pytest.fixture
def run(tmp_path):
    """A folder with a checkpoint of the classic kind, of a network that finds the bright pixels."""
    model = UNet(features=(4,)).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    for block in (model.downs[0].conv, model.ups[1].conv):  # the first channel goes through
        for conv, norm in ((0, 1), (3, 4)):
            block[conv].weight.data[0, 0, 1, 1] = 1
            block[norm].weight.data[:] = 1
    model.final_conv.weight.data[0, 0], model.final_conv.bias.data[0] = 1, -0.45
    save_checkpoint(
        {"state_dict": model.state_dict(), "optimizer": {}}, tmp_path / train.CHECKPOINT
    )
    write_pairs(tmp_path / "data", cars=6, size=(72, 48))
    return tmp_path


def folders(run):
    return "--image-dir", run / "data/train_images", "--mask-dir", run / "data/train_masks"


def test_a_classic_checkpoint_is_scored_at_the_classic_size(call, run):
    code, out, err = call(evaluation.main, "--output-dir", run, *folders(run), "--device", "cpu")
    assert code == 0, err
    correct, pixels, percent = re.search(r"Got (\d+)/(\d+) with acc (.*)", out).groups()
    assert int(pixels) == 12 * 160 * 240
    assert float(percent) == pytest.approx(100 * int(correct) / int(pixels), abs=0.01)
    assert re.search(r"^Dice score: 0\.\d{5}$", out, re.M)
    assert re.search(r"^loss \d\.\d{5}, IoU 0\.\d{5}$", out, re.M)
    listed = re.findall(r"^  (0\.\d{5})  (\w+)$", out, re.M)
    assert len(listed) == 10 and [d for d, _ in listed] == sorted(d for d, _ in listed)
    for title in ("worst", "median", "best"):
        with Image.open(run / "saved_images" / f"test_{title}.png") as panel:
            assert panel.width == 4 * 240


def test_the_csv_has_a_row_for_each_photo_and_agrees_with_the_printed_means(call, run):
    flags = "--output-dir", run, *folders(run), "--device", "cpu", "--csv", run / "scores.csv"
    _, out, _ = call(evaluation.main, *flags)
    with open(run / "scores.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["photo", "loss", "accuracy", "dice", "iou"] and len(table) == 12
    assert f"Dice score: {np.mean([float(row['dice']) for row in table]):.5f}" in out


def test_full_size_scores_against_the_masks_as_they_are(call, run):
    _, out, _ = call(
        evaluation.main, "--output-dir", run, *folders(run), "--device", "cpu", "--full-size"
    )
    pairs = find_pairs(run / "data/train_images", run / "data/train_masks")
    assert f"/{sum(read_mask(pair.mask).size for pair in pairs)} with acc" in out
    assert float(re.search(r"Dice score: (.*)", out)[1]) > 0.9


def test_scores_do_not_depend_on_the_batch_size(call, run, float32):
    printed = {
        call(evaluation.main, "--output-dir", run, *folders(run), "--batch-size", size)[1]
        for size in (1, 5, 16)
    }
    assert len(printed) == 1


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--checkpoint nowhere", "nowhere: no such checkpoint"),
        ("--image-dir somewhere", "belong together"),
        ("--image-dir nowhere --mask-dir nowhere", "nowhere: no such folder"),
        ("--batch-size 0", "--batch-size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call, run, flags, line):
    code, _, err = call(evaluation.main, "--output-dir", run, *flags.split(" "))
    assert code == 2 and line in err and len(err.strip().splitlines()) == 1
