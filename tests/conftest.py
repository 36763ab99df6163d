"""What the tests share: small photos and masks on disk, a small trained run, calls of scripts."""

import csv
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F

import train
import utils
from model import UNet
from support.command_line import run_script

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ["--features", "4", "8", "--batch-size", "4", "--lr", "1e-2", "--device", "cpu"]
SMALL = [*NETWORK, "--image-height", "32", "--image-width", "48"]

# A background job ignores Ctrl-C, and so would all processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # on which networks as small as these are fastest
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # of processes that tests start


def draw_pair(rng, size):
    """A bright ellipse on a dark, noisy ground: (photo, RGB; mask, grey of 0 and 255)."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    x, y = rng.uniform(0.3, 0.7, 2)
    mask = (columns / width - x) ** 2 + (rows / height - y) ** 2 < 0.25**2
    photo = rng.integers(0, 90, (height, width, 3), np.uint8)
    photo[mask] += rng.integers(80, 160, 3, np.uint8)
    return Image.fromarray(photo), Image.fromarray(mask * np.uint8(255))


def write_pairs(folder, cars=5, views=2, size=(72, 48), side="train", seed=0):
    """Write pairs named as the challenge's into folder/train_images and folder/train_masks."""
    rng = np.random.default_rng(seed)
    images, masks = folder / f"{side}_images", folder / f"{side}_masks"
    os.makedirs(images, exist_ok=True), os.makedirs(masks, exist_ok=True)
    for car, view in product(range(cars), range(views)):
        photo, mask = draw_pair(rng, size)
        photo.save(images / f"{seed * 1000 + car:012x}_{view + 1:02d}.jpg", quality=95)
        mask.save(masks / f"{seed * 1000 + car:012x}_{view + 1:02d}_mask.gif")
    return images, masks


def save_bright_network(path):
    """Write a classic checkpoint, for 160x240, of a network that finds what is bright and red."""
    weights = UNet(features=(4,)).state_dict()
    for tensor in (tensor for name, tensor in weights.items() if "running" not in name):
        tensor.zero_()
    for block, layer in product(("downs.0.conv", "ups.1.conv"), (0, 3)):
        weights[f"{block}.{layer}.weight"][0, 0, 1, 1] = 1  # the first channel goes through
        weights[f"{block}.{layer + 1}.weight"][:] = 1
    weights["final_conv.weight"][0, 0], weights["final_conv.bias"][0] = 1, -0.45
    utils.save_checkpoint({"state_dict": weights, "optimizer": {}}, path)
    return path


@pytest.fixture
def network(tmp_path):
    return save_bright_network(tmp_path / "bright.pth.tar")


@pytest.fixture
def data(tmp_path):
    """A folder with train_images and train_masks: five cars, two photos each."""
    return write_pairs(tmp_path / "data")[0].parent


@pytest.fixture
def photos(data):
    return data / "train_images"


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    """Empty figures: to draw curves takes several times as long as the tests' epochs."""
    empty = Image.new("RGB", (1, 1))
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: empty.save(file, "png"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of two epochs, to copy, not to change; beside it `data`, as the fixture's."""
    folder = tmp_path_factory.mktemp("trained")
    data, run = write_pairs(folder / "data")[0].parent, folder / "run"
    flags = ["--data-dir", str(data), "--output-dir", str(run), "--epochs", "2"]
    assert train.main([*flags, *SMALL]) == 0
    return run


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of `trained`, which fit("run", "--load-model", ...) goes on with."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def call(capsys):
    """Call a script as the shell would: call(train.main, *flags) -> (code, stdout, stderr)."""

    def call(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: main([str(arg) for arg in argv]))
        return stop.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def fit(call, data, tmp_path):
    """Train a small network on `data`: fit(folder, *flags) -> (code, stdout, stderr)."""

    def fit(folder, *flags):
        folders = ["--data-dir", data, "--output-dir", tmp_path / folder]
        return call(train.main, *folders, *SMALL, *flags)

    return fit


def assert_refused(result, *parts):
    """A script, called, has exited with 2 and printed one line, which holds these parts."""
    code, _, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in parts), err


def rows(folder, table="metrics.csv"):
    """A table of a run's."""
    with open(folder / table) as file:
        return list(csv.DictReader(file))


def assert_same(a, b):
    """Two trees of dicts, lists, tensors and plain values are equal to the last bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "photos_per_second"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert type(a) is type(b) and (torch.equal(a, b) if torch.is_tensor(a) else a == b)


def assert_same_run(a, b):
    """The runs in two folders have come to the same, whatever way they took."""
    first, second = (utils.load_checkpoint(folder / utils.CHECKPOINT) for folder in (a, b))
    for settings in (first["settings"], second["settings"]):
        settings |= dict.fromkeys(("num_workers", "cache", "num_epochs", "save_every"))
    assert_same(first, second)


def start(data, run, *flags):
    """Train in a process of its own, a Popen."""
    command = [sys.executable, ROOT / "train.py", "--data-dir", data, "--output-dir", run, *SMALL]
    command += map(str, flags)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def wait_for_epoch(process, number):
    assert any(line.startswith(f"epoch {number}/") for line in process.stdout)


def workers_of(process):
    """The process ids of a process's children; needs Linux."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        return [int(number) for number in children.read().split()]


@pytest.fixture
def float32(monkeypatch):
    """Full precision also on a CPU that computes in bf16, for comparisons closer than it rounds."""
    monkeypatch.setattr(utils, "amp_dtype", lambda device: None)


def with_fixed_statistics(norm, x):
    """BatchNorm2d.forward as in evaluation: the statistics of half a batch are others."""
    statistics = norm.running_mean, norm.running_var
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, eps=norm.eps)


@pytest.fixture
def frozen(monkeypatch, float32):
    """A photo's loss does not depend on the batch that it comes in, and steps, of SGD, are no
    larger for small gradients, as Adam's are: rounding stays rounding."""
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", with_fixed_statistics)
    monkeypatch.setitem(train.OPTIMIZERS, "adam", torch.optim.SGD)


@pytest.fixture(scope="session")
def carvana():
    """The folder of real photos that CARVANA_DIR names."""
    if not os.path.isdir(os.environ.get("CARVANA_DIR", "")):
        pytest.skip("CARVANA_DIR names no folder of real photos")
    return Path(os.environ["CARVANA_DIR"])


@pytest.fixture(scope="session")
def forkserver():
    """Starts processes, as multiprocessing does, from one that has imported the project already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "predict", "conftest"])
    with pytest.MonkeyPatch.context() as patch:  # for that process alone
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()
    return context
