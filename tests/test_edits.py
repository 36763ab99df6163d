"""A copy of the repository, edited as people edit it: it trains, resumes, is tested, predicts."""

import csv
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, write_pairs

from model import UNet
from utils import load_checkpoint, save_checkpoint

LEAKY = (
    ("model.py", "nn.ReLU(inplace=True)", "nn.LeakyReLU(LEAK)"),
    (
        "model.py",
        "        features=(64, 128, 256, 512),\n",
        "        features=(64,),\n        leak=0.1,\n",
    ),
    (
        "model.py",
        "        self.checkpoint_activations = checkpoint_activations\n",
        "        self.checkpoint_activations = checkpoint_activations\n"
        "        global LEAK\n        LEAK = leak\n",
    ),
    (
        "train.py",
        '        "features": list(settings.features),\n',
        '        "features": list(settings.features),\n        "leak": 0.7,\n',
    ),
)
RENAMED = (("model.py", "self.downs", "self.encoders"), ("model.py", "final_conv", "head"))
OPTIMIZER = (
    (
        "train.py",
        '"muon": Muon}',
        '"muon": Muon, "sgd": partial(torch.optim.SGD, momentum=0.9)}',
    ),
)
LOSS = (("utils.py", '"bce-dice": bce_dice}', '"bce-dice": bce_dice, "mine": torch.nn.MSELoss()}'),)
CONSTANTS = (("train.py", "NUM_EPOCHS = 10", "NUM_EPOCHS = 3"),)


class Copy:
    """A copy of the repository with edits, and calls of its scripts."""

    def __init__(self, folder, edits=()):
        self.folder = folder
        files = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("data/*.py")]
        for path in files:
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        self.edit(*edits)
        write_pairs(folder / "photos", cars=6)

    def edit(self, *edits):
        for name, before, after in edits:
            text = (self.folder / name).read_text()
            assert before in text, f"{name} has changed: {before}"
            (self.folder / name).write_text(text.replace(before, after))

    def run(self, script, *flags):
        command = [sys.executable, script, *map(str, flags)]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True)

    def train(self, *flags):
        done = self.run("train.py", "--data-dir", "photos", *SMALL, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rows(self):
        with open(self.folder / "metrics.csv") as file:
            return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize(
    "edits, flags",
    [
        (LEAKY, ()),
        (RENAMED, ()),
        ((*OPTIMIZER, *LOSS), ("--optimizer", "sgd", "--loss", "mine")),
    ],
    ids=["an argument", "other names", "an optimizer and a loss"],
)
def test_an_edited_copy_trains_resumes_is_tested_and_predicts(tmp_path, edits, flags):
    copy = Copy(tmp_path, edits)
    copy.train("--epochs", 2, *flags)
    out = copy.train("--epochs", 4, "--load-model")
    assert "starts without" not in out and len(copy.rows()) == 4
    best = max(copy.rows(), key=lambda row: (float(row["dice"]), -float(row["val_loss"])))
    done = copy.run("test.py", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"Dice score: {float(best['dice']):.5f}" in done.stdout
    assert f"loss {float(best['val_loss']):.5f}, " in done.stdout
    done = copy.run("predict.py", "photos/train_images", "--device", "cpu")
    assert done.returncode == 0 and len(list(tmp_path.glob("predictions/*_mask.png"))) == 12


@pytest.mark.slow
def test_a_checkpoint_of_other_code_is_refused_with_what_differs(tmp_path):
    copy = Copy(tmp_path, RENAMED)
    copy.train("--epochs", 1)
    copy.edit(*((name, after, before) for name, before, after in RENAMED))
    done = copy.run("test.py", "--device", "cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for part in ("does not fit model.py", "lacks downs.0.", "another model.py?"):
        assert part in done.stderr
    (tmp_path / "my_checkpoint.pth.tar").rename(tmp_path / "older.pth.tar")
    out = copy.train("--pretrained", "older.pth.tar", "--epochs", 1)
    assert "start with random weights: downs.0." in out


@pytest.mark.slow
def test_the_normalization_of_a_checkpoint_counts(tmp_path):
    copy = Copy(tmp_path)
    copy.train("--epochs", 1)
    copy.edit(("dataset.py", "MEAN = 0.0", "MEAN = 0.5"))
    out = copy.train("--epochs", 2, "--load-model")
    assert "normalization: the checkpoint's counts" in out
    saved = load_checkpoint(tmp_path / "my_checkpoint.pth.tar")
    assert saved["normalization"]["mean"] == 0.0
    copy.train("--epochs", 1)
    assert load_checkpoint(tmp_path / "my_checkpoint.pth.tar")["normalization"]["mean"] == 0.5


@pytest.mark.slow
def test_an_edited_constant_counts_on_the_demo_too(tmp_path):
    copy = Copy(tmp_path, CONSTANTS)
    copy.edit(("data/draw_demo.py", "CARS = 36", "CARS = 5"))
    done = copy.run("train.py", "--device", "cpu")
    assert done.returncode == 0 and "Epochs 1 to 3: size (96, 144)" in done.stdout, done.stderr


@pytest.mark.parametrize("key", ["", "model_state_dict", "model", "net", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_load_however_they_were_saved(tmp_path, key, prefix):
    model = UNet(features=(4, 8))
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / "saved.pth")
    loaded = load_checkpoint(tmp_path / "saved.pth")
    assert loaded["model"]["features"] == [4, 8]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded["state_dict"][name], value)


def test_a_dict_that_torch_load_gave_is_taken_too(tmp_path):
    model, other = UNet(features=(4, 8)), UNet(features=(4, 8))
    save_checkpoint({"state_dict": model.state_dict(), "optimizer": {}}, tmp_path / "a.pth.tar")
    load_checkpoint(torch.load(tmp_path / "a.pth.tar"), other)
    assert torch.equal(other.state_dict()["final_conv.bias"], model.final_conv.bias)


@pytest.mark.parametrize(
    "content, whose",
    [
        ({"inc.double_conv.0.weight": torch.zeros(64, 3, 3, 3)}, "milesial/Pytorch-UNet"),
        (
            {"state_dict": {"net.a": torch.zeros(1)}, "pytorch-lightning_version": "2.0"},
            "PyTorch Lightning",
        ),
    ],
)
def test_checkpoints_of_others_networks_are_told_by_name(tmp_path, call, content, whose):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(Exception, match=re.escape(whose)):
        load_checkpoint(tmp_path / "other.pth")


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    (tmp_path / "a.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(Exception, match="a Git LFS pointer.*git lfs pull"):
        load_checkpoint(tmp_path / "a.pth")


def test_class_weights_with_a_loss_that_takes_none_are_refused(fit, monkeypatch):
    monkeypatch.setitem(__import__("utils").LOSSES, "bce", torch.nn.BCEWithLogitsLoss())
    code, _, err = fit("run", "--class-weights", "2")
    assert code == 2 and "--class-weights: --loss bce takes no weights" in err
