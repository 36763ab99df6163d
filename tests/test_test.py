import csv
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, save_bright_network, write_pairs
from PIL import Image

import test as evaluation
import train
from checkpoints import SHIPPED
from files import find_pairs, read_mask
from model import UNet
from utils import logits_of


@pytest.fixture
def run(tmp_path):
    """A folder with a checkpoint of the classic kind, of a network that finds the bright pixels."""
    save_bright_network(tmp_path / train.CHECKPOINT)
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
    assert re.search(r"^loss \d\.\d{5}, IoU 0\.\d{5}, standard deviation", out, re.M)
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


def test_the_table_by_view_and_the_histogram_show_all_photos(call, run):
    flags = "--output-dir", run, *folders(run), "--device", "cpu", "--csv", run / "scores.csv"
    _, out, _ = call(evaluation.main, *flags)
    listed = re.findall(r"^ +(0\d) +(\d+) +(0\.\d{5})  (0\.\d{5})$", out, re.M)
    with open(run / "scores.csv") as file:
        table = [(row["photo"][-2:], float(row["dice"])) for row in csv.DictReader(file)]
    expected = {view: [dice for other, dice in table if other == view] for view in ("01", "02")}
    assert {view for view, *_ in listed} == set(expected)
    for view, photos, mean, lowest in listed:
        assert int(photos) == 6 == len(expected[view])
        assert float(mean) == pytest.approx(np.mean(expected[view]), abs=1e-5)
        assert float(lowest) == pytest.approx(min(expected[view]), abs=1e-5)
    assert [mean for _, _, mean, _ in listed] == sorted(mean for _, _, mean, _ in listed)
    assert (run / "saved_images" / "test_histogram.png").exists()


def test_photos_of_other_names_have_no_views(call, run):
    for path in sorted(run.glob("data/*/*")):
        path.rename(path.with_name("my_" + path.name))
    code, out, err = call(evaluation.main, "--output-dir", run, *folders(run), "--device", "cpu")
    assert code == 0 and "by view" not in out, err


def test_tta_averages_a_photo_with_its_mirror_image(call, run, float32):
    flags = "--output-dir", run, *folders(run), "--device", "cpu"
    plain, averaged = (call(evaluation.main, *flags, *more)[1] for more in ([], ["--tta"]))
    dices = [float(re.search(r"Dice score: (.*)", out)[1]) for out in (plain, averaged)]
    assert dices[1] == pytest.approx(dices[0], abs=0.01)
    model = UNet(features=(4, 8)).eval()
    images = torch.rand(2, 3, 32, 48)
    logits = logits_of(model, images, torch.device("cpu"), tta=True)
    mirrored = logits_of(model, images.flip(-1), torch.device("cpu"), tta=True)
    assert torch.allclose(logits, mirrored.flip(-1), atol=1e-5)
    with torch.no_grad():
        expected = (model(images) + model(images.flip(-1)).flip(-1)) / 2
    assert torch.allclose(logits, expected, atol=1e-5)
    assert not torch.allclose(logits, logits_of(model, images, torch.device("cpu")), atol=1e-4)


def test_full_size_scores_against_the_masks_as_they_are(call, run):
    _, out, _ = call(
        evaluation.main, "--output-dir", run, *folders(run), "--device", "cpu", "--full-size"
    )
    pairs = find_pairs(run / "data/train_images", run / "data/train_masks")
    assert f"/{sum(read_mask(pair.mask).size for pair in pairs)} with acc" in out
    assert float(re.search(r"Dice score: (.*)", out)[1]) > 0.9


def test_scores_do_not_depend_on_the_batch_size(call, run, float32):
    printed = [
        call(evaluation.main, "--output-dir", run, *folders(run), "--batch-size", size)[1]
        for size in (1, 5, 16)
    ]
    assert len({re.sub(r".* s a photo.*", "", out) for out in printed}) == 1


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


def test_the_weights_that_ship_cut_out_a_car_they_never_saw(call, carvana, tmp_path):
    for name in ("train", "train_masks"):
        with zipfile.ZipFile(carvana / "kaggle" / f"{name}.zip") as archive:
            members = sorted(m for m in archive.namelist() if not m.endswith("/"))
            for member in members[:16]:  # one of the cars
                path = tmp_path / name / Path(member).name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(archive.read(member))
    flags = ["--image-dir", tmp_path / "train", "--mask-dir", tmp_path / "train_masks"]
    flags += ["--output-dir", tmp_path, "--device", "cpu", "--batch-size", 2, "--full-size"]
    code, out, err = call(evaluation.main, "--checkpoint", ROOT / SHIPPED, *flags)
    assert code == 0 and f"/{16 * 1918 * 1280} with acc" in out, err
    assert float(re.search(r"Dice score: (.*)", out)[1]) > 0.99
