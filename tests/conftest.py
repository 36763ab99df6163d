"""What the tests share: small photos and masks on disk, and a way to call a script."""

import csv
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import command_line
import train
import utils
from checkpoints import CHECKPOINT, load_checkpoint
from model import UNet

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--features 4 8 --image-height 32 --image-width 48 --batch-size 4 --device cpu".split()


def draw_pair(rng, size):
    """A bright ellipse on a dark, noisy ground: (photo, RGB; mask, grey of 0 and 255)."""
    width, height = size
    x, y = rng.uniform(0.3, 0.7) * width, rng.uniform(0.3, 0.7) * height
    box = (x - 0.25 * width, y - 0.25 * height, x + 0.25 * width, y + 0.25 * height)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse(box, 255)
    photo = rng.integers(0, 90, (height, width, 3)).astype(np.uint8)
    photo[np.asarray(mask) > 0] += rng.integers(80, 160, 3).astype(np.uint8)
    return Image.fromarray(photo), mask


def write_pairs(folder, cars=5, views=2, size=(72, 48), side="train", seed=0):
    """Write pairs named as the challenge's into folder/train_images and folder/train_masks."""
    rng = np.random.default_rng(seed)
    images, masks = folder / f"{side}_images", folder / f"{side}_masks"
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(exist_ok=True)
    for car in range(cars):
        for view in range(1, views + 1):
            name = f"{seed * 1000 + car:012x}_{view:02d}"
            photo, mask = draw_pair(rng, size)
            photo.save(images / f"{name}.jpg", quality=95)
            mask.save(masks / f"{name}_mask.gif")
    return images, masks


def save_bright_network(path):
    """Write a classic checkpoint, for 160x240, of a network that finds what is bright and red."""
    model = UNet(features=(4,)).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    for block in (model.downs[0].conv, model.ups[1].conv):  # the first channel goes through
        for conv, norm in ((0, 1), (3, 4)):
            block[conv].weight.data[0, 0, 1, 1] = 1
            block[norm].weight.data[:] = 1
    model.final_conv.weight.data[0, 0], model.final_conv.bias.data[0] = 1, -0.45
    utils.save_checkpoint({"state_dict": model.state_dict(), "optimizer": {}}, path)
    return path


@pytest.fixture
def network(tmp_path):
    """The file of a network that finds what is bright and red."""
    return save_bright_network(tmp_path / "bright.pth.tar")


@pytest.fixture
def photos(data):
    """A folder of ten photos."""
    return data / "train_images"


@pytest.fixture
def data(tmp_path):
    """A folder with train_images and train_masks: five cars, two photos each."""
    write_pairs(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def call(capsys):
    """Call a script as the shell would: call(train.main, *flags) -> (code, stdout, stderr)."""

    def call(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command_line.run_script(lambda: main([str(arg) for arg in argv]))
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def fit(call, data, tmp_path):
    """Train a small network on `data`: fit(folder, *flags) -> (code, stdout, stderr)."""

    def fit(folder, *flags):
        folders = ["--data-dir", data, "--output-dir", tmp_path / folder]
        return call(train.main, *folders, *SMALL, "--lr", "1e-2", *flags)

    return fit


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def assert_same(a, b):
    """Two trees of dicts, lists, tensors and plain values are equal to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ("seconds", "photos_per_second"):
                assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(a, b):
    first, second = load_checkpoint(a / CHECKPOINT), load_checkpoint(b / CHECKPOINT)
    for checkpoint in (first, second):
        for name in ("num_workers", "cache", "cache_dir", "num_epochs", "save_every"):
            checkpoint["settings"].pop(name, None)
    assert_same(first, second)


def start(data, run, *flags):
    # Where the tests run as a background job Ctrl-C is ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "train.py", "--data-dir", data, "--output-dir", run, *SMALL]
    return subprocess.Popen(
        [*command, "--lr", "1e-2", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def wait_for_epoch(process, number):
    for line in process.stdout:
        if line.startswith(f"epoch {number}/"):
            return
    raise AssertionError(process.stderr.read())


def workers_of(process):
    """The process ids of a process's children; needs Linux."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        return [int(number) for number in children.read().split()]


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    """Empty figures: to draw the curves takes several times as long as the tests' epochs."""
    picture = Image.new("RGB", (1, 1))
    monkeypatch.setattr("plots.save_figure", lambda figure, path: utils.save_picture(picture, path))


@pytest.fixture
def float32(monkeypatch):
    """Full precision also on a CPU that computes in bf16, for comparisons closer than it rounds."""
    monkeypatch.setattr(utils, "amp_dtype", lambda device: None)


@pytest.fixture(scope="session")
def carvana():
    """The folder of real photos that CARVANA_DIR names."""
    folder = os.environ.get("CARVANA_DIR")
    if not folder or not os.path.isdir(folder):
        pytest.skip("CARVANA_DIR names no folder of real photos")
    return Path(folder)


@pytest.fixture(scope="session")
def forkserver():
    """What starts processes, as multiprocessing does, from one that has imported the project and
    computed nothing: a hundred of them take minutes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench", "train", "predict", "conftest"])
    with pytest.MonkeyPatch.context() as patch:  # for that process alone
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()
    return context
