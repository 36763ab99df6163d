import numpy as np
import pytest
import torch

from losses import LOSSES


def numpy_losses(logits, masks):
    """The losses of each photo in float64, straight from their definitions."""
    rows = []
    for z, m in zip(logits.double().numpy(), masks.double().numpy(), strict=True):
        p = 1 / (1 + np.exp(-z))
        both, total = (p * m).sum(), p.sum() + m.sum()
        bce = -(m * np.log(p) + (1 - m) * np.log1p(-p)).mean()
        dice = 1 - (2 * both + 1) / (total + 1)
        rows.append((bce, dice, 1 - (both + 1) / (total - both + 1), bce + dice))
    return dict(zip(("bce", "dice", "iou", "bce-dice"), np.array(rows).T, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_agree_with_their_definitions(name):
    torch.manual_seed(0)
    logits, masks = torch.randn(5, 1, 20, 30) * 3, (torch.rand(5, 1, 20, 30) < 0.3).float()
    masks[0] = 0
    got = LOSSES[name](logits, masks)
    assert got.shape == (5,)
    assert got.numpy() == pytest.approx(numpy_losses(logits, masks)[name], abs=1e-5)


def test_bce_is_pytorchs_own():
    logits, masks = torch.randn(4, 1, 8, 8), (torch.rand(4, 1, 8, 8) < 0.5).float()
    assert LOSSES["bce"](logits, masks).mean() == pytest.approx(
        torch.nn.BCEWithLogitsLoss()(logits, masks).item(), abs=1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_small_where_the_logits_are_right_and_large_where_wrong(name):
    masks = torch.zeros(2, 1, 16, 16)
    masks[1, :, 4:12] = 1  # the first stays empty
    right = (masks - 0.5) * 40
    assert LOSSES[name](right, masks).max() < 1e-5
    assert LOSSES[name](-right, masks).min() > 0.9


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_losses_and_gradients_are_finite_for_huge_half_precision_logits_and_empty_masks(
    name, dtype
):
    logits = torch.tensor([-6e4, -30, 0, 30, 6e4]).to(dtype).view(1, 1, 1, 5).repeat(3, 1, 1, 1)
    logits.requires_grad_()
    masks = torch.stack([torch.zeros(1, 1, 5), torch.ones(1, 1, 5), torch.ones(1, 1, 5)])
    masks[2, ..., :2] = 0
    loss = LOSSES[name](logits, masks)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    loss.mean().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_can_be_learned_from(name):
    torch.manual_seed(0)
    masks = (torch.rand(2, 1, 8, 8) < 0.4).float()
    logits = torch.zeros(2, 1, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        LOSSES[name](logits, masks).mean().backward()
        optimizer.step()
    assert ((logits > 0) == (masks > 0.5)).all()
