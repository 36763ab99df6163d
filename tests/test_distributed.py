"""train.py under torchrun, as two processes on the CPU."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, assert_same_run, rows, write_pairs

from dataset import EpochSampler
from model import UNet
from utils import CHECKPOINT, load_checkpoint

# train.py as conftest's fixture `frozen` has it.
FROZEN = """
import conftest, torch, train, utils
from support.command_line import run_script

utils.amp_dtype = lambda device: None
torch.nn.BatchNorm2d.forward = conftest.with_fixed_statistics
train.OPTIMIZERS["adam"] = torch.optim.SGD
run_script(train.main)
"""

# train.py, whose second process gets a SIGTERM after three steps.
STOPPED = """
import os, signal, train
from support.command_line import run_script

learning_rate, steps = train.learning_rate, []

def step_and_stop(settings, epochs):
    steps.append(epochs)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return learning_rate(settings, epochs)

train.learning_rate = step_and_stop
run_script(train.main)
"""


def torchrun(script, *flags):
    """Run a script of ours, or one that stands in tmp_path, as two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    return subprocess.run(
        [*launcher, script, *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def photos(data, tmp_path):
    """13 photos to train on, the last of them a step of its own, and three to validate on."""
    for path in data.glob("*/*_02*"):
        path.unlink()
    write_pairs(tmp_path / "data", cars=13, views=1)
    write_pairs(tmp_path / "data", cars=3, views=1, side="val", seed=7)
    return tmp_path / "data"


def test_two_processes_with_half_the_batch_train_as_one(photos, fit, tmp_path, frozen):
    (tmp_path / "frozen.py").write_text(FROZEN)
    flags = "--epochs 3 --loss bce-dice".split()
    assert fit("one", *flags)[0] == 0
    own = ["--data-dir", photos, "--output-dir", tmp_path / "two", *SMALL, "--batch-size", 2]
    done = torchrun(tmp_path / "frozen.py", *own, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Dice score: ") == 3 and done.stdout.count("Done in") == 1
    assert re.search(r"Got \d+/4608 with acc", done.stdout), "each of 3 photos counts once"
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for name in ("train_loss", "val_loss", "dice", "iou", "accuracy"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-5), name
    one, two = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("one", "two"))
    assert two["state_dict"].keys() == UNet(features=(4, 8)).state_dict().keys()
    for name, weight in one["state_dict"].items():
        assert torch.allclose(weight, two["state_dict"][name], rtol=0, atol=1e-5), name


@pytest.mark.slow
def test_two_processes_go_on_inside_an_epoch_as_if_never_stopped(photos, tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED)
    flags = ["--data-dir", photos, *SMALL, "--epochs", 2, "--batch-size", 1, "--accumulate", 2]
    flags += ["--load-model", "--output-dir"]
    whole = torchrun("train.py", *flags, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    stopped = torchrun(tmp_path / "stopped.py", *flags, tmp_path / "parts")
    assert stopped.returncode != 0 and "up to batch 6 of epoch 1" in stopped.stderr, stopped.stderr
    assert "to resume: torchrun --nproc_per_node=2 " in stopped.stderr
    parts = torchrun("train.py", *flags, tmp_path / "parts")
    assert parts.returncode == 0, parts.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert len(rows(tmp_path / "parts")) == 2


@pytest.mark.slow
def test_the_stages_of_the_recipe_share_two_processes(photos, tmp_path):
    flags = ["--data-dir", photos, *SMALL, "--epochs", 1, "--output-dir", tmp_path / "run"]
    done = torchrun("tools/recipe.py", *flags)
    assert done.returncode == 0 and done.stdout.count("Done in") == 2, done.stderr


@pytest.mark.slow
def test_bad_photos_end_the_run_with_its_own_message(photos, tmp_path):
    photo = next((photos / "train_images").iterdir())
    photo.write_bytes(photo.read_bytes()[:-300])
    done = torchrun("train.py", "--data-dir", photos, *SMALL, "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and f"{photo.name}: cannot be read" in done.stderr
    assert "[rank" not in done.stderr, "no traceback but the launcher's own"


def test_a_world_of_one_without_torchrun_is_a_plain_run(fit, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # as some clusters set it for every job
    assert fit("run", "--epochs", 1)[0] == 0


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("length", [4, 7, 8])
def test_the_processes_batches_together_are_those_of_one(monkeypatch, length, start):
    def drawn(process, processes):
        monkeypatch.setattr("dataset.rank", lambda: process)
        monkeypatch.setattr("dataset.world_size", lambda: processes)
        sampler = EpochSampler(length, seed=1)
        sampler.set_epoch(4, start)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        return keys

    whole, parts = drawn(0, 1), [drawn(process, 3) for process in range(3)]
    assert {index for _, index in whole} <= set(range(length)) and len(whole) == length - start
    together = [key for keys in zip(*parts, strict=True) for key in keys]
    assert together[: len(whole)] == whole, "those that follow come again"
    assert {epoch for epoch, _ in whole} == {4}
