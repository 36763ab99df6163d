import argparse
import os
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, assert_same_run, rows, write_pairs
from PIL import Image, ImageDraw

import files
import run as run_module
import test as evaluation
import train
import utils
from checkpoints import SHIPPED, load_checkpoint, save_checkpoint
from data import draw_demo, prepare
from model import UNet
from run import Run

COLUMNS = "epoch train_loss val_loss accuracy dice iou learning_rate seconds photos_per_second"


def test_a_run_learns_and_leaves_all_its_files(fit, tmp_path):
    code, out, err = fit("run", "--epochs", 40)
    assert code == 0, err
    run = tmp_path / "run"
    best = load_checkpoint(run / train.BEST_CHECKPOINT)
    latest = load_checkpoint(run / train.CHECKPOINT)
    assert latest["epoch"] == 40 and best["epoch"] <= 40
    table = rows(run)
    assert list(table[0])[:9] == COLUMNS.split()
    assert [int(row["epoch"]) for row in table] == list(range(1, 41))
    dices = [float(row["dice"]) for row in table]
    assert max(dices) > 0.9 and best["best_dice"] == max(dices)
    pictures = {path.name for path in (run / "saved_images").iterdir()}
    assert {"pred_0.png", "gt_0.png", "training_curves.png"} <= pictures
    assert any(name.startswith("panel_") for name in pictures)
    assert out.count("Dice score: ") == 40 and f"{max(dices):.5f}" in out.splitlines()[-5]
    assert "training_curves.png" in out and "python test.py" in out


def test_a_resumed_run_ends_in_the_same_weights_as_one_never_stopped(fit, tmp_path):
    fit("whole", "--epochs", 4, "--step-size", 3)
    fit("parts", "--epochs", 2, "--step-size", 3)
    code, out, _ = fit("parts", "--epochs", 4, "--step-size", 3, "--load-model")
    assert code == 0
    assert "num_epochs: 4, as given, instead of the checkpoint's 2" in out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert {k: a[k] for k in list(a)[:7]} == {k: b[k] for k in list(b)[:7]}
    rates = [float(row["learning_rate"]) for row in rows(tmp_path / "parts")]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer sgd --scheduler onecycle --ema 0.9 --loss dice --threshold auto",
        "--optimizer adamw --scheduler cosine --ema 0.5 --clip-grad 1 --augment strong",
        "--loss iou --augment flip",
    ],
)
def test_a_run_stopped_and_resumed_is_the_same_with_each_lever(fit, tmp_path, monkeypatch, flags):
    fit("whole", "--epochs", 3, *flags.split())
    one_epoch = train.train_one_epoch

    def stop_in_the_second(run, *args):
        if run.epoch == 1:
            for parameter in run.model.parameters():  # what comes after the checkpoint is lost
                parameter.grad = torch.ones_like(parameter)
            run.step(0.5)
            raise KeyboardInterrupt
        return one_epoch(run, *args)

    monkeypatch.setattr(train, "train_one_epoch", stop_in_the_second)
    assert fit("parts", "--epochs", 3, *flags.split())[0] == 130
    monkeypatch.setattr(train, "train_one_epoch", one_epoch)
    code, _, err = fit("parts", "--load-model")
    assert code == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_another_optimizer_on_resuming_starts_without_the_first_ones_state(fit):
    fit("run", "--epochs", 1)
    code, out, err = fit("run", "--epochs", 2, "--load-model", "--optimizer", "sgd")
    assert code == 0 and "optimizer: sgd, as given, instead of the checkpoint's adam" in out, err


def test_step_size_means_the_step_scheduler_and_belongs_to_no_other(fit):
    code, out, _ = fit("run", "--epochs", 1, "--step-size", 1)
    assert code == 0 and "(step)" in out
    code, _, err = fit("run", "--epochs", 1, "--step-size", 1, "--scheduler", "cosine")
    assert code == 2 and "belongs to --scheduler step" in err


