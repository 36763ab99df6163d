import os
import pickle
import platform
import subprocess
import sys
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from files import BadInput
from model import UNet
from utils import (
    build_model,
    check_accuracy,
    draw_panel,
    load_checkpoint,
    save_checkpoint,
    save_predictions_as_imgs,
    save_weights,
    score_batch,
)

CPU = torch.device("cpu")


def loader_of(logits, masks, batch_size=16):
    """A loader for a network that does nothing, so that the images are the logits."""
    return DataLoader(TensorDataset(logits, masks), batch_size)


def numpy_scores(logits, masks):
    """The four means in float64, image by image, straight from their definitions."""
    rows = []
    for z, m in zip(logits.double().numpy(), masks.double().numpy(), strict=True):
        p = 1 / (1 + np.exp(-z))
        loss = -(m * np.log(p) + (1 - m) * np.log1p(-p)).mean()
        a, b = z > 0, m > 0.5
        dice = 2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else 1.0
        iou = (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0
        rows.append((loss, (a == b).mean(), dice, iou))
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("kind", ["random", "empty", "full", "empty but predicted"])
def test_check_accuracy_agrees_with_numpy(kind, batch_size):
    torch.manual_seed(0)
    logits = torch.randn(17, 1, 20, 30) * 4
    masks = (torch.rand(17, 1, 20, 30) < 0.3).float()
    masks[:3], logits[:2] = 0, -5  # among them empty ones, predicted empty and not
    if kind != "random":
        masks[:] = kind == "full"
        logits = logits.abs() if kind != "empty" else -logits.abs()
    means = check_accuracy(loader_of(logits, masks, batch_size), nn.Identity(), CPU)
    got = [means[name] for name in ("loss", "accuracy", "dice", "iou")]
    assert np.abs(np.array(got) - numpy_scores(logits, masks)).max() < 1e-6


def test_check_accuracy_prints_the_two_classic_lines_once(capsys):
    # Two photos of four pixels. The first: two of three predicted pixels hit, one is missed not at
    # all: Dice 2*2/(3+2) = 0.8. The second is right.
    logits = torch.tensor([[[[1.0, 1.0], [1.0, -1.0]]], [[[-1.0, 1.0], [-1.0, -1.0]]]])
    masks = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[0.0, 1.0], [0.0, 0.0]]]])
    means = check_accuracy(loader_of(logits, masks), nn.Identity(), "cpu")
    assert capsys.readouterr().out == "Got 7/8 with acc 87.50\nDice score: 0.90000\n"
    assert means["accuracy"] == 0.875 and means["dice"] == pytest.approx(0.9)
    assert means["iou"] == pytest.approx((2 / 3 + 1) / 2)


def test_the_scores_of_a_network_do_not_depend_on_the_batch_size(float32):
    torch.manual_seed(0)
    model = UNet(features=(4, 8))
    images, masks = torch.rand(7, 3, 16, 24), (torch.rand(7, 1, 16, 24) < 0.5).float()
    results = [
        check_accuracy(DataLoader(TensorDataset(images, masks), size), model, CPU)
        for size in (1, 3, 16)
    ]
    for name in results[0]:
        assert np.ptp([result[name] for result in results]) < 1e-6
    assert model.training, "the model is left in the mode it was in"


def test_a_pixel_counts_where_its_probability_is_above_the_threshold():
    logits = torch.tensor([0.31, 0.29, 0.9, 0.0]).logit().reshape(1, 1, 2, 2)
    masks = torch.ones(1, 1, 2, 2)
    assert score_batch(logits, masks, 0.3)["correct"].item() == 2
    assert score_batch(logits, masks, 0.5)["correct"].item() == 1


def test_logits_are_brought_to_the_size_of_the_masks():
    logits = torch.full((1, 1, 4, 6), 3.0)
    assert score_batch(logits, torch.ones(1, 1, 41, 59))["dice"].item() == 1


# Checkpoints


def checkpoint_of(model):
    return {"state_dict": model.state_dict(), "optimizer": {}}


