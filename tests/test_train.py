"""train.py, from its flags to a run's files. (Resuming is in test_resume.py.)"""

import os
import re
import shutil
import zipfile
from itertools import count

import pytest
import torch
from conftest import SMALL, assert_refused, assert_same_run, rows, write_pairs
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, StepLR

import test as evaluation
import train
import utils
from data import draw_demo, prepare
from dataset import get_loaders
from model import UNet
from support.muon import Muon
from support.run import SaveThrottle
from train import Settings, learning_rate
from utils import BEST_CHECKPOINT, CHECKPOINT, SHIPPED, load_checkpoint, save_checkpoint

COLUMNS = "epoch train_loss val_loss accuracy dice iou learning_rate seconds photos_per_second"

# What a run does and leaves -----------------------------------------------------------------------


def test_a_run_learns_and_leaves_all_its_files(fit, tmp_path):
    flags = "--epochs 12 --lr 3e-2 --batch-size 2 --loss bce-dice --augment flip".split()
    code, out, err = fit("run", *flags)
    run, table = tmp_path / "run", rows(tmp_path / "run")
    assert code == 0 and list(table[0]) == COLUMNS.split(), err
    assert [int(row["epoch"]) for row in table] == list(range(1, 13))
    dices = [float(row["dice"]) for row in table]
    best, latest = (load_checkpoint(run / name) for name in (BEST_CHECKPOINT, CHECKPOINT))
    assert max(dices) > 0.9 and best["best_dice"] == latest["best_dice"] == max(dices)
    assert latest["epoch"] == 12 and best["epoch"] == dices.index(max(dices)) + 1
    pictures = {path.name for path in (run / "saved_images").iterdir()}
    assert {"pred_0.png", "gt_0.png", "training_curves.png"} <= pictures
    assert sum(name.startswith("panel_") for name in pictures) == 2, "of both photos held out"
    assert out.count("Dice score: ") == 12 and f"best Dice {max(dices):.5f} after epoch" in out
    assert not list(run.rglob(".*")), "nothing half-written is left"


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_a_run_depends_on_its_seed_but_not_on_workers_or_cache(fit, tmp_path):
    for folder, *flags in (
        ["plain"],
        ["workers", "--num-workers", 4],
        ["uncached", "--no-cache"],
        ["seeded", "--seed", 1],
    ):
        assert fit(folder, "--epochs", 2, "--augment", "strong", *flags)[0] == 0
    assert_same_run(tmp_path / "plain", tmp_path / "workers")
    assert_same_run(tmp_path / "plain", tmp_path / "uncached")
    assert rows(tmp_path / "plain")[0]["val_loss"] != rows(tmp_path / "seeded")[0]["val_loss"]


def test_gradients_of_two_half_batches_make_the_step_of_a_whole_one(fit, tmp_path, data, frozen):
    for path in data.glob("*/*_02*"):
        path.unlink()
    write_pairs(data, cars=7, views=1)  # the last step has three photos, its last batch one
    write_pairs(data, cars=2, views=1, side="val", seed=7)
    assert fit("whole", "--epochs", 2, "--batch-size", 4)[0] == 0
    assert fit("halves", "--epochs", 2, "--batch-size", 2, "--accumulate", 2)[0] == 0
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "halves"), strict=True):
        for name in ("train_loss", "val_loss"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-6)
    a, b = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "halves"))
    for name, weight in a["state_dict"].items():
        assert torch.allclose(weight, b["state_dict"][name], rtol=0, atol=1e-6), name


def test_checkpointed_activations_give_a_like_run(fit, tmp_path, float32):
    assert fit("plain", "--epochs", 2)[0] == 0
    assert fit("run", "--epochs", 2, "--checkpoint-activations")[0] == 0
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "run"), strict=True):
        assert float(a["train_loss"]) == float(b["train_loss"])
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), abs=1e-6)


