from pathlib import Path

import pytest
from conftest import rows

import train
from checkpoints import load_checkpoint
from settings import get_args_parser, read_flags


def test_resuming_takes_settings_from_the_checkpoint(call, fit, tmp_path):
    fit("run", "--epochs", 1)
    flags = ["--output-dir", tmp_path / "run", "--load-model", "--epochs", 2, "--lr", "0.003"]
    code, out, err = call(train.main, *flags)
    assert code == 0, err
    assert "learning_rate: 0.003, as given, instead of the checkpoint's 0.01" in out
    assert [row["learning_rate"] for row in rows(tmp_path / "run")] == ["0.01", "0.003"]


def test_a_constant_edited_between_two_runs_counts_as_given(fit, tmp_path, monkeypatch, call):
    fit("run")
    monkeypatch.setattr(train, "NUM_EPOCHS", 11)
    monkeypatch.setattr(train, "LOAD_MODEL", True)
    code, out, _ = call(train.main, "--output-dir", tmp_path / "run")
    assert code == 0 and "num_epochs: 11, as given, instead of the checkpoint's 10" in out
    assert len(rows(tmp_path / "run")) == 11


def test_other_features_than_the_checkpoints_are_refused(fit):
    fit("run", "--epochs", 1)
    code, _, err = fit("run", "--load-model", "--features", 4, 8, 16)
    assert code == 2 and "--features 4 8 16: the checkpoint's network has 4 8:" in err


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--features 0", "no whole number"),
        ("--features", "expected at least one argument"),
        ("--features a", "no whole number"),
        ("--image-height 0", "no whole number from 1"),
        ("--image-width 1.5", "no whole number"),
        ("--image-height 7", "must be at least 8"),
        ("--in-channels 2", "invalid choice"),
        ("--batch-size 0", "no whole number"),
        ("--lr 0", "no number above 0"),
        ("--lr nan", "no number above 0"),
        ("--epochs -1", "no whole number"),
        ("--device nonsense", "--device nonsense: cannot be used here"),
        ("--train-img-dir nowhere --train-mask-dir nowhere", "nowhere: no such folder"),
        ("--val-img-dir nowhere --val-mask-dir nowhere", "nowhere: no such folder"),
        ("--nonsense", "unrecognized arguments"),
        ("--device meta", "none of cuda, mps and cpu"),
        ("--val-img-dir nowhere", "belong together"),
        ("--output-dir /dev/null/x", "cannot be written"),
    ],
)
def test_flags_that_make_no_sense_are_refused(fit, tmp_path, flags, line):
    code, out, err = fit("run", *flags.split())
    assert code == 2 and line in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, value, line",
    [
        ("BATCH_SIZE", 0, "no whole number"),
        ("NUM_EPOCHS", 2.5, "no whole number"),
        ("FEATURES", 64, "is no tuple"),
        ("FEATURES", (64, "a"), "no whole number"),
        ("IN_CHANNELS", 4, "is not among"),
        ("LEARNING_RATE", -1, "no number above 0"),
        ("BATCH_SIZE", None, "needs a value"),
        ("DEVICE", None, "needs a value"),
        ("OUTPUT_DIR", None, "needs a value"),
        ("FEATURES", (), "needs a value"),
        ("CACHE", "False", "neither True nor False"),
    ],
)
def test_constants_that_make_no_sense_are_refused(fit, monkeypatch, name, value, line):
    monkeypatch.setattr(train, name, value)
    code, _, err = fit("run")
    assert code == 2 and f"{name} = {value!r}" in err and line in err
    assert len(err.strip().splitlines()) == 1


def test_constants_may_be_paths_or_none(call, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TRAIN_IMG_DIR", data / "train_images")
    monkeypatch.setattr(train, "TRAIN_MASK_DIR", Path(data / "train_masks"))
    monkeypatch.setattr(train, "VAL_IMG_DIR", None)
    monkeypatch.setattr(train, "OUTPUT_DIR", str(tmp_path / "run"))
    flags = "--features 4 8 --image-height 32 --image-width 48 --device cpu --epochs 1".split()
    code, out, err = call(train.main, *flags)
    assert code == 0 and f"python test.py --output-dir {tmp_path / 'run'}" in out.replace(
        "../", ""
    ), err
    assert load_checkpoint(tmp_path / "run" / train.CHECKPOINT)["epoch"] == 1


def given(*argv):
    return read_flags(vars(train), argv)[1]


def test_data_dir_means_four_folders_under_it(data):
    folders = given("--data-dir", str(data))
    assert folders["train_img_dir"] == str(data / "train_images")
    assert folders["val_img_dir"] is None and folders["val_mask_dir"] is None
    (data / "val_images").mkdir()
    assert given("--data-dir", str(data))["val_mask_dir"] == str(data / "val_masks")


def test_photos_of_the_users_own_are_not_validated_on_those_in_data():
    folders = given("--train-img-dir", "a", "--train-mask-dir", "b")
    assert folders["train_img_dir"] == str(Path("a").resolve())
    assert folders["val_img_dir"] is None


def test_every_constant_is_a_flag():
    flags = get_args_parser(vars(train)).format_help()
    settings = {name for name in vars(train) if name.isupper()} - {
        "ROOT", "DEMO", "FOLDERS", "NOT_SAVED", "PICTURES", "CLASSIC", "VAL_FRACTION",
        "CHECKPOINT", "BEST_CHECKPOINT", "LOSSES", "MAX_AREA",
    }  # fmt: skip
    for name in settings:
        assert "--" + name.lower().replace("_", "-") in flags, name
