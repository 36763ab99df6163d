"""Advice on runs from which little can be learned."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import train
from support import advice
from support.masks import Labels
from support.pairs import Pair


@pytest.mark.parametrize(
    "channels, told", [(3, "try --pretrained, and --augment strong"), (1, "try --augment strong")]
)
def test_grey_runs_are_not_sent_to_weights_for_colour_photos(tmp_path, channels, told):
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    pairs = [Pair("a", "", tmp_path / "a.png")]
    settings = train.Settings(in_channels=channels)
    lines = advice.at_start(settings, False, pairs, pairs)
    assert f"Only 1 photos to train on: {told}" in lines


def test_no_opencv_in_threads_before_data_workers_start():
    """Its locks, taken in threads, may stay taken in workers that are forked."""
    for name in ("advice", "cache", "images", "mask_values", "masks", "pairs", "scores"):
        assert "cv2" not in (ROOT / "support" / f"{name}.py").read_text(), name


def test_small_objects_and_lost_detail_are_measured(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[::2, ::8] = 255  # lines of single pixels, which an eighth of the size cannot hold
    Image.fromarray(mask).save(tmp_path / "fine.png")
    pairs = [Pair("fine", "", tmp_path / "fine.png")]
    assert advice.mask_facts(pairs, None, Labels()) == [1 / 16, 1]
    assert advice.mask_facts(pairs, (64, 64), Labels()) == [1 / 16, 1]
    assert advice.mask_facts(pairs, (8, 8), Labels()) == [1 / 16, 0]
    assert advice.mask_facts(pairs, (8, 8), Labels(2, (1, 255))) == [1 / 16, 0]