def test_the_average_is_what_is_scored_and_saved(fit, tmp_path, call):
    code, out, _ = fit("run", "--epochs", 3, "--ema", 0.9)
    printed = re.findall(r"Dice score: (.*)", out)
    assert printed[-1] == f"{float(rows(tmp_path / 'run')[-1]['dice']):.5f}"
    checkpoint = load_checkpoint(tmp_path / "run" / train.CHECKPOINT)
    raw = checkpoint["raw_state_dict"]["final_conv.weight"]
    assert not torch.equal(raw, checkpoint["state_dict"]["final_conv.weight"])
    flags = ["--output-dir", tmp_path / "run", "--device", "cpu"]
    code, out, err = call(
        evaluation.main, *flags, "--checkpoint", tmp_path / "run" / train.CHECKPOINT
    )
    assert code == 0 and f"Dice score: {printed[-1]}" in out, err
    # Without --ema the run goes on from the raw weights.
    code, _, err = fit("run", "--load-model", "--epochs", 4, "--ema", 0)
    assert code == 0, err
    assert "raw_state_dict" not in load_checkpoint(tmp_path / "run" / train.CHECKPOINT)


def test_the_best_threshold_is_found_stored_and_used(fit, tmp_path, call):
    code, out, err = fit("run", "--epochs", 2, "--threshold", "auto")
    assert code == 0, err
    latest = tmp_path / "run" / train.CHECKPOINT
    threshold = load_checkpoint(latest)["threshold"]
    table = rows(tmp_path / "run")
    assert threshold == float(table[-1]["threshold"]) and threshold in utils.THRESHOLDS
    flags = ["--output-dir", tmp_path / "run", "--device", "cpu", "--checkpoint", latest]
    _, out, _ = call(evaluation.main, *flags)
    best = float(re.search(r"Dice score: (.*)", out)[1])
    assert best == pytest.approx(float(table[-1]["dice"]), abs=1e-5)
    for other in utils.THRESHOLDS:  # test.py takes it from the checkpoint, and none is better
        save_checkpoint(torch.load(latest, weights_only=True) | {"threshold": other}, latest)
        _, out, _ = call(evaluation.main, *flags)
        assert float(re.search(r"Dice score: (.*)", out)[1]) <= best + 1e-5
    code, _, err = fit("run", "--threshold", "1.5")
    assert code == 2 and "--threshold" in err


# Starting from weights


