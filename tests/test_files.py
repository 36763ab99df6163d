import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import draw_pair
from PIL import Image

import files
from files import BadInput, find_pairs, read_mask, read_pair, read_photo, write_aside


def save(path, array_or_image, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array_or_image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **kwargs)
    return path


def photo_and_mask(size=(8, 6)):
    return draw_pair(np.random.default_rng(0), size)


# Pairs


def test_masks_are_found_by_all_the_promised_names(tmp_path):
    photo, mask = photo_and_mask()
    for name in ("a.jpg", "b.JPG", "c.png", "D.jpeg", "e f.jpg", "ü'\".jpg"):
        save(tmp_path / "images" / name, photo)
    for name in ("a_mask.gif", "B_MASK.GIF", "c.png", "d_mask.png", "e f.bmp", "ü'\"_mask.tif"):
        save(tmp_path / "masks" / name, mask)
    (tmp_path / "images" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "masks" / "notes.txt").write_text("not an image")
    (tmp_path / "images" / "manual.pdf").write_text("not an image")
    (tmp_path / "images" / "clip.mpg").write_text("not an image")

    pairs = find_pairs(tmp_path / "images", tmp_path / "masks")

    assert sorted(pair.name for pair in pairs) == ["D", "a", "b", "c", "e f", "ü'\""]


def test_photos_and_masks_may_share_a_folder(tmp_path):
    photo, mask = photo_and_mask()
    save(tmp_path / "a.jpg", photo)
    save(tmp_path / "a_mask.gif", mask)
    assert [pair.name for pair in find_pairs(tmp_path, tmp_path)] == ["a"]


def test_files_without_partner_are_all_listed_capped_at_ten_and_counted(data):
    for path in sorted((data / "train_masks").iterdir())[:7]:
        path.unlink()
    for i in range(6):
        save(data / "train_masks" / f"extra{i}.png", photo_and_mask()[1])
    with pytest.raises(BadInput) as problem:
        find_pairs(data / "train_images", data / "train_masks")
    message = str(problem.value)
    assert "(13)" in message and "... and 3 more" in message and len(message.splitlines()) == 12
    assert "no mask" in message and "extra0.png: no photo" in message


def test_two_masks_for_a_photo_are_refused(data):
    path = next((data / "train_masks").iterdir())
    save(path.with_suffix(".png"), photo_and_mask((72, 48))[1])
    with pytest.raises(BadInput, match="one photo and one mask were expected"):
        find_pairs(data / "train_images", data / "train_masks")


def test_a_mask_of_another_size_than_its_photo_is_refused(data):
    path = next((data / "train_masks").iterdir())
    save(path, np.zeros((10, 20), np.uint8))
    with pytest.raises(BadInput, match="72x48, but its mask .* is 20x10"):
        find_pairs(data / "train_images", data / "train_masks")


def test_swapped_folders_are_recognized(data):
    with pytest.raises(BadInput, match="swap the two folders"):
        find_pairs(data / "train_masks", data / "train_images")


def test_swapped_folders_with_equal_names_are_recognized_by_colours(tmp_path):
    photo, mask = photo_and_mask()
    save(tmp_path / "images" / "a.png", mask)
    save(tmp_path / "masks" / "a.png", photo)
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(BadInput, match="swapped"):
        read_pair(pairs[0])


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_that_is_missing_or_empty_is_named(tmp_path, make):
    if make:
        (tmp_path / "nothing").mkdir()
    with pytest.raises(BadInput, match=r"nothing: (no such folder|holds no images)"):
        find_pairs(tmp_path / "nothing", tmp_path)


# Photos


def test_a_jpeg_is_decoded_at_an_eighth_and_agrees_with_area_averaging(tmp_path):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    path = save(tmp_path / "a.jpg", smooth.resize((1918, 1280), Image.Resampling.BICUBIC))
    with files.open_image(path) as image:
        assert files.decode_scaled(image, (160, 240)) == (0, 0, 239.75, 160)
        assert image.size == (240, 160)
    expected = np.asarray(Image.open(path).resize((240, 160), Image.Resampling.BOX), float)
    assert np.abs(read_photo(path, (160, 240)) - expected).mean() < 1


@pytest.mark.parametrize("size, decoded", [((160, 240), (240, 160)), ((161, 240), (480, 320))])
def test_scaled_decoding_never_goes_below_the_target(tmp_path, size, decoded):
    path = save(tmp_path / "a.jpg", Image.new("RGB", (1918, 1280)))
    with files.open_image(path) as image:
        files.decode_scaled(image, size)
        assert image.size == decoded


@pytest.mark.parametrize("size", [None, (10, 10)])
def test_photos_of_every_kind_become_upright_rgb_or_grey(tmp_path, size):
    red, black = Image.new("RGB", (40, 20), (200, 10, 10)), Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    paths = [
        save(tmp_path / "exif.jpg", red, exif=exif),
        save(tmp_path / "cmyk.jpg", red.convert("CMYK")),
        save(tmp_path / "alpha.png", red.convert("RGBA")),
        save(tmp_path / "palette.gif", red.convert("P", palette=Image.Palette.ADAPTIVE)),
        save(tmp_path / "animated.gif", red, save_all=True, append_images=[black]),
    ]
    for path in paths:
        photo = read_photo(path, size)
        turned = path.name == "exif.jpg"
        assert photo.shape == (*(size or ((40, 20) if turned else (20, 40))), 3), path.name
        assert np.abs(photo.astype(int) - (200, 10, 10)).max() < 12, path.name
        assert read_photo(path, size, channels=1).shape == (*photo.shape[:2], 1)
    odd = Image.Exif()
    odd[0x0112] = 9  # there is no such orientation
    assert read_photo(save(tmp_path / "odd.jpg", red, exif=odd)).shape == (20, 40, 3)
    deep = save(tmp_path / "deep.png", np.full((20, 40), 30000, np.uint16))
    assert (read_photo(deep) == 116).all() and (read_photo(deep, channels=1) == 116).all()


