import numpy as np
import pytest
from PIL import Image

from support.pictures import EDGE, cut_out, grey, in_front_of, opacity, overlay, save_mask
from support.scores import logit

PHOTO = Image.fromarray(np.full((2, 4, 3), (200, 100, 50), np.uint8))
LOGITS = np.array([[-20, -1, 0, 20]] * 2, np.float32)


def test_a_cut_out_keeps_its_colours_and_has_a_soft_edge():
    cutout = cut_out(PHOTO, LOGITS, 0.5)
    assert cutout.mode == "RGBA" and (np.asarray(cutout)[..., :3] == (200, 100, 50)).all()
    low, below, middle, high = np.asarray(cutout)[0, :, 3]
    assert (low, high) == (0, 255) and 0 < below < middle and middle in (127, 128)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_an_edge_is_half_opaque_at_the_threshold_and_ends_near_it(threshold):
    steps = np.array([[0, logit(EDGE) - 0.01, -logit(EDGE) + 0.01]]) + logit(threshold)
    middle, low, high = np.asarray(opacity(steps.astype(np.float32), threshold))[0]
    assert middle in (127, 128) and (low, high) == (0, 255)


def test_another_background_shows_where_the_object_is_not_whatever_its_size():
    background = Image.new("RGB", (30, 10), (0, 0, 255))
    picture = np.asarray(in_front_of(background, PHOTO, LOGITS, 0.5))
    assert picture.shape == (2, 4, 3)
    assert picture[0, 0].tolist() == [0, 0, 255] and picture[0, 3].tolist() == [200, 100, 50]


def test_an_overlay_changes_only_what_the_mask_covers():
    picture = np.asarray(overlay(PHOTO, np.array([[0, 0, 255, 255]] * 2, np.uint8)))
    assert (picture[:, :2] == (200, 100, 50)).all() and (picture[:, 2:] != (200, 100, 50)).any()


@pytest.mark.parametrize("bits, most", [(8, 255), (16, 65535)])
def test_probabilities_come_as_grey_levels(bits, most):
    before = LOGITS.copy()
    levels = np.asarray(grey(LOGITS, bits))[0] / most
    assert np.allclose(levels, 1 / (1 + np.exp(-LOGITS[0])), atol=0.6 / most)
    assert (before == LOGITS).all()


def test_a_mask_is_written_as_it_is(tmp_path):
    mask = (np.random.default_rng(0).random((37, 53)) > 0.5) * np.uint8(255)
    save_mask(mask, tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.mode == "L" and np.array_equal(np.asarray(picture), mask)
