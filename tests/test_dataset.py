import io
import os
import struct
import zlib

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from conftest import draw_pair, write_pairs
from PIL import Image

import dataset
from dataset import (
    BadInput,
    CarvanaDataset,
    EpochSampler,
    build_cache,
    find_pairs,
    get_loaders,
    get_train_transform,
    make_loader,
    read_mask,
    read_pair,
    read_photo,
    split_by_car,
)


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
    save(path.with_suffix(".png"), Image.open(path))
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
    with dataset.open_image(path) as image:
        assert dataset.decode_scaled(image, (160, 240)) == (0, 0, 239.75, 160)
        assert image.size == (240, 160)
    expected = np.asarray(Image.open(path).resize((240, 160), Image.Resampling.BOX), float)
    assert np.abs(read_photo(path, (160, 240)) - expected).mean() < 1


@pytest.mark.parametrize("size, decoded", [((160, 240), (240, 160)), ((161, 240), (480, 320))])
def test_scaled_decoding_never_goes_below_the_target(tmp_path, size, decoded):
    path = save(tmp_path / "a.jpg", Image.new("RGB", (1918, 1280)))
    with dataset.open_image(path) as image:
        dataset.decode_scaled(image, size)
        assert image.size == decoded


@pytest.mark.parametrize("size", [None, (10, 10)])
def test_photos_of_every_kind_become_upright_rgb_or_grey(tmp_path, size):
    red, black = Image.new("RGB", (40, 20), (200, 10, 10)), Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    files = [
        save(tmp_path / "exif.jpg", red, exif=exif),
        save(tmp_path / "cmyk.jpg", red.convert("CMYK")),
        save(tmp_path / "alpha.png", red.convert("RGBA")),
        save(tmp_path / "palette.gif", red.convert("P", palette=Image.Palette.ADAPTIVE)),
        save(tmp_path / "animated.gif", red, save_all=True, append_images=[black]),
    ]
    for path in files:
        photo = read_photo(path, size)
        turned = path.name == "exif.jpg"
        assert photo.shape == (*(size or ((40, 20) if turned else (20, 40))), 3), path.name
        assert np.abs(photo.astype(int) - (200, 10, 10)).max() < 12, path.name
        assert read_photo(path, size, channels=1).shape == (*photo.shape[:2], 1)
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


@pytest.mark.parametrize("cache", [True, False])
def test_bad_files_that_only_decoding_shows_are_reported_together(data, cache):
    photos = sorted((data / "train_images").iterdir())
    for path in photos[:3]:
        path.write_bytes(path.read_bytes()[:-200])
    coloured = np.random.default_rng(0).integers(0, 255, (48, 72, 3)).astype(np.uint8)
    mask = sorted((data / "train_masks").iterdir())[-1]
    mask.unlink()
    save(mask.with_suffix(".png"), coloured)
    with pytest.raises(BadInput) as problem:
        get_loaders(
            data / "train_images", data / "train_masks", None, None, 2, size=(16, 24), cache=cache
        )
    assert "(4)" in str(problem.value) and "truncated" in str(problem.value)
    assert not list(data.glob(".cache/*")), "no half cache may stay"


# Masks


def palette_image(index, colours):
    image = Image.fromarray(np.array(index, np.uint8), "P")
    image.putpalette(sum(colours, []))
    return image


WHITE, BLACK, RED, GREEN = [255] * 3, [0] * 3, [200, 0, 0], [0, 200, 0]
RIGHT_HALF = np.repeat([[0, 0, 1, 1]], 3, axis=0)


