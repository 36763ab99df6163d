"""data/draw_demo.py: the drawn photos and masks."""

import numpy as np
import pytest
from PIL import Image

from data import draw_demo
from dataset import car_id
from support.pairs import find_pairs, read_pair
from tools.check_data import find_shift


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The first car, for training, and the last one, for validation."""
    folder = tmp_path_factory.mktemp("demo")
    for number in (0, draw_demo.CARS - 1):
        draw_demo.draw_car((number, folder))
    return folder


@pytest.mark.parametrize("side", ["train", "val"])
def test_names_formats_and_masks_are_as_the_challenges(demo, side):
    pairs = find_pairs(demo / f"{side}_images", demo / f"{side}_masks")
    assert len(pairs) == draw_demo.VIEWS and len({car_id(pair.name) for pair in pairs}) == 1
    with Image.open(pairs[0].photo) as photo, Image.open(pairs[0].mask) as mask:
        assert (photo.format, photo.size, mask.format) == ("JPEG", (480, 320), "GIF")
    for photo, mask in (read_pair(pair, (160, 240)) for pair in pairs):
        assert 0.06 < mask.mean() / 255 < 0.45
        assert not mask[:5].any() and not mask[-2:].any(), "the car is cut off"
        assert find_shift(photo, mask) is None
        moved = np.roll(mask, (6, 24), axis=(0, 1))
        assert find_shift(photo, moved) == pytest.approx((-24 / 240, -6 / 240), abs=0.01)


def test_a_car_is_the_same_each_time(demo, tmp_path):
    draw_demo.draw_car((0, tmp_path))
    again = {path.name: path.read_bytes() for path in tmp_path.glob("*/*")}
    assert len(again) == 2 * draw_demo.VIEWS
    assert again == {path.name: path.read_bytes() for path in demo.glob("train_*/*")}
