"""The parts in a loop of one's own: docs/training.md's, and the well-known tutorials'."""

import os
import re
import shutil
import subprocess
import sys

import albumentations as A
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from conftest import ROOT, SMALL, rows, write_pairs
from torch import nn, optim

import test
from model import UNET
from utils import (
    CHECKPOINT,
    check_accuracy,
    get_loaders,
    load_checkpoint,
    save_checkpoint,
    save_predictions_as_imgs,
)

PAGE = (ROOT / "docs" / "training.md").read_text()
DICE = re.compile(r"Dice score: (\S+)")


def blocks(heading, language):
    """The code blocks of a section of the page."""
    _, _, section = PAGE.partition(f"\n## {heading}\n")
    section, _, _ = section.partition("\n## ")
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def test_the_loop_of_the_docs_runs_and_test_py_scores_it_the_same(tmp_path, call, monkeypatch):
    (code,) = blocks("In your own loop", "python")
    write_pairs(tmp_path / "data", size=(240, 160))
    smaller = {
        "(16, 32, 64, 128)": "(8, 16)",
        "range(3)": "range(8)",
        "batch_size=16": "batch_size=2",
    }
    for before, after in smaller.items():  # eight epochs of few, small steps
        assert code.count(before) == 1
        code = code.replace(before, after)
    (tmp_path / "my_loop.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "my_loop.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    scores = DICE.findall(done.stdout)
    assert len(scores) == 8 and float(scores[-1]) > 0.5
    assert list((tmp_path / "saved_images").glob("panel_*.png"))
    monkeypatch.setattr(test, "ROOT", tmp_path)  # where it looks for data/ and the held-out cars
    code, out, err = call(test.main, "--checkpoint", tmp_path / CHECKPOINT)
    assert code == 0 and DICE.findall(out) == scores[-1:], err


@pytest.mark.parametrize("mean, std", [([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), (0.0, 1.0)])
def test_the_calls_of_the_tutorials_work_unchanged(tmp_path, monkeypatch, capsys, mean, std):
    monkeypatch.chdir(tmp_path)
    train_folders = write_pairs(tmp_path / "data")
    val_folders = write_pairs(tmp_path / "data", 2, side="val", seed=9)
    size = {"height": 32, "width": 48}
    normalize = A.Normalize(mean=mean, std=std, max_pixel_value=255.0)
    train_transform = A.Compose(
        [
            A.Resize(**size),
            A.Rotate(limit=35, p=1.0),
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.1),
            normalize,
            ToTensorV2(),
        ]
    )
    val_transform = A.Compose([A.Resize(**size), normalize, ToTensorV2()])

    model = UNET(in_channels=3, out_channels=1, features=[4, 8]).to("cpu")
    loss_function = nn.BCEWithLogitsLoss()
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    train_loader, val_loader = get_loaders(
        *map(str, train_folders),
        *map(str, val_folders),
        4,
        train_transform,
        val_transform,
        0,
        True,
    )
    for images, masks in train_loader:
        assert images.shape[1:] == (3, 32, 48) and 0 <= images.min() < images.max() <= 1
        loss = loss_function(model(images), masks)  # the masks are (N, 1, H, W) already
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()})
    check_accuracy(val_loader, model, device="cpu")
    save_predictions_as_imgs(val_loader, model, folder="saved_images/", device="cpu")

    assert DICE.search(capsys.readouterr().out)
    assert len(list((tmp_path / "saved_images").glob("panel_*.png"))) == len(val_loader.dataset)
    again = UNET(in_channels=3, out_channels=1, features=[4, 8])
    load_checkpoint("my_checkpoint.pth.tar", again)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_another_size_and_normalization_are_said_beside_the_weights(tmp_path):
    network = UNET(features=[4, 8])
    facts = {
        "image_size": [320, 480],
        "normalization": {"mean": [0.5] * 3, "std": [0.25] * 3, "max_pixel_value": 255.0},
    }
    save_checkpoint({"state_dict": network.state_dict()} | facts, tmp_path / CHECKPOINT)
    assert facts.items() <= load_checkpoint(tmp_path / CHECKPOINT).items()


def apply_change(diff, folder):
    """Edit a file in a folder as a block of the page says."""
    head, *lines = diff.splitlines()
    path = folder / head.removeprefix("--- ")
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert text.count(f"\n{before}\n") == 1, diff
    path.write_text(text.replace(f"\n{before}\n", f"\n{after}\n"))


@pytest.mark.slow
def test_the_changes_of_the_docs_train(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "support"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / path.name)
    changes = blocks("Change it", "diff")
    assert len(changes) == 4
    for diff in changes:
        apply_change(diff, copy)

    data = write_pairs(tmp_path / "data")[0].parent
    choices = ["--loss", "focal", "--augment", "light", "--optimizer", "sgd", "--lr", "0.1"]
    flags = ["--data-dir", data, "--output-dir", tmp_path, *SMALL, *choices, "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, copy / "train.py", *flags], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path)) == 1
    weights = torch.load(tmp_path / CHECKPOINT, weights_only=True)["state_dict"]
    assert "bottleneck.shortcut.weight" in weights