@pytest.mark.parametrize(
    "image",
    [
        palette_image(RIGHT_HALF, [BLACK, WHITE]),
        palette_image(1 - RIGHT_HALF, [WHITE, BLACK]),
        palette_image(RIGHT_HALF, [BLACK, [1, 1, 1]]),
        palette_image(RIGHT_HALF, [RED, GREEN]),
        palette_image(RIGHT_HALF * 2, [BLACK, RED, WHITE]),
        Image.fromarray(RIGHT_HALF.astype(np.uint8)),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)),
        Image.fromarray((RIGHT_HALF * 128).astype(np.uint8)),
        Image.fromarray((RIGHT_HALF * 65535).astype(np.uint16)),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)).convert("1"),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)).convert("LA"),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)).convert("RGB"),
        Image.fromarray((RIGHT_HALF * 255).astype(np.uint8)).convert("RGBA"),
    ],
)
def test_masks_of_every_kind_become_0_and_1(tmp_path, image):
    mask = read_mask(save(tmp_path / "mask.png", image))
    assert mask.dtype == np.uint8 and (mask == RIGHT_HALF).all()


def test_a_mask_is_cut_at_127(tmp_path):
    levels = np.array([[0, 127, 128, 255]] + [[0, 0, 255, 255]] * 3, np.uint8)
    assert read_mask(save(tmp_path / "m.png", levels))[0].tolist() == [0, 0, 1, 1]


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
        Image.fromarray(np.full((8, 8), 120, np.uint8)),
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


# The data set


def test_items_are_normalized_photos_and_masks_of_0_and_1(data):
    folders = data / "train_images", data / "train_masks"
    transform = get_train_transform(32, 40)
    for item in (
        CarvanaDataset(*folders)[0],
        CarvanaDataset(*folders, size=(32, 40))[1],
        *(CarvanaDataset(*folders, transform, size=(32, 40))[epoch, 2] for epoch in range(20)),
        *(CarvanaDataset(*folders, transform)[epoch, 2] for epoch in range(5)),
    ):
        image, mask = item
        assert image.dtype == mask.dtype == torch.float32
        assert image.shape[1:] in ((32, 40), (48, 72)) and mask.shape == (1, *image.shape[1:])
        assert image.min() >= 0 and 0.5 < image.max() <= 1
        assert set(mask.unique().tolist()) == {0, 1}
    grey = CarvanaDataset(*folders, transform, size=(32, 40), channels=1)
    assert grey[0][0].shape == (1, 32, 40)


def test_a_transform_of_the_callers_sees_the_photo_at_full_size(data):
    seen = []

    def look(image, **_):
        seen.append(image.shape)
        return image

    transform = A.Compose(
        [A.Lambda(image=look, p=1), A.Resize(16, 24), A.Normalize(0.0, 1.0, 255.0), ToTensorV2()]
    )
    image, mask = CarvanaDataset(data / "train_images", data / "train_masks", transform)[0]
    assert seen == [(48, 72, 3)] and image.shape == (3, 16, 24) and mask.shape == (1, 16, 24)
    plain = A.Compose([A.Resize(16, 24)])
    assert CarvanaDataset(data / "train_images", data / "train_masks", plain)[0][0].shape[0] == 3


def epoch_of(data, workers, epoch, seed=0):
    transform = get_train_transform(32, 48)
    photos = CarvanaDataset(
        data / "train_images", data / "train_masks", transform, size=(32, 48), seed=seed
    )
    loader = make_loader(photos, 3, workers, sampler=EpochSampler(len(photos), seed))
    for now in range(epoch + 1):  # the workers live on
        loader.sampler.set_epoch(now)
        batches = list(loader)
    return torch.cat([image for image, _ in batches])


def test_augmentation_and_order_do_not_depend_on_the_workers(data):
    first = epoch_of(data, 0, epoch=1)
    assert torch.equal(first, epoch_of(data, 2, epoch=1))
    assert not torch.equal(first, epoch_of(data, 0, epoch=2))
    assert not torch.equal(first, epoch_of(data, 0, epoch=1, seed=1))


def test_the_flips_are_drawn_independently(data):
    photos = CarvanaDataset(
        data / "train_images",
        data / "train_masks",
        A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]),
    )
    plain = CarvanaDataset(data / "train_images", data / "train_masks", A.Compose([A.NoOp()]))[0][0]
    seen = set()
    for epoch in range(40):
        image = photos[epoch, 0][0]
        for h, v in ((0, 0), (0, 1), (1, 0), (1, 1)):
            flipped = plain.flip([2]) if h else plain
            if torch.equal(image, flipped.flip([1]) if v else flipped):
                seen.add((h, v))
    assert len(seen) == 4