def test_an_earlier_run_is_moved_aside_never_overwritten(fit, data, tmp_path):
    run, contents = tmp_path / "run", []
    for seed in range(3):
        code, out, _ = fit("run", "--epochs", 1, "--seed", seed)
        assert code == 0 and ("to resume that run instead" in out) == (seed > 0)
        contents.append((run / CHECKPOINT).read_bytes())
    assert (run / f"{CHECKPOINT}.previous").read_bytes() == contents[0]
    assert (run / f"{CHECKPOINT}.2.previous").read_bytes() == contents[1]
    for name in (f"{BEST_CHECKPOINT}.2.previous", "metrics.csv.2.previous"):
        assert (run / name).exists()
    assert (run / "saved_images.2.previous" / "training_curves.png").exists()
    photo = next((data / "train_images").iterdir())
    photo.write_bytes(photo.read_bytes()[:-300])
    code, _, err = fit("run", "--epochs", 1)
    assert code == 2 and photo.name in err and (run / CHECKPOINT).read_bytes() == contents[2]


def test_work_tells_now_and_then_how_far_it_is_where_there_is_no_terminal(fit, monkeypatch):
    monkeypatch.setattr("support.progress.SECONDS", 0)
    code, out, err = fit("run", "--epochs", 1)
    assert code == 0 and err == ""
    assert re.search(r"^decoding each photo once: 100%.* 10/10 .*photos", out, re.M)
    assert re.search(r"^epoch 1/1: +50%.* 1/2 .*loss \d\.\d{4}, \d+\.\d photos/s", out, re.M)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_resident_memory_is_flat_over_epochs(fit, monkeypatch):
    one_epoch, resident = train.train_one_epoch, []

    def train_one_epoch(*args):
        result = one_epoch(*args)
        with open("/proc/self/statm") as statm:
            resident.append(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 10)
        return result

    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    assert fit("run", "--epochs", 20)[0] == 0
    assert resident[-1] < 1.05 * resident[1], f"kB after each epoch: {resident}"


def test_of_epochs_with_equal_dice_the_one_with_the_lowest_loss_is_the_best():
    run = train.make_run(Settings(features=(4,)), torch.device("cpu"))
    for epoch, (dice, loss) in enumerate([(0.5, 0.3), (0.5, 0.2), (0.4, 0.1), (0.5, 0.2)], start=1):
        run.history.append({"epoch": epoch, "dice": dice, "val_loss": loss})
    assert run.best["epoch"] == 2


def test_saving_within_an_epoch_does_not_count_as_time_of_training(fit, tmp_path, monkeypatch):
    clock = count()
    save_checkpoint = utils.save_checkpoint

    def slow_save(*args):
        for _ in range(10**4):
            next(clock)
        save_checkpoint(*args)

    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(utils, "save_checkpoint", slow_save)
    monkeypatch.setattr(SaveThrottle, "is_due", lambda *_: True)
    assert fit("run", "--epochs", 1, "--batch-size", 1)[0] == 0
    assert 8 / float(rows(tmp_path / "run")[0]["photos_per_second"]) < 10**3


# The optimizer and its learning rate --------------------------------------------------------------