def test_a_classic_checkpoint_says_what_it_does_not_say(tmp_path):
    model = UNet(in_channels=1, features=(4, 8))
    save_checkpoint(checkpoint_of(model), tmp_path / "classic.pth.tar")
    checkpoint = load_checkpoint(tmp_path / "classic.pth.tar")
    assert checkpoint["model"] == {"in_channels": 1, "out_channels": 1, "features": [4, 8]}
    assert checkpoint["image_size"] == [160, 240] and checkpoint["threshold"] == 0.5
    assert checkpoint["normalization"] == {"mean": 0.0, "std": 1.0, "max_pixel_value": 255.0}
    x = torch.rand(1, 1, 16, 16)
    loaded = build_model(checkpoint, "classic.pth.tar", CPU)
    assert torch.allclose(loaded(x), model.eval()(x), atol=1e-6)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(checkpoint_of(UNet(features=(4, 8))), "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bare pickle").write_bytes(pickle.dumps(RunsCode()))
    torch.save({"state_dict": RunsCode()}, "code")
    torch.save([1, 2], "list")
    torch.save({"state_dict": OrderedDict(weight=torch.ones(1))}, "other network")
    state = UNet(features=(4, 8)).state_dict()
    del state["bottleneck.conv.0.weight"]
    torch.save({"state_dict": state}, "key missing")
    for name, reason in {
        "cut": "cut off",
        "text": "no checkpoint",
        "empty": "no checkpoint",
        "folder": "cannot be read",
        "bare pickle": "no checkpoint",
        "code": "could run code",
        "list": "no state_dict",
        "other network": "expected tensors such as downs.0.conv.0.weight.*found weight",
        "key missing": "do not fit the network.*bottleneck.conv.0.weight",
        "nowhere": "no such checkpoint.*python train.py",
    }.items():
        with pytest.raises(BadInput, match=f"{name}: .*{reason}") as problem:
            build_model(load_checkpoint(name), name, CPU)
        assert len(str(problem.value).splitlines()) == 1
    assert not os.path.exists("hacked")


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "checkpoint"
    save_checkpoint(checkpoint_of(UNet(features=(4, 8))), path)
    before = path.read_bytes()
    script = (
        "import resource, sys, torch\n"
        "from dataset import BadInput\n"
        "from utils import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    save_checkpoint({'state_dict': {'w': torch.rand(1_000_000)}}, sys.argv[1])\n"
        "except BadInput as problem:\n"
        "    sys.exit(str(problem))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "cannot be written" in done.stderr, done.stderr
    assert str(path) in done.stderr and "Traceback" not in done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint"]


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    script = (
        "import sys, torch\n"
        "from utils import save_checkpoint\n"
        "state = {'w': torch.rand(4_000_000)}\n"
        "while True:\n"
        "    save_checkpoint({'state_dict': state}, sys.argv[1])\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, path], cwd=ROOT)
    while not path.exists():
        assert writer.poll() is None
        time.sleep(0.05)
    for moment in (0.03, 0.01, 0.05, 0.02):
        time.sleep(moment)
        assert len(torch.load(path, weights_only=True)["state_dict"]["w"]) == 4_000_000
    writer.kill()
    writer.wait()
    assert len(torch.load(path, weights_only=True)["state_dict"]["w"]) == 4_000_000


# Pictures


def test_predictions_are_saved_as_grids_and_panels(tmp_path):
    torch.manual_seed(0)
    images, masks = torch.rand(5, 3, 16, 24), (torch.rand(5, 1, 16, 24) < 0.5).float()
    loader = DataLoader(TensorDataset(images, masks), 3)
    save_predictions_as_imgs(loader, UNet(features=(4,)), tmp_path / "new", "cpu")
    found = sorted(path.name for path in (tmp_path / "new").iterdir())
    panels = [f"panel_{i}.png" for i in range(5)]
    assert found == sorted(["gt_0.png", "gt_1.png", "pred_0.png", "pred_1.png", *panels])
    grid = np.asarray(Image.open(tmp_path / "new" / "gt_0.png").convert("L"))
    assert (grid[2:18, 2:26] == masks[0, 0].numpy() * 255).all()


def test_a_panel_shows_missed_pixels_red_and_those_too_many_blue():
    mask, logits = torch.zeros(1, 40, 60), torch.full((1, 40, 60), -3.0)
    mask[:, :, :20] = 1  # missed
    logits[:, :, 40:] = 3  # too many
    panel = np.asarray(draw_panel("car", torch.full((3, 40, 60), 0.5), mask, logits))[-40:]
    photo, true, predicted, differ = (panel[:, i * 60 : (i + 1) * 60] for i in range(4))
    assert (photo == 127).all()
    assert (true[:, :20] == 255).all() and (true[:, 20:] == 0).all()
    assert (predicted[:, 40:] == 255).all() and (predicted[:, :40] == 0).all()
    assert (differ[:, :20] == (230, 60, 50)).all() and (differ[:, 40:] == (60, 130, 255)).all()
    assert (differ[:, 20:40] == 63).all()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    script = """
import resource, torch, utils

utils.set_up(torch.device("cpu"))
for _ in range(5):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2**14, "fewer pages were mapped anew than a single tensor has"


def test_weights_to_pass_on_are_small_and_score_the_same(tmp_path, float32):
    model = UNet(features=(8, 16)).eval()
    model.downs[0].conv[1].running_var[:] = 1e-9  # which float16 would make 0
    state = {"state_dict": model.state_dict(), "optimizer": {"big": torch.zeros(10**5)}}
    state |= {"image_size": [64, 96], "threshold": 0.4}
    save_checkpoint(state, tmp_path / "checkpoint")
    save_weights(tmp_path / "checkpoint", tmp_path / "weights.pth")
    sizes = [(tmp_path / name).stat().st_size for name in ("weights.pth", "checkpoint")]
    assert sizes[0] < 0.2 * sizes[1]
    loaded = load_checkpoint(tmp_path / "weights.pth")
    assert loaded["image_size"] == [64, 96] and loaded["threshold"] == 0.4
    assert loaded["model"] == {"in_channels": 3, "out_channels": 1, "features": [8, 16]}
    assert (loaded["state_dict"]["downs.0.conv.1.running_var"] == 1e-9).all()
    same = build_model(loaded, "weights.pth", CPU)
    images = torch.rand(1, 3, 32, 48)
    with torch.inference_mode():
        assert torch.allclose(same(images), model(images), atol=0.02)
