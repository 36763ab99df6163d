"""A run's settings: constants, flags, what a checkpoint says, and which of them counts."""

import dataclasses
import importlib.util
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, assert_refused, rows

import train
from support.errors import BadInput, short_path
from support.flags import check, get_args_parser
from support.settings import FOLDERS, read_flags
from train import Settings
from utils import CHECKPOINT, load_checkpoint, save_checkpoint


def given(*argv):
    return read_flags(Settings, argv)


def test_every_constant_is_the_default_of_a_setting_and_every_setting_is_a_flag():
    top = (ROOT / "train.py").read_text().split("OPTIMIZERS = ")[0]
    constants = set(re.findall("^([A-Z_]+) = ", top, re.M)) - {"ROOT"}
    defaults = dataclasses.asdict(Settings())
    for name in constants:
        assert defaults[name.lower()] == getattr(train, name)
    help = get_args_parser(Settings, "train.py").format_help()
    assert all(f"--{name.replace('_', '-')}" in help for name in defaults)
    assert len(constants) == 14 and len(defaults) > 30


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


def edited(tmp_path, *lines):
    """train.py's Settings after lines of its constants were edited."""
    text = (ROOT / "train.py").read_text()
    for line in lines:
        name = line.partition(" = ")[0]
        text, count = re.subn(f"^{name} = .*$", line, text, flags=re.M)
        assert count == 1
    (tmp_path / "edited.py").write_text(text)
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Settings


def test_an_edited_constant_is_checked_and_converted_as_its_flag_is(tmp_path):
    with pytest.raises(BadInput, match="--batch-size 0: should be greater than 0"):
        check(edited(tmp_path, "BATCH_SIZE = 0"), {})
    lines = "PIN_MEMORY = 1", 'LOAD_MODEL = "False"', 'TRAIN_IMG_DIR = "~/photos"'
    settings = check(edited(tmp_path, *lines), {})
    assert settings.pin_memory is True and settings.load_model is False
    assert settings.train_img_dir == os.path.expanduser("~/photos")


def test_a_value_that_begins_with_a_dash_is_resumed(fit, data, tmp_path):
    for path in (data / "train_masks").iterdir():
        path.rename(path.with_name(path.name.replace("_mask", "-seg")))
    assert fit("run", "--mask-suffix=-seg", "--epochs", 1)[0] == 0
    code, _, err = fit("run", "--load-model", "--epochs", 2)
    assert code == 0 and len(rows(tmp_path / "run")) == 2, err


@pytest.mark.parametrize("flag", ["--val-img-dir", "--val-mask-dir"])
def test_validation_photos_and_their_masks_are_named_together(call, data, flag):
    refused = call(train.main, "--data-dir", data, flag, data / "train_images")
    assert_refused(refused, "--val-img-dir and --val-mask-dir: belong together: name both")


def test_photos_are_either_scaled_or_cropped(fit, call, data, tmp_path):
    assert_refused(fit("run", "--crop", 32), "--image-height and --image-width", "or --crop 0")
    own = ["--data-dir", data, "--output-dir", tmp_path / "run", "--features", 4, "--epochs"]
    code, out, err = call(train.main, *own, 1, "--crop", 32)
    assert code == 0 and "size (32, 32)" in out, err
    code, out, err = call(train.main, *own, 2, "--load-model", "--crop", 0)
    assert code == 0 and "size (160, 240)" in out and "crop: 0, instead of" in out, err


def test_paths_are_flags_too(call, data, tmp_path):
    run = tmp_path / "Größe & Übung"
    flags = [Path("--output-dir"), run, *SMALL, "--data-dir", data, "--epochs", "1"]
    code, out, err = call(lambda _: train.main(flags))
    assert code == 0 and f"--output-dir '{short_path(run)}'" in out, err


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
    assert "learning_rate: 0.003, instead of the checkpoint's 0.01" in out
    assert "optimizer: muon, instead of the checkpoint's adam" in out
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
    assert f"num_epochs: {train.NUM_EPOCHS}, instead of the checkpoint's 2" in out
    assert "The checkpoint's scheduler does not count: it should be 'none', 'step'" in out
    checkpoint["settings"]["optimizer"] = "sgd"
    save_checkpoint(checkpoint, finished / CHECKPOINT)
    flags = "--output-dir", finished, "--load-model", "--epochs", 6
    assert_refused(call(train.main, *flags), "--pretrained FILE")
    code, out, err = call(train.main, *flags, "--optimizer", "adam")
    assert code == 0 and "The checkpoint's optimizer does not count" in out, err