def write_other_shapes(folder, count):
    """Triangles and bars of any colour on striped grounds: nothing like a car."""
    rng = np.random.default_rng(0)
    images, masks = folder / "train_images", folder / "train_masks"
    images.mkdir(parents=True), masks.mkdir()
    for number in range(count):
        mask = Image.new("L", (192, 128))
        x, y = rng.uniform(50, 140), rng.uniform(40, 90)
        a, b = rng.uniform(20, 40, 2)
        corners = [(x - a, y + b), (x + a, y + b), (x, y - b)]
        if number % 2:
            corners = [(x - a, y - b / 2), (x + a, y - b / 2), (x + a, y + b / 2), (x - a, y + b)]
        ImageDraw.Draw(mask).polygon(corners, 255)
        ground, colour = rng.permutation([rng.integers(30, 100, 3), rng.integers(140, 220, 3)])
        stripes = ground + 25 * (np.arange(192) // 12 % 2)[:, None]
        photo = np.where(np.asarray(mask)[..., None] > 0, colour, stripes)
        photo = photo + rng.integers(-8, 9, photo.shape)
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(images / f"shape{number}.png")
        mask.save(masks / f"shape{number}.png")


def test_fine_tuning_on_other_shapes_beats_starting_from_nothing(call, tmp_path):
    write_other_shapes(tmp_path / "data", 30)

    def dice(folder, *flags):
        own = ["--data-dir", tmp_path / "data", "--output-dir", tmp_path / folder, "--device"]
        own += "cpu --epochs 4 --lr 1e-3 --batch-size 4 --scheduler onecycle".split()
        size = "--image-height 128 --image-width 192".split()
        code, out, err = call(train.main, *own, *size, *flags)
        assert code == 0, err
        return float(rows(tmp_path / folder)[-1]["dice"])

    weights = load_checkpoint(ROOT / SHIPPED)
    scratch = dice("scratch", "--features", *weights["model"]["features"])
    assert dice("tuned", "--pretrained") > scratch + 0.1
    checkpoint = load_checkpoint(tmp_path / "tuned" / train.CHECKPOINT)
    assert checkpoint["model"] == weights["model"] and checkpoint["image_size"] == [128, 192]


def test_weights_that_cannot_be_started_from_are_refused_before_anything_is_written(
    fit, data, call, tmp_path
):
    fit("first", "--epochs", 1)
    weights = tmp_path / "first" / train.BEST_CHECKPOINT
    own = ["--data-dir", data, "--output-dir", tmp_path / "run", "--pretrained"]
    for flags, line in (
        (["--in-channels", "1"], "--in-channels 1: the checkpoint's network has 3"),
        (["--features", "4"], "--features 4: the checkpoint's network has 4 8"),
    ):
        code, _, err = call(train.main, *own, weights, *flags)
        assert code == 2 and line in err and "leave --pretrained out" in err
        assert len(err.strip().splitlines()) == 1
    code, _, err = call(train.main, *own, tmp_path / "nowhere.pth")
    assert code == 2 and "nowhere.pth: no such checkpoint" in err
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_does_not_start_from_its_first_weights_again(fit, call, data, tmp_path):
    fit("first", "--epochs", 1)
    weights = tmp_path / "first" / train.BEST_CHECKPOINT
    own = ["--data-dir", data, "--output-dir", tmp_path / "run", "--batch-size", 4]
    assert call(train.main, *own, "--pretrained", weights, "--epochs", 1)[0] == 0
    weights.unlink()
    code, out, err = call(train.main, *own, "--load-model", "--epochs", 2, "--pretrained", weights)
    assert code == 0 and "Epochs 2 to 2" in out and "--pretrained: not needed" in out, err


def test_a_run_does_not_depend_on_workers_or_cache(fit, tmp_path):
    fit("plain", "--epochs", 2)
    fit("workers", "--epochs", 2, "--num-workers", 2)
    fit("uncached", "--epochs", 2, "--no-cache")
    assert_same_run(tmp_path / "plain", tmp_path / "workers")
    assert_same_run(tmp_path / "plain", tmp_path / "uncached")


def test_gradients_of_two_half_batches_make_the_step_of_a_whole_one(
    fit, tmp_path, monkeypatch, float32
):
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: self)
    init = torch.nn.BatchNorm2d.__init__

    def frozen(self, *args, **kwargs):  # statistics of half a batch are others
        init(self, *args, **kwargs)
        self.training = False

    monkeypatch.setattr(torch.nn.BatchNorm2d, "__init__", frozen)
    fit("whole", "--epochs", 2)
    fit("halves", "--epochs", 2, "--batch-size", 2, "--accumulate", 2)
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "halves"), strict=True):
        for name in ("train_loss", "val_loss"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-5)


def test_checkpointed_activations_and_compile_give_a_like_run(fit, tmp_path, float32):
    fit("plain", "--epochs", 2)
    fit("checkpointed", "--epochs", 2, "--checkpoint-activations")
    code, _, err = fit("compiled", "--epochs", 2, "--compile")
    assert code == 0, err
    for folder, tolerance in (("checkpointed", 0), ("compiled", 1e-3)):
        for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / folder), strict=True):
            assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), abs=tolerance)
    checkpoint = load_checkpoint(tmp_path / "compiled" / train.CHECKPOINT)
    assert set(checkpoint["state_dict"]) == set(UNet(features=(4, 8)).state_dict())


def test_too_little_memory_is_answered_with_the_flags_that_help(fit, monkeypatch):
    def too_much(*args):
        torch.empty(2**60)

    monkeypatch.setattr(train, "train_one_epoch", too_much)
    code, _, err = fit("run")
    assert code == 2 and len(err.strip().splitlines()) == 1
    flags = ("--batch-size", "--checkpoint-activations", "--image-height")
    assert [err.index(flag) for flag in flags] == sorted(err.index(flag) for flag in flags)


