"""train.py under torchrun, as two processes on the CPU."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, assert_same_run, rows, write_pairs

import train
from checkpoints import load_checkpoint
from dataset import EpochSampler
from model import UNet

# train.py with BatchNorm's statistics frozen: those of half a batch are not those of a whole one.
FROZEN = """
import sys
import torch

init = torch.nn.BatchNorm2d.__init__

def frozen(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.training = False

torch.nn.BatchNorm2d.__init__ = frozen
torch.nn.BatchNorm2d.train = lambda self, mode=True: self
import command_line
import train
import utils

utils.amp_dtype = lambda device: None  # bf16 rounds more than this test looks for
command_line.run_script(train.main)
"""


def torchrun(script, *flags, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, "--standalone", script, *map(str, flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def photos(tmp_path):
    """13 photos to train on, the last of them a step of its own, and three to validate on."""
    write_pairs(tmp_path / "data", cars=13, views=1)
    write_pairs(tmp_path / "data", cars=3, views=1, side="val", seed=7)
    return tmp_path / "data"


def test_two_processes_with_half_the_batch_have_the_loss_curve_of_one(photos, tmp_path):
    (tmp_path / "frozen.py").write_text(FROZEN)
    flags = ["--data-dir", photos, *SMALL, "--lr", "1e-2", "--epochs", 5]
    flags += "--loss bce-dice --ema 0.5 --clip-grad 1 --threshold auto".split()
    for processes, batch in ((1, 4), (2, 2)):
        done = torchrun(
            tmp_path / "frozen.py",
            *flags,
            *("--batch-size", batch, "--output-dir", tmp_path / str(processes)),
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        for name in ("train_loss", "val_loss", "dice", "iou", "accuracy", "threshold"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-4), name
    assert float(one[4]["train_loss"]) < float(one[0]["train_loss"]) - 0.05


# train.py, whose second process gets a SIGTERM after three steps.
STOPPED = """
import os
import signal

import command_line
import train
from run import Run

step, steps = Run.step, []

def step_and_stop(run, epochs):
    step(run, epochs)
    steps.append(epochs)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)

Run.step = step_and_stop
command_line.run_script(train.main)
"""


def test_two_processes_write_files_once_and_go_on_inside_an_epoch_as_if_never_stopped(
    photos, tmp_path
):
    (tmp_path / "stopped.py").write_text(STOPPED)
    flags = ["--data-dir", photos, *SMALL, "--lr", "1e-2", "--epochs", 2, "--batch-size", 1]
    flags += ["--ema", 0.5, "--accumulate", 2, "--load-model", "--output-dir"]
    whole = torchrun("train.py", *flags, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("Dice score: ") == 2 and whole.stdout.count("Done in") == 1
    assert re.search(r"Got \d+/4608 with acc", whole.stdout), "each of 3 photos counts once"
    stopped = torchrun(tmp_path / "stopped.py", *flags, tmp_path / "parts")
    assert stopped.returncode != 0 and "up to step 6 of epoch 1" in stopped.stderr, stopped.stderr
    parts = torchrun("train.py", *flags, tmp_path / "parts")
    assert parts.returncode == 0, parts.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert len(rows(tmp_path / "parts")) == 2
    weights = load_checkpoint(tmp_path / "parts" / train.CHECKPOINT)["state_dict"]
    assert weights.keys() == UNet(features=(4, 8)).state_dict().keys()


def test_bad_photos_end_the_run_with_its_own_message(photos, tmp_path):
    photo = next((photos / "train_images").iterdir())
    photo.write_bytes(photo.read_bytes()[:-300])
    done = torchrun("train.py", "--data-dir", photos, *SMALL, "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and f"  {photo}: cannot be read" in done.stderr
    assert "[rank" not in done.stderr, "no traceback but the launcher's own"


def test_synchronized_batchnorm_without_gpus_is_refused(fit):
    code, _, err = fit("run", "--sync-batchnorm")
    assert code == 2 and "several GPUs" in err


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_each_process_draws_as_many_and_together_all(monkeypatch, length):
    drawn = []
    for process in range(3):
        monkeypatch.setattr("dataset.rank", lambda process=process: process)
        monkeypatch.setattr("dataset.world_size", lambda: 3)
        sampler = EpochSampler(length, seed=1)
        sampler.set_epoch(4)
        drawn.append(list(sampler))
        assert len(drawn[-1]) == len(sampler)
    assert len({len(part) for part in drawn}) == 1
    assert {index for part in drawn for _, index in part} == set(range(length))
    assert {epoch for part in drawn for epoch, _ in part} == {4}
