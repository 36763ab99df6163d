"""Reading photos and masks of every kind."""

import contextlib
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from support import images
from support.errors import BadInput
from support.images import photo_size, read_photo
from support.mask_values import check_values
from support.masks import IGNORED, Labels, read_mask


def save(path, image, **options):
    """Write an image or an array; returns the path."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


# Photos


@pytest.mark.parametrize(
    "size, decoded, box",
    [
        ((160, 240), (240, 160), (0, 0, 239.75, 160)),  # an eighth: the last pixel is part filling
        ((161, 240), (480, 320), (0, 0, 479.5, 320)),
        ((641, 960), (1918, 1280), None),
    ],
)
def test_scaled_decoding_never_goes_below_the_target(tmp_path, size, decoded, box):
    path = save(tmp_path / "a.jpg", Image.new("RGB", (1918, 1280)))
    with images.open_image(path) as image:
        assert images.decode_scaled(image, size) == box and image.size == decoded


def test_a_jpeg_decoded_at_an_eighth_agrees_with_area_averaging(tmp_path):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    path = save(tmp_path / "a.jpg", smooth.resize((1918, 1280), Image.Resampling.BICUBIC))
    expected = np.asarray(Image.open(path).resize((240, 160), Image.Resampling.BOX), float)
    assert np.abs(read_photo(path, (160, 240)) - expected).mean() < 1


RED = Image.new("RGB", (40, 20), (200, 10, 10))


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("size", [None, (10, 10)])
@pytest.mark.parametrize(
    "name, image, options",
    [
        ("turned.jpg", RED, {"exif": exif(6)}),
        ("no_such_orientation.jpg", RED, {"exif": exif(9)}),
        ("cmyk.jpg", RED.convert("CMYK"), {}),
        ("alpha.png", RED.convert("RGBA"), {}),
        ("palette.gif", RED.convert("P", palette=Image.Palette.ADAPTIVE), {}),
        ("moves.gif", RED, {"save_all": True, "append_images": [Image.new("RGB", (40, 20))]}),
    ],
)
def test_photos_of_every_kind_become_upright_rgb_or_grey(tmp_path, name, image, options, size):
    path = save(tmp_path / name, image, **options)
    photo = read_photo(path, size)
    assert photo.dtype == np.uint8
    assert photo.shape == (*(size or ((40, 20) if name == "turned.jpg" else (20, 40))), 3)
    assert np.abs(photo.astype(int) - (200, 10, 10)).max() < 12
    assert read_photo(path, size, channels=1).shape == (*photo.shape[:2], 1)


def test_grey_of_16_bits_is_scaled_to_8(tmp_path):
    path = save(tmp_path / "deep.png", np.full((20, 40), 30000, np.uint16))
    assert (read_photo(path) == 116).all() and (read_photo(path, channels=1) == 116).all()


def test_arrays_are_grey_rgb_or_rgba(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    grey = rgb[..., 0]
    rgba = np.dstack([rgb, grey])
    assert np.array_equal(read_photo(rgb), rgb) and np.array_equal(read_photo(rgba), rgb)
    assert np.array_equal(read_photo(grey), np.dstack([grey] * 3))
    assert np.array_equal(read_photo(grey, channels=1)[..., 0], grey)
    path = save(tmp_path / "a.png", rgb)
    assert np.array_equal(read_photo(rgb[:, ::-1][:, ::-1], (7, 9)), read_photo(path, (7, 9)))
    assert photo_size(rgb) == photo_size(grey) == photo_size(rgba) == (20, 40)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("loaded", [False, True])
def test_an_image_is_turned_upright_and_stays_as_it_is(tmp_path, name, loaded):
    path = save(tmp_path / name, RED, exif=exif(6))
    with Image.open(path) as image:
        if loaded:
            image.load()
        size = image.size
        assert photo_size(image) == photo_size(path) == (40, 20)
        assert np.array_equal(read_photo(image), read_photo(path))
        if loaded or name != "a.tif":  # decoding turns a TIFF
            assert image.size == size
        assert image.convert("RGB").getpixel((0, 0))  # it is open still


def test_a_file_is_read_from_its_start_and_stays_open(tmp_path):
    path = save(tmp_path / "a.png", RED)
    with open(path, "rb") as file:
        file.read(5)
        for _ in range(2):
            assert np.array_equal(read_photo(file), read_photo(path))
        assert not file.closed


class Odd(io.BytesIO):
    name = "od\nd"


@pytest.mark.parametrize(
    "source, told",
    [
        (np.zeros((4, 6, 5), np.uint8), "the array (4, 6, 5) of uint8: not a photo: pass (H, W)"),
        (np.zeros((3, 4, 6), np.float32), "the array (3, 4, 6) of float32: not a photo: pass (H"),
        (np.zeros((0, 6), np.uint8), "the array (0, 6) of uint8: not a photo: pass (H, W)"),
        (np.array(None), "the array () of object: not a photo: pass (H, W)"),
        (b"", "these bytes: cannot be read as an image (not an image): check where"),
        (memoryview(b"text"), "these bytes: cannot be read as an image (not an image): check"),
        (io.BytesIO(b"text"), "the open file: cannot be read as an image (not an image): check"),
        (Odd(b"text"), "the open file od\\nd: cannot be read as an image (not an image): check"),
        (io.StringIO("text"), "the open file: not a photo: pass a path, bytes, a file opened with"),
        (Image.new("F", (6, 4)), "the image: floating-point pixels: save it with 8 bits"),
        (torch.zeros(3, 4, 6), "this Tensor: not a photo: pass a path, bytes, a file opened with"),
        (None, "this NoneType: not a photo: pass a path"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_is_no_photo_is_refused_in_a_line_that_can_be_printed(source, told):
    with pytest.raises(BadInput) as caught:
        read_photo(source, (2, 3))
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("place", [np.zeros((2, 2)), 7, b"a", ["a"], Image.new("L", (1, 1))])
def test_a_message_about_anything_can_be_printed(place):
    assert str(BadInput(place, "is odd", "mend it")).endswith(": is odd: mend it")


# Masks

WHITE, BLACK, RED_ENTRY, GREEN = [255] * 3, [0] * 3, [200, 0, 0], [0, 200, 0]
HALF = np.repeat(np.array([[0, 0, 1, 1]], np.uint8), 3, axis=0)  # what all these masks show
GREY = Image.fromarray(HALF * np.uint8(255))


def palette_image(indices, colours):
    image = Image.fromarray(np.array(indices, np.uint8), "P")
    image.putpalette(sum(colours, []))
    return image


@pytest.mark.parametrize(
    "image",
    [
        palette_image(HALF, [BLACK, WHITE]),
        palette_image(1 - HALF, [WHITE, BLACK]),
        palette_image(HALF, [BLACK, [1, 1, 1]]),
        palette_image(HALF, [RED_ENTRY, GREEN]),
        palette_image(HALF * 2, [BLACK, RED_ENTRY, WHITE]),
        palette_image(HALF * 255, [BLACK] * 255 + [RED_ENTRY]),
        Image.fromarray(HALF),
        GREY,
        Image.fromarray(HALF * np.uint8(128)),
        Image.fromarray(HALF * np.uint16(64000) + np.uint16(1000)),
        *(GREY.convert(mode) for mode in ("1", "LA", "RGB", "RGBA")),
        Image.merge("RGBA", [Image.new("L", (4, 3))] * 3 + [GREY]),
    ],
)
def test_masks_of_every_kind_become_0_and_255(tmp_path, image):
    mask = read_mask(save(tmp_path / "mask.png", image))
    assert mask.dtype == np.uint8 and (mask == 255 * HALF).all()


def test_a_mask_is_cut_at_127(tmp_path):
    levels = np.array([[0, 127, 128, 255]] + [[0, 0, 255, 255]] * 3, np.uint8)
    assert read_mask(save(tmp_path / "m.png", levels))[0].tolist() == [0, 0, 255, 255]


def test_a_mask_of_two_levels_may_cover_any_share(tmp_path):
    levels = np.full((10, 10), 128, np.uint8)
    levels[0] = 0
    assert (read_mask(save(tmp_path / "m.png", levels)) == 255).sum() == 90


@pytest.mark.parametrize("level", [0, 1])
def test_masks_may_be_empty_or_full(tmp_path, level):
    mask = np.full((4, 4), level, np.uint8)
    assert (read_mask(save(tmp_path / "m.png", mask)) == 255 * level).all()
    mask *= 255
    assert (read_mask(save(tmp_path / "m.gif", mask), (2, 2)) == mask[:2, :2]).all()


@pytest.mark.parametrize(
    "image",
    [
        palette_image([[0, 1, 2, 2]], [BLACK, RED_ENTRY, GREEN]),
        Image.new("RGB", (4, 4), (200, 30, 30)),
        Image.fromarray(np.arange(100, 164, dtype=np.uint8).reshape(8, 8)),
        Image.new("F", (4, 4)),
    ],
)
def test_a_picture_that_is_no_mask_is_refused(tmp_path, image):
    with pytest.raises(BadInput, match="mask.tif: has .* not a mask"):
        read_mask(save(tmp_path / "mask.tif", image))


def test_a_shrunk_mask_holds_the_objects_share_of_each_pixel(tmp_path):
    mask = (np.random.default_rng(0).random((64, 96)) < 0.5).astype(np.uint8)
    shrunk = read_mask(save(tmp_path / "m.png", mask), (16, 24))
    share = mask.reshape(16, 4, 24, 4).mean(axis=(1, 3))
    assert np.abs(shrunk - 255 * share).max() <= 1  # Pillow rounds between its two passes
    clear = np.abs(share - 0.5) > 0.03
    assert (Labels().objects(shrunk) == (share > 0.5))[clear].all()


# Masks of several values

PALETTE = [BLACK, GREEN, RED_ENTRY] + [[9, 9, i] for i in range(253)]
GREYS = [[min(40 * n, 120)] * 3 for n in range(256)]
STRIPES = np.repeat(np.array([[0, 1, 2, 3, 255]], np.uint8), 8, axis=0).repeat(8, axis=1)


@pytest.mark.parametrize("kind", ["L", "LA", "RGB", "RGBA", "I;16", "P"])
@pytest.mark.parametrize(
    "labels, expected",
    [
        (Labels(3, ignore=255), [0, 1, 2, 3, 255]),
        (Labels(2, values=(3, 2), ignore=0), [255, 0, 2, 1, 0]),
        (Labels(values=(1, 3)), [0, 255, 0, 255, 0]),
        (Labels(values=(1, 3), ignore=255), [0, 1, 0, 1, 255]),
    ],
)
def test_levels_and_palette_indices_are_classes(tmp_path, kind, labels, expected):
    image = Image.fromarray(STRIPES.astype(np.uint16) if kind == "I;16" else STRIPES)
    image = palette_image(STRIPES, PALETTE) if kind == "P" else image.convert(kind)
    mask = read_mask(save(tmp_path / "m.png", image), labels=labels)
    assert mask.dtype == np.uint8 and (mask == np.repeat(expected, 8)).all()


def test_a_grey_palette_counts_by_its_levels(tmp_path):
    path = save(tmp_path / "m.png", palette_image(STRIPES, GREYS))
    mask = read_mask(path, labels=Labels(2, (80, 40), 120))
    assert (mask == np.repeat([0, 2, 1, 255, 255], 8)).all()


@pytest.mark.parametrize("level", [0, 255])
def test_a_mask_of_one_level_is_that_level_unless_its_alpha_varies(tmp_path, level):
    image = Image.new("RGBA", (8, 8), (level, level, level, 255))
    assert (read_mask(save(tmp_path / "m.png", image)) == level).all()
    image.paste((level, level, level, 0), (4, 0, 8, 8))
    assert (read_mask(save(tmp_path / "m.png", image)) == np.repeat([255, 0], 4)).all()


@pytest.mark.parametrize(
    "levels, expected",
    [([0, 1, 9], [0, 1, IGNORED]), ([0, 8, 9], [0, 0, IGNORED]), ([9, 99, 150], [IGNORED, 0, 1])],
)
def test_pixels_to_ignore_are_as_if_not_there(tmp_path, levels, expected):
    path = save(tmp_path / "m.png", np.array([levels] * 3, np.uint8))
    assert (read_mask(path, labels=Labels(ignore=9)) == expected).all()


def test_the_class_of_the_largest_share_wins_the_lowest_of_equal_ones(tmp_path):
    values = np.array([0, 1, 2, 255], np.uint8)
    mask = values[np.random.default_rng(0).integers(0, 4, (64, 96))]
    shrunk = read_mask(save(tmp_path / "m.png", mask), (8, 12), Labels(2, ignore=255))
    shares = [(mask == value).reshape(8, 8, 12, 8).sum(axis=(1, 3)) for value in values]
    assert (shrunk == values[np.argmax(shares, axis=0)]).all()


@pytest.mark.parametrize(
    "image, reason, remedy",
    [
        (STRIPES, "holds 3 .64 pixels., above --classes 2", "--ignore 3"),
        (Image.new("RGB", (4, 4), (9, 9, 10)), "has colours", "palette or grey image"),
    ],
)
def test_values_that_are_no_classes_are_refused(tmp_path, image, reason, remedy):
    with pytest.raises(BadInput, match=f"{reason}.*{remedy}"):
        read_mask(save(tmp_path / "m.png", image), labels=Labels(2))


def areas(*values, border=None):
    """A mask of 0 on which each value fills a circle."""
    image = Image.new("L", (96 * len(values), 96))
    for number, value in enumerate(values):
        ImageDraw.Draw(image).ellipse((96 * number + 9, 9, 96 * number + 59, 59), value, border)
    return image


def check(folder, images, suffix="png", **options):
    """Read masks as plain ones, then check their values, as a training does."""
    counts = []
    for number, image in enumerate(images):
        path = save(folder / f"{number}.{suffix}", image, **options)
        with contextlib.suppress(BadInput):
            read_mask(path, (16, 16), counts=counts)
    check_values(counts, Labels(), folder)


@pytest.mark.parametrize(
    "images, found, flags",
    [
        ([STRIPES], r"0 \(20.0 %\), 1 .*, 2 .*, 3 .*, 255 \(20.0 %\)", "3 --ignore 255"),
        ([areas(*range(12, 250, 12))], r"0 .*, 180 .*, \.\.\.", "20 --mask-value 12 .* 240"),
        ([palette_image(STRIPES, GREYS)], "0 .*, 40 .*, 80 .*, 120 ", "3 --mask-value 40 80 120"),
        ([areas(1, border=255), areas(1)], "0 .*, 1 .*, 255 ", "1 --ignore 255"),
        ([palette_image(STRIPES, PALETTE)], "0 .*, 2 .*, 255", "3 --ignore 255"),
        ([areas(0), areas(38)], "0 .*, 38 ", "1 --mask-value 38"),
        ([areas(128), areas(255)], "0 .*, 128 .*, 255 ", "2 --mask-value 128 255"),
    ],
)
def test_masks_that_hold_classes_are_refused_with_their_values(tmp_path, images, found, flags):
    with pytest.raises(BadInput, match=f"values {found}.*--classes {flags}, or .*--ignore V"):
        check(tmp_path, images)


@pytest.mark.parametrize(
    "images",
    [
        [areas(1), areas(255), areas(0)],
        [areas(255, 255).reduce(factor) for factor in (2, 3, 4, 8)] + [areas(1)],
        [areas(255).reduce(2).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)],
        [palette_image(np.asarray(areas(2)), [BLACK, RED_ENTRY, WHITE])],
    ],
)
def test_edges_between_black_and_white_are_no_classes(tmp_path, images):
    check(tmp_path, images)


def test_noise_of_jpeg_is_no_classes(tmp_path):
    images = [Image.new("L", (64, 64)) for _ in range(16)]
    for n, image in enumerate(images):
        ImageDraw.Draw(image).rectangle((n % 3 * 8 + 8,) * 2 + (n % 3 * 8 + 13 + n,) * 2, 255)
    check(tmp_path, images, "jpg", quality=40)
    for quality in (29, 33):
        check(tmp_path, images, "jpg", quality=quality)
        check(tmp_path, [Image.open(tmp_path / f"{n}.jpg") for n in range(16)])
