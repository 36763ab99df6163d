"""A run's settings: constants, flags, what a checkpoint says, and which of them counts."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, assert_refused, rows

import train
from support.errors import BadInput
from support.settings import FOLDERS, choose_settings, flag, get_args_parser, read_flags
from train import Settings
from utils import CHECKPOINT, load_checkpoint, save_checkpoint


def given(*argv):
    return read_flags(get_args_parser(Settings, "train.py"), argv)


def test_every_constant_is_a_setting_and_every_setting_a_flag():
    top = (ROOT / "train.py").read_text().split("OPTIMIZERS = ")[0]
    constants = re.findall("^([A-Z_]+) = ", top, re.M)
    expected = {name.lower(): getattr(train, name) for name in constants if name != "ROOT"}
    assert dataclasses.asdict(Settings()) == expected and len(expected) > 20
    help = get_args_parser(Settings, "train.py").format_help()
    assert all(f"--{name.replace('_', '-')}" in help for name in expected)


def test_flags_are_read_as_what_they_are():
    flags = "--features 4 8 --lr 1e-3 --batchsize 2 --epochs 3 --no-cache --load-model --pretrained"
    assert given(*flags.split()) == {
        "features": (4, 8),
        "learning_rate": 1e-3,
        "batch_size": 2,
        "num_epochs": 3,
        "cache": False,
        "load_model": True,
        "pretrained": train.SHIPPED,
    }
    assert given("--stepsize", 5) == {"step_size": 5, "scheduler": "step"}
    assert given("--output-dir", "runs/a") == {"output_dir": os.path.abspath("runs/a")}


def test_a_constant_that_makes_no_sense_is_refused_as_its_flag_would_be():
    @dataclasses.dataclass(frozen=True)
    class Edited:
        batch_size: int = flag(0, "photos a step")

    with pytest.raises(BadInput, match="argument --batch-size: 0 is no whole number from 1"):
        choose_settings(Edited, get_args_parser(Edited, "train.py"), {}, {}, {}, {})


def test_data_dir_means_four_folders_under_it_and_other_photos_hold_out_their_own(data):
    folders = given("--data-dir", data)
    assert folders["train_img_dir"] == str(data / "train_images") and not folders["val_mask_dir"]
    (data / "val_images").mkdir()
    assert given("--data-dir", data) == {k: str(data / name) for k, name in FOLDERS.items()}
    folders = given("--train-img-dir", "a", "--train-mask-dir", "b")
    assert folders["train_img_dir"] == str(Path("a").absolute()) and folders["val_img_dir"] is None


def test_a_flag_counts_before_the_checkpoint_and_that_before_a_constant(call, finished):
    flags = "--output-dir", finished, "--load-model", "--device", "cpu"
    code, out, err = call(train.main, *flags, "--epochs", 3, "--lr", 0.003, "--optimizer", "muon")
    assert code == 0 and load_checkpoint(finished / CHECKPOINT)["settings"]["batch_size"] == 4, err
    assert "learning_rate: 0.003, as given, instead of the checkpoint's 0.01" in out
    assert "optimizer: muon, as given, instead of the checkpoint's adam" in out
    assert [row["learning_rate"] for row in rows(finished)] == ["0.01", "0.01", "0.003"]


def test_a_recipe_stands_for_its_flags_and_any_of_them_wins_over_it(fit, tmp_path):
    code, out, err = fit("run", "--recipe", "better", "--loss", "bce-dice", "--epochs", 1)
    assert code == 0 and "loss bce-dice, optimizer muon, learning_rate 0.01, " in out
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["settings"]["augment"] == "flip"
    fit("classic", "--epochs", 1)
    code, out, _ = fit("classic", "--load-model", "--recipe", "better", "--epochs", 2)
    assert code == 0 and "optimizer adam, learning_rate 0.01, scheduler none" in out, "its own"


def test_an_edited_constant_counts_as_given_and_what_is_not_offered_any_more_is_left_out(
    call, finished
):
    checkpoint = load_checkpoint(finished / CHECKPOINT)
    checkpoint["constants"]["num_epochs"] = 3  # then; today's constant is another
    checkpoint["settings"] |= {"scheduler": "cosine", "ema": 0.9}
    save_checkpoint(checkpoint, finished / CHECKPOINT)
    code, out, err = call(train.main, "--output-dir", finished, "--load-model", "--device", "cpu")
    assert code == 0 and len(rows(finished)) == train.NUM_EPOCHS, err
    assert f"num_epochs: {train.NUM_EPOCHS}, as given, instead of the checkpoint's 2" in out
    assert "The checkpoint's scheduler is not offered, so none counts" in out
    checkpoint["settings"]["optimizer"] = "sgd"
    save_checkpoint(checkpoint, finished / CHECKPOINT)
    flags = "--output-dir", finished, "--load-model", "--epochs", 6
    assert_refused(call(train.main, *flags), "--pretrained FILE")
    code, out, err = call(train.main, *flags, "--optimizer", "adam")
    assert code == 0 and "so adam counts" in out, err