# The split


def names(*cars):
    return [dataset.Pair(f"{car:012x}_{view:02d}", "", "") for car in cars for view in (1, 2, 16)]


def test_a_car_is_on_one_side_and_stays_there_when_photos_are_added():
    train, val = split_by_car(names(*range(300)))
    train_cars, val_cars = ({pair.name[:12] for pair in side} for side in (train, val))
    assert not train_cars & val_cars and len(train) + len(val) == 900
    assert 15 < len(val_cars) < 45
    more_train, more_val = split_by_car(names(*range(600)))
    assert set(train) <= set(more_train) and set(val) <= set(more_val)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_each_side_has_at_least_one_car(fraction):
    train, val = split_by_car(names(1, 2), fraction)
    assert len(train) == len(val) == 3


def test_photos_with_other_names_are_split_each_by_itself():
    train, val = split_by_car([dataset.Pair(f"IMG_{i}", "", "") for i in range(100)])
    assert 2 < len(val) < 25 and len(train) + len(val) == 100


def test_a_single_car_cannot_be_split():
    with pytest.raises(BadInput, match="the only car"):
        split_by_car(names(1))


# The cache


def test_cached_and_uncached_arrays_are_equal(data):
    pairs = find_pairs(data / "train_images", data / "train_masks")
    for channels in (1, 3):
        cache = build_cache(pairs, (16, 24), channels, data / "train_images")
        for pair in pairs:
            for cached, read in zip(
                cache.read(pair), read_pair(pair, (16, 24), channels), strict=True
            ):
                assert cached.shape == read.shape and (cached == read).all()


def test_a_cache_is_built_once_and_again_when_a_photo_changes(data):
    def build():
        pairs = find_pairs(data / "train_images", data / "train_masks")
        return pairs, build_cache(pairs, (16, 24), 3, data / "train_images")

    pairs, first = build()
    stamp = os.stat(first.path).st_mtime_ns
    assert os.stat(build()[1].path).st_mtime_ns == stamp
    Image.new("RGB", (72, 48), "white").save(pairs[4].photo)
    _, second = build()
    assert (second.read(pairs[4])[0] > 250).all()
    assert [path.name for path in (data / ".cache").iterdir()] == [second.path.name]


def test_a_cache_sent_to_a_worker_leaves_its_map_behind(data):
    pairs = find_pairs(data / "train_images", data / "train_masks")
    cache = build_cache(pairs, (16, 24), 3, data / "train_images")
    cache.read(pairs[0])
    assert cache.__getstate__()["table"] is None


def test_validation_photos_of_their_own_are_used(data):
    write_pairs(data, cars=2, side="val", seed=9)
    loaders = get_loaders(
        *(data / name for name in ("train_images", "train_masks", "val_images", "val_masks")),
        batch_size=4,
        size=(16, 24),
    )
    assert [len(loader.dataset) for loader in loaders] == [10, 4]


class Probe(torch.utils.data.Dataset):
    """Hands over the memory that the worker's process holds, beside the photos."""

    def __init__(self, photos):
        self.photos = photos

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, key):
        image, _ = self.photos[key]
        with open("/proc/self/status") as status:
            peak = next(line for line in status if line.startswith("VmHWM"))
        return image.sum(), int(peak.split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("cache", [True, False])
def test_peak_memory_of_a_worker_does_not_grow_over_epochs(data, cache):
    write_pairs(data, cars=20, size=(480, 320), seed=1)
    loader, _ = get_loaders(
        data / "train_images", data / "train_masks", None, None, 4, size=(160, 240), cache=cache
    )
    loader = make_loader(Probe(loader.dataset), 4, 1, sampler=loader.sampler)
    peaks = []
    for epoch in range(12):
        loader.sampler.set_epoch(epoch)
        peaks.append(max(peak.max().item() for _, peak in loader))
    assert peaks[-1] - peaks[3] < 8 * 1024, f"kB after each epoch: {peaks}"