def test_seeds_differ(fit, tmp_path):
    fit("a", "--epochs", 1, "--seed", 1)
    fit("b", "--epochs", 1, "--seed", 2)
    assert rows(tmp_path / "a")[0]["val_loss"] != rows(tmp_path / "b")[0]["val_loss"]


def test_resuming_without_a_checkpoint_starts_afresh_and_says_so(fit, tmp_path):
    code, out, _ = fit("run", "--epochs", 1, "--load-model")
    assert code == 0 and "no checkpoint to go on with" in out and len(rows(tmp_path / "run")) == 1


def test_resuming_a_finished_run_says_so(fit, tmp_path):
    fit("run", "--epochs", 1)
    before = (tmp_path / "run" / train.CHECKPOINT).read_bytes()
    code, out, _ = fit("run", "--load-model", "--epochs", 1)
    assert code == 0 and "--load-model --epochs 2 would go on" in out
    assert (tmp_path / "run" / train.CHECKPOINT).read_bytes() == before


def test_a_classic_checkpoint_is_gone_on_with(call, data, tmp_path):
    model = UNet(features=(4, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model(torch.rand(2, 3, 32, 32)).mean().backward()
    optimizer.step()
    state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(state, tmp_path / train.CHECKPOINT)
    flags = ["--data-dir", data, "--output-dir", tmp_path, "--load-model", "--epochs", 1]
    code, out, err = call(train.main, *flags, "--device", "cpu")
    assert code == 0, err
    assert "features 4 8" in out and "160x240" in out


def test_a_classic_checkpoint_without_data_keeps_its_own_network(call, repository, monkeypatch):
    monkeypatch.setattr(draw_demo, "CARS", 2)
    monkeypatch.setattr(draw_demo, "VAL_CARS", 1)
    model = UNet(features=(4, 8))
    optimizer = torch.optim.Adam(model.parameters())
    state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(state, repository / train.CHECKPOINT)
    flags = ["--load-model", "--epochs", 1, "--output-dir", repository]
    code, out, err = call(train.main, *flags, "--device", "cpu")
    assert code == 0 and "Network: features 4 8," in out and "160x240" in out, err


def test_a_run_with_a_loss_scaler_goes_on_from_one_without(fit, tmp_path, monkeypatch):
    fit("run", "--epochs", 1)
    checkpoint = load_checkpoint(tmp_path / "run" / train.CHECKPOINT)
    monkeypatch.setattr(run_module, "amp_dtype", lambda device: torch.float16)
    run = Run(argparse.Namespace(**checkpoint["settings"]), torch.device("cpu"))
    run.restore(checkpoint, "checkpoint")
    assert run.scaler.is_enabled() and run.epoch == 1


def test_on_other_photos_the_best_score_starts_anew(fit, tmp_path):
    fit("run", "--epochs", 25)
    best = (tmp_path / "run" / train.BEST_CHECKPOINT).read_bytes()
    write_pairs(tmp_path / "other", cars=3, seed=5)
    code, out, err = fit(
        "run", "--load-model", "--epochs", 26, "--data-dir", tmp_path / "other", "--lr", "1"
    )
    assert code == 0 and "the best score starts anew" in out, err
    assert "after epoch 26" in out
    assert (tmp_path / "run" / f"{train.BEST_CHECKPOINT}.previous").read_bytes() == best


def test_a_kill_between_checkpoint_and_table_is_mended_on_resuming(fit, tmp_path):
    fit("run", "--epochs", 2)
    table = (tmp_path / "run" / "metrics.csv").read_text()
    (tmp_path / "run" / "metrics.csv").write_text("".join(table.splitlines(True)[:2]))
    code, _, _ = fit("run", "--epochs", 2, "--load-model")
    assert code == 0 and (tmp_path / "run" / "metrics.csv").read_text() == table


@pytest.mark.parametrize(
    "damage",
    [{"optimizer": [1]}, {"optimizer": None}, {"history": 3}, {"rng": 0}, {"history": [{}]}],
)
def test_a_checkpoint_that_cannot_be_gone_on_with_is_refused_in_one_line(fit, tmp_path, damage):
    fit("run", "--epochs", 1)
    path = tmp_path / "run" / train.CHECKPOINT
    torch.save(torch.load(path, weights_only=True) | damage, path)
    code, _, err = fit("run", "--epochs", 2, "--load-model")
    assert code == 2 and "start afresh" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_during_training_is_named_in_one_line(fit, data, monkeypatch, workers):
    photo = sorted((data / "train_images").iterdir())[0]
    load_data = train.load_data

    def load_then_break(*args):
        loaders = load_data(*args)
        photo.write_bytes(photo.read_bytes()[:-300])
        return loaders

    monkeypatch.setattr(train, "load_data", load_then_break)
    code, _, err = fit("run", "--no-cache", "--num-workers", workers)
    assert code == 2 and err.startswith("error: ") and photo.name in err
    assert len(err.strip().splitlines()) == 1


def test_an_earlier_run_is_moved_aside_never_overwritten(fit, tmp_path):
    run = tmp_path / "run"
    contents = []
    for _ in range(3):
        code, out, _ = fit("run", "--epochs", 1, "--seed", len(contents))
        contents.append((run / train.CHECKPOINT).read_bytes())
        assert ("add --load-model" in out) == (len(contents) > 1)
    assert (run / f"{train.CHECKPOINT}.previous").read_bytes() == contents[0]
    assert (run / f"{train.CHECKPOINT}.2.previous").read_bytes() == contents[1]
    assert (run / "metrics.csv.2.previous").exists()
    assert (run / "saved_images.2.previous" / "training_curves.png").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(fit, tmp_path):
    fit("run", "--epochs", 1)
    before = (tmp_path / "run" / train.CHECKPOINT).read_bytes()
    code, _, err = fit("run", "--epochs", 3, "--load-model", "--lr", "1e30")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert (
        re.search(r"epoch 2: the loss is .* since step \d+", err) and "holds the run up to" in err
    )
    assert (tmp_path / "run" / train.CHECKPOINT).read_bytes() == before
    assert torch.load(tmp_path / "run" / train.CHECKPOINT, weights_only=True)["epoch"] == 1


def test_a_grey_network_is_trained_and_evaluated(call, data, tmp_path):
    flags = "--in-channels 1 --image-height 128 --image-width 128 --features 64 128".split()
    run = ["--output-dir", tmp_path / "run", "--device", "cpu"]
    code, out, err = call(train.main, "--data-dir", data, *run, *flags, "--epochs", 1)
    assert code == 0 and "1,862," in out, err
    code, out, err = call(evaluation.main, *run)
    assert code == 0 and "128x128" in out and "Dice score" in out, err


# Bad input: exit code 2, one line, and nothing of the run on disk


def test_bad_photos_leave_an_earlier_run_alone(fit, data, tmp_path):
    fit("run", "--epochs", 1)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    photo = next((data / "train_images").iterdir())
    photo.write_bytes(photo.read_bytes()[:-300])
    code, _, err = fit("run", "--epochs", 1)
    assert code == 2 and photo.name in err and "truncated" in err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_broken_checkpoint_is_refused_and_stays(fit, tmp_path):
    fit("run", "--epochs", 1)
    path = tmp_path / "run" / train.CHECKPOINT
    path.write_bytes(path.read_bytes()[:-1000])
    before = path.read_bytes()
    code, _, err = fit("run", "--load-model")
    assert code == 2 and "cut off" in err and path.read_bytes() == before


# Where the photos come from


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty repository, as train.py and test.py see it."""
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(evaluation, "ROOT", tmp_path)
    return tmp_path


def test_without_data_a_demo_is_drawn_trained_and_evaluated(call, repository, monkeypatch):
    monkeypatch.setattr(draw_demo, "CARS", 3)
    monkeypatch.setattr(draw_demo, "VAL_CARS", 1)
    code, out, err = call(train.main, "--epochs", 1, "--image-width", 96, "--device", "cpu")
    assert code == 0, err
    assert "drawing a demo set into" in out and "128x96" in out and "features 8 16 32 64" in out
    assert len(os.listdir(repository / "data/demo/train_images")) == 32
    run = ["--output-dir", repository]
    code, out, err = call(evaluation.main, *run, "--device", "cpu")
    assert code == 0 and "16 photos at 128x96" in out, err
    code, out, err = call(train.main, "--load-model", "--epochs", 2)
    assert code == 0 and "drawing" not in out and "Epochs 2 to 2" in out, err


def test_an_edited_folder_that_is_missing_is_named_and_no_demo_drawn(call, repository, monkeypatch):
    monkeypatch.setattr(train, "TRAIN_IMG_DIR", "data/fotos")
    code, out, err = call(train.main, *SMALL)
    assert code == 2 and "data/fotos: no such folder" in err and "demo" not in out


def test_photos_of_the_users_are_never_mixed_with_the_demo(call, repository):
    write_pairs(repository / "data")
    code, out, err = call(train.main, *SMALL, "--epochs", 1)
    assert code == 0 and "demo" not in out and not (repository / "data/demo").exists(), err
    shutil.rmtree(repository / "data" / "train_masks")
    code, _, err = call(train.main, *SMALL, "--epochs", 1)
    assert code == 2 and "train_masks: no such folder" in err
    assert not (repository / "data/demo").exists()


def test_test_py_scores_the_cars_that_training_held_out(call, repository, tmp_path):
    write_pairs(repository / "data", cars=30)
    code, out, err = call(train.main, *SMALL, "--epochs", 1)
    held_out = int(re.search(r"(\d+) for validation", out)[1])
    printed = re.search(r"Got .*\nDice score.*", out)[0]
    code, out, err = call(evaluation.main, "--output-dir", repository, "--device", "cpu")
    assert f"{held_out} photos" in out and printed in out, err


def test_real_photos_go_through_prepare_train_and_test(call, carvana, tmp_path, capsys):
    for name in ("train", "train_masks"):  # two of the cars
        with zipfile.ZipFile(carvana / "kaggle" / f"{name}.zip") as archive:
            members = [m for m in archive.namelist() if not m.endswith("/")]
            cars = sorted({os.path.basename(m).split("_")[0] for m in members})[:2]
            kept = [m for m in members if os.path.basename(m).split("_")[0] in cars]
            with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as smaller:
                for member in kept:
                    smaller.writestr(member, archive.read(member))
    prepare.prepare_carvana(tmp_path, tmp_path / "data")
    run = ["--output-dir", tmp_path / "run", "--device", "cpu"]
    flags = "--features 4 8 --image-height 80 --image-width 120 --batch-size 4 --lr 1e-2 --epochs 3"
    code, out, err = call(train.main, "--data-dir", tmp_path / "data", *run, *flags.split())
    assert code == 0 and "16 for training, 16 for validation" in out, err
    code, out, err = call(evaluation.main, *run, "--full-size")
    assert code == 0 and f"/{16 * 1918 * 1280} with acc" in out, err
    with Image.open(tmp_path / "run/saved_images/test_worst.png") as panel:
        assert panel.width == 4 * 120
    photo = files.read_photo(next((tmp_path / "data/train_images").iterdir()))
    assert photo.shape == (1280, 1918, 3)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_resident_memory_is_flat_over_epochs(fit, monkeypatch):
    resident = []

    def train_one_epoch(*args, **kwargs):
        result = one_epoch(*args, **kwargs)
        with open("/proc/self/statm") as statm:
            resident.append(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 10)
        return result

    one_epoch = train.train_one_epoch
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    assert fit("run", "--epochs", 20)[0] == 0
    assert resident[-1] < 1.05 * resident[1], f"kB after each epoch: {resident}"
