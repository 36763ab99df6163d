"""Signals, and runs that go on from inside an epoch as if they had never stopped."""

import os
import signal
import subprocess
import sys
import time
from itertools import count

import pytest
from conftest import ROOT, assert_same_run, rows, start, wait_for_epoch, workers_of

import train
from checkpoints import CHECKPOINT, load_checkpoint, save_checkpoint
from run import Run


def stop_after(monkeypatch, steps, number=signal.SIGTERM):
    """Send this process a signal after so many steps from now on."""
    step, taken = Run.step, count(1)

    def step_and_stop(run, epochs):
        step(run, epochs)
        if next(taken) == steps:
            signal.raise_signal(number)

    monkeypatch.setattr(Run, "step", step_and_stop)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--no-cache",
        "--num-workers 2 --save-every 0",
        "--accumulate 2 --ema 0.9 --scheduler onecycle --optimizer adamw --threshold auto",
    ],
)
def test_a_run_stopped_inside_an_epoch_ends_as_one_never_stopped(fit, tmp_path, monkeypatch, flags):
    flags = ["--epochs", 3, "--batch-size", 1, *flags.split()]
    assert fit("whole", *flags)[0] == 0
    for steps, place in ((3, "step 3 of epoch 1"), (4, "epoch 1"), (5, "epoch 2")):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            code, _, err = fit("parts", *flags, "--load-model")
        assert code == 143 and "holds the run up to" in err and "--load-model" in err
        assert "accumulate" in err or place in err, err
    code, out, err = fit("parts", *flags, "--load-model")
    assert code == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [row["epoch"] for row in rows(tmp_path / "parts")] == ["1", "2", "3"]


def test_a_signal_while_validation_runs_loses_nothing_of_the_epoch(fit, tmp_path, monkeypatch):
    fit("whole", "--epochs", 2)
    score_loader = train.score_loader

    def stop_then_score(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return score_loader(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "score_loader", stop_then_score)
        code, _, err = fit("parts", "--epochs", 2, "--save-every", 0)
    assert code == 130 and "up to step 2 of epoch 1" in err
    taken = []
    monkeypatch.setattr(Run, "step", lambda run, _, step=Run.step: taken.append(step(run, _)))
    assert fit("parts", "--load-model")[0] == 0
    assert len(taken) == 2, "the second epoch's steps only"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_other_photos_than_those_the_epoch_began_with_begin_it_anew(
    fit, data, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert fit("run", "--epochs", 1)[0] == 143
    photo = sorted((data / "train_images").iterdir())[0]
    photo.unlink()
    (data / "train_masks" / f"{photo.stem}_mask.gif").unlink()
    with monkeypatch.context() as patch:  # at the same place: it is another part all the same
        stop_after(patch, 1)
        code, out, err = fit("run", "--epochs", 1, "--load-model")
    assert code == 143 and "its epoch begins anew" in out, err
    part = load_checkpoint(tmp_path / "run" / CHECKPOINT)["part"]
    assert part["step"] == 1 and part["order"][1] == 7
    code, out, err = fit("run", "--epochs", 1, "--load-model")
    assert code == 0 and "begins anew" not in out, err


def test_the_same_photos_in_another_place_go_on_inside_the_epoch(fit, data, tmp_path, monkeypatch):
    fit("whole", "--epochs", 2)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert fit("run", "--epochs", 2)[0] == 143
    (tmp_path / "link").symlink_to(data)
    code, out, err = fit("run", "--epochs", 2, "--load-model", "--data-dir", tmp_path / "link")
    assert code == 0 and "anew" not in out, err
    states = [load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "run")]
    for name, tensor in states[0]["state_dict"].items():
        assert tensor.equal(states[1]["state_dict"][name]), name


@pytest.mark.parametrize("damage", [{"seen": 10**6}, {"step": -1}, {"order": 0}, {"loss_sum": 0}])
def test_a_part_of_an_epoch_that_makes_no_sense_is_refused(fit, tmp_path, monkeypatch, damage):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        fit("run", "--epochs", 1)
    path = tmp_path / "run" / CHECKPOINT
    checkpoint = load_checkpoint(path)
    save_checkpoint(checkpoint | {"part": checkpoint["part"] | damage}, path)
    code, _, err = fit("run", "--load-model")
    assert code == 2 and "start afresh" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "number, code, workers", [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 0)]
)
def test_a_signal_saves_and_says_how_to_go_on(data, tmp_path, number, code, workers):
    process = start(data, tmp_path / "run", "--epochs", 5000, "--num-workers", workers)
    wait_for_epoch(process, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert "holds the run up to" in err
    assert "to go on: python train.py --data-dir" in err and "--load-model" in err
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["epoch"] >= 2


def test_a_killed_run_is_resumed_to_the_weights_of_one_never_killed(fit, data, tmp_path):
    fit("whole", "--epochs", 4)
    process = start(data, tmp_path / "killed", "--epochs", 4)
    wait_for_epoch(process, 2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    code, _, err = fit("killed", "--epochs", 4, "--load-model")
    assert code == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert [row["epoch"] for row in rows(tmp_path / "killed")] == list("1234")


def test_a_second_ctrl_c_does_not_wait_for_the_step(data, tmp_path):
    large = "--features 64 128 --image-height 640 --image-width 960 --batch-size 8".split()
    process = start(data, tmp_path / "run", *large)
    for line in process.stdout:
        if line.startswith("Epochs 1 to"):
            break
    else:
        raise AssertionError(process.stderr.read())
    time.sleep(2)  # then the first step has begun
    process.send_signal(signal.SIGINT)
    assert any("Stopping after this step" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, "as from Ctrl-C; a shell says 130"
    assert "Stopped" not in err and "Traceback" not in err


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_a_worker_that_is_killed_ends_the_run_with_one_line_and_a_checkpoint(fit, data, tmp_path):
    fit("whole", "--epochs", 8, "--num-workers", 2)
    process = start(data, tmp_path / "run", "--epochs", 8, "--num-workers", 2)
    wait_for_epoch(process, 2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1, err
    assert "a process that loads data was killed" in err and "--load-model" in err
    assert fit("run", "--load-model")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_predict_removes_what_it_was_writing_when_terminated(photos, network, tmp_path):
    script = "import signal, predict, sys\nfrom files import write_aside\n"
    script += "from command_line import run_script\n"
    script += "def main():\n    with write_aside(sys.argv[1]):\n"
    script += "        signal.raise_signal(signal.SIGTERM)\n"
    command = [sys.executable, "-c", script + "run_script(main)", tmp_path / "out" / "mask.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143 and done.stderr == "stopped\n", done.stderr
    assert os.listdir(tmp_path / "out") == []


def test_output_that_cannot_be_written_is_answered_in_one_line():
    script = "import command_line; command_line.run_script(lambda: print('much', flush=True))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: the output: No space left on device: "), done.stderr