def png_header(width, height):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def cut_jpeg():
    file = io.BytesIO()
    photo_and_mask((200, 200))[0].save(file, "JPEG")
    return file.getvalue()[: file.tell() // 2]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b"This is a text.", "not an image"),
        (cut_jpeg(), "truncated"),
        (png_header(100_000, 100_000), "megapixels"),
    ],
)
def test_a_broken_photo_is_named_with_its_reason(tmp_path, content, reason):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(BadInput, match=rf"bad.jpg: .*{reason}.*: .*remove it"):
        read_photo(tmp_path / "bad.jpg", (16, 16))


# Masks


def palette_image(index, colours):
    image = Image.fromarray(np.array(index, np.uint8), "P")
    image.putpalette(sum(colours, []))
    return image


WHITE, BLACK, RED, GREEN = [255] * 3, [0] * 3, [200, 0, 0], [0, 200, 0]
RIGHT_HALF = np.repeat([[0, 0, 1, 1]], 3, axis=0)
RIGHT_HALF_ALPHA = Image.fromarray((RIGHT_HALF * 255).astype(np.uint8))


@pytest.mark.parametrize(
    "image",
    [
        palette_image(RIGHT_HALF, [BLACK, WHITE]),
        palette_image(1 - RIGHT_HALF, [WHITE, BLACK]),
        palette_image(RIGHT_HALF, [BLACK, [1, 1, 1]]),
        palette_image(RIGHT_HALF, [RED, GREEN]),
        palette_image(RIGHT_HALF * 2, [BLACK, RED, WHITE]),
        palette_image(RIGHT_HALF * 255, [BLACK] * 255 + [RED]),
        Image.fromarray(RIGHT_HALF.astype(np.uint8)),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)),
        Image.fromarray((RIGHT_HALF * 128).astype(np.uint8)),
        Image.fromarray((RIGHT_HALF * 65535).astype(np.uint16)),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)).convert("1"),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)).convert("LA"),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)).convert("RGB"),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)).convert("RGBA"),
        Image.merge("RGBA", [Image.new("L", (4, 3))] * 3 + [RIGHT_HALF_ALPHA]),
    ],
)
def test_masks_of_every_kind_become_0_and_1(tmp_path, image):
    mask = read_mask(save(tmp_path / "mask.png", image))
    assert mask.dtype == np.uint8 and (mask == RIGHT_HALF).all()


def test_a_mask_is_cut_at_127(tmp_path):
    levels = np.array([[0, 127, 128, 255]] + [[0, 0, 255, 255]] * 3, np.uint8)
    assert read_mask(save(tmp_path / "m.png", levels))[0].tolist() == [0, 0, 1, 1]


def test_a_mask_of_two_levels_may_cover_any_share(tmp_path):
    mask = np.full((10, 10), 128, np.uint8)
    mask[0] = 0
    assert read_mask(save(tmp_path / "m.png", mask)).sum() == 90


@pytest.mark.parametrize("level", [0, 1])
def test_empty_and_full_masks(tmp_path, level):
    mask = np.full((4, 4), level, np.uint8)
    assert (read_mask(save(tmp_path / "m.png", mask)) == level).all()
    assert (read_mask(save(tmp_path / "m.gif", mask * np.uint8(255)), (2, 2)) == level).all()


@pytest.mark.parametrize(
    "image",
    [
        palette_image([[0, 1, 2, 2]], [BLACK, RED, GREEN]),
        Image.new("RGB", (4, 4), (200, 30, 30)),
        Image.fromarray(np.arange(100, 164, dtype=np.uint8).reshape(8, 8)),
        Image.new("F", (4, 4)),
    ],
)
def test_a_picture_that_is_no_mask_is_refused(tmp_path, image):
    path = save(tmp_path / "mask.tif", image)
    with pytest.raises(BadInput, match="mask.tif: has .* no mask"):
        read_mask(path)


def test_a_resized_mask_is_the_area_average_cut_at_one_half(tmp_path):
    mask = (np.random.default_rng(0).random((64, 96)) < 0.5).astype(np.uint8)
    resized = read_mask(save(tmp_path / "m.png", mask), (16, 24))
    share = mask.reshape(16, 4, 24, 4).mean(axis=(1, 3))
    clear = np.abs(share - 0.5) > 0.03
    assert (resized == (share > 0.5))[clear].all() and set(np.unique(resized)) == {0, 1}


def test_many_threads_may_clear_away_what_a_killed_process_left(tmp_path):
    for number in range(50):
        leftover = tmp_path / f".{number}.png.123.partial"
        leftover.write_text("half")
        os.utime(leftover, (0, 0))

    def write(number):
        with write_aside(tmp_path / f"{number}.png") as file:
            file.write(b"whole")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(50)))
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.png" for n in range(50)}
