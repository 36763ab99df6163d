"""A run that is stopped, killed or broken off goes on as if that had never happened."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    assert_refused,
    assert_same_run,
    rows,
    start,
    wait_for_epoch,
    write_pairs,
)

import train
import utils
from support.checkpoints import unpack
from support.errors import display_path
from support.signals import StopRequest, handling
from tools import recipe
from train import Settings
from utils import BEST_CHECKPOINT, CHECKPOINT, load_checkpoint

OLDER = ("60dd799", "398d319")  # versions that stopped at step 2 of 4 of epoch 2 of 3


@contextlib.contextmanager
def steps(last=0, then=lambda: signal.raise_signal(signal.SIGTERM)):
    """In the block, a list of the steps taken, each by its epoch; after `last`, if any, a signal
    comes, or what `then` does."""
    learning_rate, taken = train.learning_rate, []

    def counted(settings, epochs):  # called at the beginning of each step
        taken.append(int(epochs) + 1)
        if len(taken) == last:
            then()
        return learning_rate(settings, epochs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", counted)
        yield taken


# Stopped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--no-cache --optimizer muon --scheduler onecycle",
        "--num-workers 2 --save-every 0 --loss bce-dice --augment strong",
        "--batch-size 1 --accumulate 2 --scheduler onecycle",
        "--scheduler step --step-size 1 --checkpoint-activations",
    ],
)
def test_a_run_stopped_inside_an_epoch_ends_as_one_never_stopped(fit, tmp_path, flags):
    flags = ["--epochs", 3, "--batch-size", 2, *flags.split()]  # four steps an epoch
    assert fit("whole", *flags)[0] == 0
    for last, step, epoch in ((3, 3, 1), (1, 4, 1), (2, 2, 2)):
        with steps(last):
            code, _, err = fit("parts", *flags, "--load-model")
        batches = step * (2 if "--accumulate" in flags else 1)
        assert code == 143 and f"holds the run up to batch {batches} of epoch {epoch}" in err, err
        assert "to resume: python " in err and "--load-model" in err
    assert fit("parts", *flags, "--load-model")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [row["epoch"] for row in rows(tmp_path / "parts")] == ["1", "2", "3"]


def test_stages_of_the_recipe_follow_each_other_and_go_on_where_they_stopped(call, data, tmp_path):
    flags = "--data-dir", data, *SMALL, "--epochs", 2, "--batch-size", 2, "--output-dir"
    assert call(recipe.main, *flags, tmp_path / "whole")[0] == 0
    with steps(9):  # eight are the first stage's
        code, out, err = call(recipe.main, *flags, tmp_path / "parts")
    assert code == 143 and out.count("train.py --recipe better ") == 2, err
    assert "tools/recipe.py --data-dir " in err and "--load-model" in err
    assert f"Starting from {display_path(tmp_path / 'parts' / 'stage1' / BEST_CHECKPOINT)}" in out
    with steps() as taken:
        code = call(recipe.main, *flags, tmp_path / "parts")[0]
    assert code == 0 and len(taken) == 7
    first, last = tmp_path / "whole" / "stage1", tmp_path / "whole"
    for folder in (first, last):
        assert_same_run(folder, tmp_path / "parts" / folder.relative_to(last))
    assert load_checkpoint(last / CHECKPOINT)["settings"]["optimizer"] == "muon"
    (first / BEST_CHECKPOINT).unlink()
    assert_refused(call(recipe.main, *flags, last), "is of another run")


def test_the_recipe_without_data_trains_on_the_demo(call, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ROOT", tmp_path)
    write_pairs(tmp_path / "data" / "demo")
    write_pairs(tmp_path / "data" / "demo", side="val", cars=1, seed=7)
    flags = [*SMALL, "--epochs", 1, "--output-dir", tmp_path / "run"]
    code, out, err = call(recipe.main, *flags)
    assert code == 0 and out.count("Photos: 10 for training, 2 for validation") == 2, err


def test_a_signal_may_come_while_the_script_prints(monkeypatch, capfd):
    def reentrant(*_, **__):
        raise RuntimeError("reentrant call")

    monkeypatch.setattr("builtins.print", reentrant)
    request = StopRequest()
    with handling(request.receive, signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
    assert request.number == signal.SIGTERM
    assert "Stopping after this step" in capfd.readouterr().err


SCRIPTS = ["train.py", "test.py", "predict.py", "data/prepare.py"]
SCRIPTS += [f"tools/{name}.py" for name in ("app", "bench", "check_data", "export", "recipe")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_a_script_starts_leaves_no_traceback(script, tmp_path):
    slow = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    for name in ("torch", "numpy", "PIL"):
        (tmp_path / f"{name}.py").write_text(slow)
    done = subprocess.run(
        [sys.executable, ROOT / script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_a_second_signal_while_the_run_is_saved_does_not_lose_the_save(fit, tmp_path, monkeypatch):
    save = utils.save_checkpoint

    def stop_then_save(*args):
        signal.raise_signal(signal.SIGTERM)
        save(*args)

    monkeypatch.setattr(utils, "save_checkpoint", stop_then_save)
    with steps(1):
        assert fit("run", "--save-every", 0)[0] == 143
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["progress"]["batches_done"] == 1


def test_a_signal_while_validation_runs_loses_nothing_of_the_epoch(fit, tmp_path, monkeypatch):
    fit("whole", "--epochs", 2)
    score_loader = utils.score_loader

    def stop_then_score(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return score_loader(*args, **options)

    monkeypatch.setattr(utils, "score_loader", stop_then_score)
    code, _, err = fit("parts", "--epochs", 2, "--save-every", 0)
    assert code == 130 and "up to batch 2 of epoch 1" in err
    monkeypatch.setattr(utils, "score_loader", score_loader)
    with steps() as taken:
        assert fit("parts", "--load-model")[0] == 0
    assert taken == [2, 2], "the second epoch's steps only"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    process = start(data, tmp_path / "run", "--epochs", 5000, "--num-workers", 1)
    wait_for_epoch(process, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "Stopping after this step" in err and "holds the run up to" in err
    assert "to resume: python train.py --data-dir" in err and "--load-model" in err
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["epoch"] >= 1


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_step(data, tmp_path):
    large = "--features 64 128 --image-height 640 --image-width 960 --batch-size 8".split()
    process = start(data, tmp_path / "run", *large)
    assert any(line.startswith("Epochs 1 to") for line in process.stdout), process.stderr.read()
    time.sleep(2)  # then the first step has begun
    process.send_signal(signal.SIGINT)
    assert any("Stopping after this step" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, "as from Ctrl-C; a shell says 130"
    assert "Stopped" not in err and "Traceback" not in err


# Killed -------------------------------------------------------------------------------------------


def train_and_die_in_save(argv, number):
    """Train in a process that is killed when half of its checkpoint of this number is written."""
    save, saves = torch.save, count(1)

    def save_and_die(state, file):
        if next(saves) < number:
            return save(state, file)
        content = io.BytesIO()
        save(state, content)
        file.write(content.getvalue()[: content.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_and_die
    train.main([*map(str, argv), "--save-every", "1"])


def test_a_run_killed_in_one_save_after_another_ends_as_one_never_killed(
    fit, data, tmp_path, forkserver
):
    assert fit("whole", "--epochs", 2)[0] == 0
    run = tmp_path / "run"
    argv = ["--load-model", "--data-dir", data, "--output-dir", run, *SMALL, "--epochs", 2]
    for number in count(1):
        process = forkserver.Process(target=train_and_die_in_save, args=(argv, number))
        process.start()
        process.join(60)
        for file in run.glob("*.pth.tar"):
            load_checkpoint(file)  # each file that there is is whole
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert number > 3 and len(rows(run)) == 2
    assert_same_run(tmp_path / "whole", run)


# What is gone on with -----------------------------------------------------------------------------


def test_without_a_checkpoint_a_run_starts_afresh_and_says_so(fit, tmp_path):
    code, out, _ = fit("run", "--epochs", 1, "--load-model")
    assert code == 0 and "no checkpoint to resume" in out and len(rows(tmp_path / "run")) == 1


def test_a_finished_run_says_so_and_only_a_table_that_a_kill_left_behind_is_mended(fit, finished):
    before, table = (finished / CHECKPOINT).read_bytes(), (finished / "metrics.csv").read_bytes()
    (finished / "metrics.csv").write_bytes(table[:-200])
    code, out, _ = fit("run", "--load-model", "--epochs", 2)
    assert code == 0 and "nothing is left to do; --load-model --epochs 4 would train more" in out
    assert (finished / CHECKPOINT).read_bytes() == before
    assert (finished / "metrics.csv").read_bytes() == table


def test_a_run_that_is_given_more_epochs_is_on_the_longer_schedule(fit, tmp_path):
    fit("whole", "--epochs", 4, "--step-size", 3)
    fit("parts", "--epochs", 2, "--step-size", 3)
    code, out, _ = fit("parts", "--epochs", 4, "--load-model")
    assert code == 0 and "num_epochs: 4, instead of the checkpoint's 2" in out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rates = [float(row["learning_rate"]) for row in rows(tmp_path / "parts")]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.001])


def test_an_epoch_goes_on_with_the_same_photos_and_begins_anew_with_others(fit, data, tmp_path):
    with steps(1):
        assert fit("run", "--epochs", 1)[0] == 143
    (tmp_path / "link").symlink_to(data)
    with steps(2) as taken:
        code, out, _ = fit("run", "--epochs", 2, "--load-model", "--data-dir", tmp_path / "link")
    assert code == 143 and "restarts" not in out and taken == [1, 2]
    for path in data.glob("*/000000000004_02*"):
        path.unlink()
    with steps() as taken:
        code, out, _ = fit("run", "--epochs", 2, "--load-model")
    assert code == 0 and "its epoch restarts" in out and taken == [2, 2]


@pytest.mark.parametrize("version", OLDER)
def test_a_checkpoint_that_older_code_wrote_inside_an_epoch(call, data, tmp_path, version):
    os.mkdir(tmp_path / "run")
    older = ROOT / "tests" / "files" / f"stopped_by_{version}.pth.tar"
    shutil.copy(older, tmp_path / "run" / CHECKPOINT)
    flags = "--load-model", "--data-dir", data, "--output-dir", tmp_path / "run", "--device", "cpu"
    for epochs, expected in ((3, [2, 2, 3, 3, 3, 3]), (4, [4, 4, 4, 4])):
        with steps() as taken:
            code, out, err = call(train.main, *flags, "--epochs", epochs)
        assert code == 0 and "restarts" not in out and taken == expected, err
    table = rows(tmp_path / "run")
    assert [row["epoch"] for row in table] == list("1234")
    if version == "60dd799":
        columns = [row["threshold"] for row in table]
        assert columns == ["0.5", "", "", ""], "a column later rows lack"


def test_a_run_with_a_loss_scaler_goes_on_from_one_without(finished, monkeypatch):
    checkpoint = load_checkpoint(finished / CHECKPOINT)
    monkeypatch.setattr(utils, "amp_dtype", lambda device: torch.float16)
    run = train.make_run(Settings(features=(4, 8)), torch.device("cpu"))
    unpack(checkpoint, run, finished / CHECKPOINT)
    assert run.scaler.is_enabled() and run.epoch == 2