def test_muons_steps_are_those_of_pytorchs_own_and_of_adam():
    for out, given in ((8, 4), (40, 4)):  # wide and tall
        kernel, bias = torch.randn(out, given, 3, 3), torch.randn(out)
        own = [kernel.clone().requires_grad_(), bias.clone().requires_grad_()]
        theirs = [kernel.flatten(1).requires_grad_(), bias.requires_grad_()]
        muon = torch.optim.Muon(theirs[:1], 0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        optimizers = Muon(own, 0.1), muon, torch.optim.Adam(theirs[1:], 0.1)
        for _ in range(3):
            for a, b in zip(own, theirs, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.reshape(b.shape)
            for optimizer in optimizers:
                optimizer.step()
        for a, b in zip(own, theirs, strict=True):
            assert torch.allclose(a.reshape(b.shape), b, rtol=0, atol=5e-3), "theirs is in bfloat16"


@pytest.mark.parametrize(
    "name, kind, options, tolerance",
    [
        # PyTorch's ends a step earlier, which matters less the more steps there are.
        ("onecycle", OneCycleLR, {"max_lr": 0.1, "total_steps": 1200}, 3e-4),
        ("step", StepLR, {"step_size": 400, "gamma": 0.5}, 1e-9),
        ("none", ConstantLR, {"factor": 1}, 0),
    ],
)
def test_learning_rates_are_those_of_pytorchs_schedulers(name, kind, options, tolerance):
    optimizer = SGD([torch.zeros(1, requires_grad=True)], 0.1, momentum=0.9)
    scheduler = kind(optimizer, **options)
    told = Settings(num_epochs=6, learning_rate=0.1, scheduler=name, step_size=2, gamma=0.5)
    for step in range(1200 - 1):
        rate = optimizer.param_groups[0]["lr"]
        assert learning_rate(told, step / 200) == pytest.approx(rate, abs=tolerance), step
        optimizer.step()
        scheduler.step()


# What stops a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, what, remedy",
    [("--lr 1e30", "loss", "1e+29"), ("--lr 1e38 --save-every 1", "sum of the weights", "1e+37")],
)
def test_training_that_comes_to_no_numbers_stops_and_the_last_good_checkpoint_stays(
    fit, finished, flags, what, remedy
):
    before = (finished / CHECKPOINT).read_bytes()
    result = fit("run", "--epochs", 4, "--load-model", *flags.split())
    assert_refused(result, f"of epoch 3 the {what} is ", f"try --lr {remedy}", "to resume: python")
    assert (finished / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("workers, left", [(0, -300), (1, -300), (0, None)])
def test_a_photo_that_breaks_or_vanishes_in_training_is_named_and_once_mended_the_run_goes_on(
    fit, tmp_path, data, finished, monkeypatch, workers, left
):
    assert fit("whole", "--epochs", 3)[0] == 0
    photo = sorted((data / "train_images").iterdir())[0]
    content = photo.read_bytes()

    def load_then_break(*args, **options):
        loaders = get_loaders(*args, **options)
        photo.write_bytes(content[:left]) if left else photo.unlink()
        return loaders

    flags = "--epochs", 3, "--load-model", "--no-cache", "--num-workers", workers
    with monkeypatch.context() as patch:
        patch.setattr(train, "get_loaders", load_then_break)
        assert_refused(fit("run", *flags), f"{photo.name}: ", "to resume: python")
    photo.write_bytes(content)
    assert fit("run", *flags)[0] == 0
    assert_same_run(tmp_path / "whole", finished)


def test_too_little_memory_is_answered_with_the_flags_that_help(fit, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda *_: torch.empty(2**60))
    result = fit("run")
    assert_refused(result, "out of memory", "to resume: python")
    flags = ("--batch-size", "--checkpoint-activations", "--image-height")
    places = [result[2].index(flag) for flag in flags]
    assert places == sorted(places)


# Networks and weights to start from ---------------------------------------------------------------


def test_a_grey_network_is_trained_and_evaluated(fit, call, tmp_path):
    code, out, err = fit("run", "--in-channels", 1, "--features", 64, 128, "--epochs", 1)
    assert code == 0 and "1,862,977 parameters" in out, err
    code, out, err = call(evaluation.main, "--output-dir", tmp_path / "run", "--device", "cpu")
    assert code == 0 and "2 photos at 32x48" in out and "Dice score: " in out, err


def test_weights_are_started_from_and_need_not_be_there_on_resuming(call, data, tmp_path, trained):
    weights = shutil.copy(trained / BEST_CHECKPOINT, tmp_path / "weights.pth")
    own = ["--data-dir", data, "--output-dir", tmp_path / "run", "--pretrained", weights]
    own += ["--device", "cpu", "--batch-size", 4]
    assert_refused(call(train.main, *own, "--features", 4), "--features: the checkpoint's network")
    assert not (tmp_path / "run").exists()
    assert call(train.main, *own, "--epochs", 1, "--lr", 1e-30)[0] == 0
    started = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert started["model"]["features"] == [4, 8] and started["image_size"] == [32, 48]
    kept, name = load_checkpoint(weights)["state_dict"], "final_conv.weight"
    assert torch.equal(started["state_dict"][name], kept[name])
    os.remove(weights)
    code, out, err = call(train.main, *own, "--load-model", "--epochs", 2)
    assert code == 0 and "Epochs 2 to 2" in out, err


@pytest.mark.slow
def test_fine_tuning_beats_starting_from_nothing(fit, data, tmp_path):
    shutil.rmtree(data)
    write_pairs(data, cars=15, size=(192, 128))
    flags = "--epochs 3 --lr 3e-4 --scheduler onecycle --image-height 128 --image-width 192".split()
    features = list(load_checkpoint(SHIPPED)["model"]["features"])
    for folder, *start in (["tuned", "--pretrained"], ["scratch"]):
        code, _, err = fit(folder, *flags, "--features", *features, *start)
        assert code == 0, err
    tuned, scratch = (float(rows(tmp_path / name)[-1]["dice"]) for name in ("tuned", "scratch"))
    assert tuned > scratch + 0.1


# Where the photos come from -----------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty repository, as train.py and test.py see it."""
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(evaluation, "ROOT", tmp_path)
    return tmp_path


def test_without_data_a_demo_is_drawn_trained_and_evaluated(call, repository, monkeypatch):
    monkeypatch.setattr(draw_demo, "CARS", 2)
    monkeypatch.setattr(draw_demo, "VAL_CARS", 1)
    monkeypatch.setattr(draw_demo, "VIEWS", 4)
    code, out, err = call(train.main, "--epochs", 1, "--image-width", 96, "--device", "cpu")
    assert code == 0 and out.count("drawing a demo set into") == 1, err
    announced = re.search(r"^Training on the demo set .* own settings: (.*)", out, re.M)[1]
    height = draw_demo.SETTINGS["image_height"]
    assert f"image_height {height}, " in announced and "optimizer muon" in announced
    assert "image_width" not in announced and "num_epochs" not in announced, "flags win"
    run = "--output-dir", repository, "--device", "cpu"
    code, out, err = call(evaluation.main, *run)
    assert code == 0 and f"4 photos at {height}x96" in out, err
    code, out, err = call(train.main, *run, "--load-model", "--epochs", 2)
    assert code == 0 and "drawing" not in out and "Epochs 2 to 2" in out, err


@pytest.mark.parametrize("flag", ["--pretrained", "--load-model"])
def test_of_the_demos_settings_a_classic_checkpoints_own_take_the_place(call, repository, flag):
    write_pairs(repository / "data/demo")
    write_pairs(repository / "data/demo", cars=1, side="val", seed=7)
    model = UNet(features=(4, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model(torch.rand(2, 3, 32, 32)).mean().backward()
    optimizer.step()
    classic = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(classic, repository / CHECKPOINT)
    weights = shutil.copy(repository / CHECKPOINT, repository / "classic.pth.tar")
    flags = [flag, weights] if flag == "--pretrained" else [flag]
    flags += ["--epochs", 1, "--device", "cpu", "--lr", 1e-30, "--optimizer", "adam"]
    code, out, err = call(train.main, *flags)
    announced = re.search(r"^Training on the demo set .* own settings: (.*)", out, re.M)[1]
    assert code == 0 and "scheduler onecycle" in announced, err
    assert not re.search("image_|features|num_epochs|learning_rate", announced), "others won"
    checkpoint, name = load_checkpoint(repository / CHECKPOINT), "final_conv.weight"
    assert checkpoint["image_size"] == [160, 240]
    assert torch.equal(checkpoint["state_dict"][name], classic["state_dict"][name])
    steps = 3 + (flag == "--load-model")  # then the optimizer's state is the classic one's too
    assert checkpoint["optimizer"]["state"][0]["step"] == steps


def test_photos_of_the_users_are_never_mixed_with_the_demo(call, repository):
    write_pairs(repository / "data")
    code, out, err = call(train.main, *SMALL, "--epochs", 1)
    assert code == 0 and "demo" not in out, err
    shutil.rmtree(repository / "data" / "train_masks")
    assert_refused(call(train.main, *SMALL, "--epochs", 1), "train_masks: no such folder")
    assert not (repository / "data/demo").exists()


@pytest.mark.slow
def test_real_photos_go_through_prepare_train_and_test(call, carvana, tmp_path):
    for name in ("train", "train_masks"):
        with zipfile.ZipFile(carvana / "kaggle" / f"{name}.zip") as archive:
            members = sorted(name for name in archive.namelist() if name[-4:] in (".jpg", ".gif"))
            with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as smaller:
                for member in members[:32]:  # two of the cars
                    smaller.writestr(member, archive.read(member))
    prepare.prepare_carvana(tmp_path, tmp_path / "data")
    run = "--output-dir", tmp_path / "run", "--device", "cpu"
    flags = "--features 4 8 --image-height 80 --image-width 120 --batch-size 4 --lr 1e-2 --epochs 3"
    code, out, err = call(train.main, "--data-dir", tmp_path / "data", *run, *flags.split())
    assert code == 0 and "16 for training, 16 for validation" in out, err
    code, out, err = call(evaluation.main, *run, "--full-size")
    assert code == 0 and f"/{16 * 1918 * 1280} with acc" in out, err
