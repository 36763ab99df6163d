"""data/draw_demo.py: drawn photos and masks."""

import pytest
from PIL import Image

from data import draw_demo
from dataset import car_id
from support.masks import read_mask
from support.pairs import find_pairs


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with the first car, for training, and the last, for validation."""
    folder = tmp_path_factory.mktemp("demo")
    for number in (0, draw_demo.CARS - 1):
        draw_demo.draw_car(number, folder)
    return folder


@pytest.mark.parametrize("side", ["train", "val"])
def test_names_formats_and_masks_are_like_the_challenges(demo, side):
    pairs = find_pairs(demo / f"{side}_images", demo / f"{side}_masks")
    assert len(pairs) == draw_demo.VIEWS and len({car_id(pair.name) for pair in pairs}) == 1
    with Image.open(pairs[0].photo) as photo, Image.open(pairs[0].mask) as mask:
        assert (photo.format, photo.size, mask.format) == ("JPEG", (480, 320), "GIF")
    for mask in (read_mask(pair.mask, (160, 240)) for pair in pairs):
        assert 0.06 < mask.mean() / 255 < 0.45
        assert not mask[:5].any() and not mask[-2:].any(), "the car is cut off"


def test_a_car_looks_the_same_each_time_it_is_drawn(demo, tmp_path):
    draw_demo.draw_car(0, tmp_path)
    again = {path.name: path.read_bytes() for path in tmp_path.glob("*/*")}
    assert len(again) == 2 * draw_demo.VIEWS
    assert again == {path.name: path.read_bytes() for path in demo.glob("train_*/*")}
