"""Scores of classes where some or all of them are absent."""

import pytest
import torch

from support.scores import class_scores, without_ignored

NAMES = ("a", "b")


def scores(predicted, true, pixels=100.0, both=(0, 0)):
    predicted, true, both = (torch.tensor(n, dtype=torch.float64) for n in (predicted, true, both))
    return class_scores(both, predicted + true, true, pixels, NAMES)


@pytest.mark.parametrize("pixels", [100.0, 0.0])
def test_finding_nothing_where_there_is_nothing_is_perfect(pixels):
    assert scores((0, 0), (0, 0), pixels) == {"dice": 1, "iou": 1, "constant": 0}


def test_what_is_found_where_there_is_nothing_counts():
    found = scores((0, 5), (0, 0))
    assert found == {"dice": 0, "iou": 0, "constant": 0, "dice b": 0, "iou b": 0}


def test_an_absent_class_is_left_out_of_the_means():
    found = scores((0, 60), (0, 40), both=(0, 30))
    assert found == pytest.approx(
        {"dice": 0.6, "iou": 3 / 7, "constant": 80 / 140, "dice b": 0.6, "iou b": 3 / 7}
    )


def test_ignored_pixels_become_certain_background():
    logits, masks = without_ignored(torch.full((1, 2, 3, 3), 9.0), -torch.ones(1, 2, 3, 3))
    assert (logits == -100).all() and not masks.any()
