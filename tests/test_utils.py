import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from model import UNet
from utils import check_accuracy, draw_panel, save_predictions_as_imgs, score_batch

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
    assert int(done.stdout) < 4 * 2**14, "fewer pages were mapped anew than four tensors have"
