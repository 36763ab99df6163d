"""Device, losses, scores and pictures."""

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

import utils
from model import UNet
from utils import LOSSES, check_accuracy, panel_of, save_predictions_as_imgs, score_batch


def test_a_device_may_be_named_or_found_or_given():
    assert utils.pick_device("cpu") == utils.pick_device(torch.device("cpu")) == torch.device("cpu")
    assert utils.pick_device().type in ("cuda", "mps", "cpu")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    script = """
import resource, torch, utils

utils.pick_device("cpu")
for _ in range(5):
    torch.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**22)  # 16 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 10 * 2**12, "fewer pages were mapped anew than ten tensors have"


# Losses


def numpy_losses(logits, masks):
    """The losses of each photo in float64, straight from their definitions."""
    rows = []
    for z, m in zip(logits.double().numpy(), masks.double().numpy(), strict=True):
        p = 1 / (1 + np.exp(-z))
        both, total = (p * m).sum(), p.sum() + m.sum()
        bce = -(m * np.log(p) + (1 - m) * np.log1p(-p)).mean()
        dice = 1 - (2 * both + 1) / (total + 1)
        rows.append((bce, bce + dice))
    return dict(zip(("bce", "bce-dice"), np.array(rows).T, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_agree_with_their_definitions(name):
    torch.manual_seed(0)
    logits, masks = torch.randn(5, 1, 20, 30) * 3, (torch.rand(5, 1, 20, 30) < 0.3).float()
    masks[0] = 0
    got = LOSSES[name](logits, masks)
    assert got.shape == (5,) and got.dtype == torch.float32
    assert got.numpy() == pytest.approx(numpy_losses(logits, masks)[name], abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_losses_and_gradients_are_finite_for_huge_logits_and_empty_masks(name, dtype):
    logits = torch.tensor([-6e4, -30, 0, 30, 6e4]).to(dtype).view(1, 1, 1, 5).repeat(3, 1, 1, 1)
    logits.requires_grad_()
    masks = torch.tensor([[0.0] * 5, [1] * 5, [0, 0, 1, 1, 1]]).view(3, 1, 1, 5)
    loss = LOSSES[name](logits, masks)
    loss.mean().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and logits.grad.isfinite().all()


# Scores


def loader_of(images, masks, batch_size=16):
    return DataLoader(TensorDataset(images, masks), batch_size)


def numpy_scores(logits, masks):
    """The means of loss, accuracy, Dice and IoU in float64, straight from their definitions."""
    rows = []
    for z, m in zip(logits.double().numpy(), masks.numpy() > 0.5, strict=True):
        loss = np.where(m, np.log1p(np.exp(-z)), np.log1p(np.exp(z))).mean()
        both, either, total = (z > 0) & m, (z > 0) | m, (z > 0).sum() + m.sum()
        dice, iou = (2 * both.sum() / total, both.sum() / either.sum()) if total else (1, 1)
        rows.append((loss, ((z > 0) == m).mean(), dice, iou))
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
    # The network does nothing, so that the images are the logits.
    means = check_accuracy(loader_of(logits, masks, batch_size), nn.Identity(), "cpu")
    got = [means[name] for name in ("loss", "accuracy", "dice", "iou")]
    assert np.abs(np.array(got) - numpy_scores(logits, masks)).max() < 1e-6


def test_check_accuracy_prints_the_two_classic_lines_once(capsys):
    # Two photos of four pixels. The first: of three predicted pixels two are right, and none is
    # missed: Dice 2*2/(3+2) = 0.8. The second is right.
    logits = torch.tensor([[[[1.0, 1.0], [1.0, -1.0]]], [[[-1.0, 1.0], [-1.0, -1.0]]]])
    masks = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[0.0, 1.0], [0.0, 0.0]]]])
    means = check_accuracy(loader_of(logits, masks), nn.Identity(), "cpu")
    assert capsys.readouterr().out == "Got 7/8 with acc 87.50\nDice score: 0.90000\n"
    expected = {"accuracy": 7 / 8, "dice": 0.9, "iou": (2 / 3 + 1) / 2}
    expected["constant"] = (2 * 2 / (4 + 2) + 2 * 1 / (4 + 1)) / 2  # if all were marked
    assert means == pytest.approx(expected | {"loss": means["loss"]})


@pytest.mark.parametrize("threshold, count", [(0, 5), (0.3, 4), (0.5, 2), (0.9, 1), (1, 0)])
def test_a_pixel_counts_where_its_probability_is_above_the_threshold(threshold, count):
    logits = torch.tensor([0.01, 0.31, 0.5, 0.85, 0.95]).logit().reshape(1, 1, 1, 5)
    assert score_batch(logits, torch.ones(1, 1, 1, 5), threshold)["correct"].item() == count


def test_logits_are_brought_to_the_size_of_the_masks():
    logits = torch.full((1, 1, 4, 6), 3.0)
    assert score_batch(logits, torch.ones(1, 1, 41, 59))["dice"].item() == 1


def test_predictions_are_saved_as_grids_and_panels(tmp_path):
    torch.manual_seed(0)
    images, masks = torch.rand(5, 3, 16, 24), (torch.rand(5, 1, 16, 24) < 0.5).float()
    model = UNet(features=(4,))
    save_predictions_as_imgs(loader_of(images, masks, 3), model, tmp_path / "n", "cpu")
    assert model.training, "the model is left in the mode it was in"
    grids, panels = ("gt_0", "gt_1", "pred_0", "pred_1"), (f"panel_{i}" for i in range(5))
    assert {path.stem for path in (tmp_path / "n").iterdir()} == {*grids, *panels}
    grid = np.asarray(Image.open(tmp_path / "n" / "gt_0.png").convert("L"))
    assert (grid[2:18, 2:26] == masks[0, 0].numpy() * 255).all()


@pytest.mark.parametrize("channels, mean", [(3, 0.0), (1, 0.0), (3, [0.1, 0.1, 0.1])])
def test_a_panel_shows_missed_pixels_red_and_those_too_many_blue(channels, mean):
    mask, logits = torch.zeros(1, 40, 60), torch.full((1, 40, 60), -3.0)
    mask[:, :, :20] = 1  # missed
    logits[:, :, 40:] = 3  # too many
    scale = {"mean": mean, "std": 1.0, "max_pixel_value": 255.0}
    image = torch.full((channels, 40, 60), 0.5 - np.max(mean))
    panel = np.asarray(panel_of("car", image, mask, logits, 0.5, scale))[-40:]
    photo, true, predicted, differ = (panel[:, i * 60 : (i + 1) * 60] for i in range(4))
    assert (photo == 127).all()
    assert (true[:, :20] == 255).all() and (true[:, 20:] == 0).all()
    assert (predicted[:, 40:] == 255).all() and (predicted[:, :40] == 0).all()
    assert (differ[:, :20] == (230, 60, 50)).all() and (differ[:, 40:] == (60, 130, 255)).all()
    assert (differ[:, 20:40] == 63).all()
