"""tools/check_data.py: each kind of finding, its exit codes, the table and the contact sheet."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from conftest import assert_refused, write_pairs
from PIL import Image, ImageChops, ImageOps

from support.cache import decode_all
from support.errors import BadInput
from support.masks import read_mask
from support.pairs import find_pairs
from tools import check_data


@pytest.fixture
def check(call, data, tmp_path):
    """Check `data`: check(*flags) -> (code, stdout, stderr)."""
    flags = data / "train_images", data / "train_masks", "--sheet", tmp_path / "sheet.png"
    return lambda *more: call(check_data.main, *flags, *more)


@pytest.fixture
def report(check):
    """Check `data`: report(*flags) -> (exit code, the JSON report)."""

    def report(*flags):
        code, out, _ = check("--json", *flags)
        return code, json.loads(out)

    return report


@pytest.fixture
def more(data):
    """`data` with 12 photos more: enough to say what is usual."""
    write_pairs(data, cars=6, seed=1)
    return data


def files_of(report, kind):
    """{file's name: details} of the finding of a kind, {} where there is none."""
    files = report["findings"].get(kind, {"files": {}})["files"]
    return {os.path.basename(file): text for file, text in files.items()}


def photo_of(data, number):
    return sorted((data / "train_images").iterdir())[number]


def mask_of(data, number, change=None):
    """The path of a mask by its number; with `change`, changed by it."""
    path = sorted((data / "train_masks").iterdir())[number]
    if change:
        with Image.open(path) as mask:
            change(mask.convert("L")).save(path)
    return path


def all_of(level):
    """A change to a mask of one level everywhere."""
    return lambda mask: Image.new("L", mask.size, level)


def test_sound_data_has_no_findings_and_exit_code_0(check, more):
    code, out, err = check()
    assert code == 0 and "nothing found" in out, out + err
    assert re.search(r"^usable pairs +\d+ +\d+$", out, re.M) and "72x48" in out


def test_coverage_is_that_of_the_masks_at_full_size(data, report):
    _, found = report()
    coverages = [read_mask(path).mean() / 255 for path in (data / "train_masks").iterdir()]
    sides = found["training"], found["validation"]
    assert min(side["least coverage"] for side in sides) == pytest.approx(min(coverages))
    assert max(side["most coverage"] for side in sides) == pytest.approx(max(coverages))


def test_all_that_training_would_refuse_is_collected_in_one_scan(data, report):
    first, second, third, fourth, fifth = (photo_of(data, number) for number in range(5))
    first.write_bytes(first.read_bytes()[:1000])
    second.write_bytes(b"")
    mask_of(data, 2, lambda mask: mask.transpose(Image.Transpose.ROTATE_90))
    Image.open(fourth).save(mask_of(data, 3).with_suffix(".png"))
    mask_of(data, 3).unlink()
    mask_of(data, 4).unlink()
    Image.new("L", (9, 9)).save(data / "train_masks" / "alone.png")
    code, found = report()
    assert code == 2
    refused = files_of(found, "refused")
    unreadable = {first.name, second.name, f"{fourth.stem}_mask.png"}
    assert set(refused) == unreadable | {third.name, fifth.name, "alone.png"}
    assert "truncated" in refused[first.name] and "0 bytes" in refused[second.name]
    assert "its mask" in refused[third.name] and "is 48x72" in refused[third.name]
    assert "no mask" in refused[fifth.name]
    assert "no photo" in refused["alone.png"]


def test_findings_name_ten_files_and_count_the_others(check, more):
    for number in range(13):
        photo_of(more, number).write_bytes(b"")
    code, out, _ = check()
    assert code == 2 and "(13)" in out and "... and 3 more" in out and out.count("0 bytes") == 10


def test_an_inverted_mask_is_a_warning(more, report):
    mask_of(more, 3, ImageOps.invert)
    code, found = report()
    assert code == 1 and list(found["findings"]) == ["inverted"]
    assert list(files_of(found, "inverted")) == [photo_of(more, 3).name]


def test_a_whole_set_that_is_inverted_is_found(data, report):
    for number in range(10):
        mask_of(data, number, ImageOps.invert)
    code, found = report()
    assert code == 1 and len(files_of(found, "inverted")) == 10


def test_a_set_whose_objects_reach_the_border_is_not_called_inverted(data, report):
    sky = Image.new("L", (72, 48))
    sky.paste(255, (0, 0, 72, 30))
    for number in range(10):
        mask_of(data, number, lambda mask: sky)
    mask_of(data, 3, lambda mask: ImageChops.offset(sky, 0, -29))
    assert not files_of(report()[1], "inverted")


def test_empty_masks_are_a_note_full_and_tiny_ones_warnings(more, report):
    mask_of(more, 0, all_of(0))
    code, found = report()
    assert code == 0 and list(files_of(found, "empty")) == [photo_of(more, 0).name]
    dot = Image.new("L", (72, 48))
    dot.paste(255, (30, 20, 33, 22))
    mask_of(more, 1, lambda mask: dot)
    mask_of(more, 2, all_of(255))
    code, found = report()
    assert code == 1
    assert list(files_of(found, "coverage")) == [photo_of(more, 1).name]
    assert list(files_of(found, "full")) == [photo_of(more, 2).name]


def test_a_folder_of_empty_masks_is_an_error_as_in_training(data, report):
    images, masks = write_pairs(data, cars=2, side="val", seed=6)
    for path in masks.iterdir():
        Image.new("L", (72, 48)).save(path)
    code, found = report("--val-img-dir", images, "--val-mask-dir", masks)
    assert code == 2 and list(found["findings"]) == ["refused"]
    (refusal,) = files_of(found, "refused").items()
    with pytest.raises(BadInput) as caught:
        list(decode_all(find_pairs(images, masks), None, 3, "checking"))
    assert refusal == ("val_masks", f"{caught.value.reason}: {caught.value.remedy}")


def test_photos_and_cars_on_both_sides_and_photos_that_come_twice_are_found(data, report):
    train, val = write_pairs(data), write_pairs(data, cars=2, side="val", seed=1)
    first, second, *_, last = sorted(path.stem for path in train[0].iterdir())
    # A number for a name is no car's.
    copies = (first, train, "twin"), (second, train, "1"), (last, val, "1"), (last, val, last)
    for name, folders, copy in copies:
        shutil.copy(train[0] / f"{name}.jpg", folders[0] / f"{copy}.jpg")
        shutil.copy(train[1] / f"{name}_mask.gif", folders[1] / f"{copy}.gif")
    code, found = report("--val-img-dir", val[0], "--val-mask-dir", val[1])
    assert code == 1
    same = {name: os.path.basename(text) for name, text in files_of(found, "duplicate").items()}
    assert {*same, *same.values()} >= {"twin.jpg", f"{first}.jpg", "1.jpg"}
    assert set(files_of(found, "leak")) == {"1.jpg", f"{last}.jpg"}
    assert list(files_of(found, "cars")) == [last[:12]]


def test_names_are_printed_without_their_control_characters(check, data):
    shutil.copy(photo_of(data, 0), data / "train_images" / "a\n\x1b[31m'b.jpg")
    code, out, err = check()
    assert code == 2 and r"a\n\x1b[31m'b.jpg" in out and "\x1b" not in out + err


def test_the_sheet_shows_the_suspicious_first_and_at_most_48(more, report, tmp_path):
    write_pairs(more, cars=20, seed=2)
    mask_of(more, 40, all_of(255))
    report()
    width, height = check_data.TILE_WIDTH, check_data.PHOTO_HEIGHT
    below = check_data.CAPTION_HEIGHT
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == 8 * (height + below)
        captions = np.asarray(sheet)[height : height + below, : 2 * width].astype(int)
    red = (captions[..., 0] > 200) & (captions[..., 1] < 80)
    assert red[:, :width].any() and not red[:, width:].any()


def test_one_pair_is_too_few_for_a_split(tmp_path, call):
    images, masks = write_pairs(tmp_path, cars=1, views=1)
    code, out, _ = call(check_data.main, images, masks, "--sheet", tmp_path / "sheet.png")
    assert code == 2 and "the only car or photo" in out and (tmp_path / "sheet.png").exists()


def write_classes(folder, *masks, side="train", palette=None):
    """In place of what is there, dark photos, and masks in stripes, each of these values."""
    folders = [folder / f"{side}_{kind}" for kind in ("images", "masks")]
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    for name, values in zip("abcdef", masks, strict=False):
        mask = Image.fromarray(np.array([values] * 24, np.uint8).repeat(8, axis=1))
        if palette:
            mask.putpalette(palette)
        photo = Image.new("RGB", mask.size, (0, len(side), ord(name) - 97))  # no two the same
        for image, path in zip((photo, mask), folders, strict=True):
            image.save(path / f"{side}_{name}.png")
    return folders


def rename(names, *folders):
    """Name the first files of each folder anew."""
    for folder in folders:
        for name, path in zip(names, sorted(folder.iterdir()), strict=False):
            path.rename(path.with_stem(name))


def test_classes_have_shares_and_tints(data, check, report, tmp_path):
    write_classes(data, [0, 1, 2, 255], [3, 3])
    images, masks = write_classes(data, [2, 3, 3, 3], [2, 2, 255, 255], side="val")
    flags = "--val-img-dir", images, "--val-mask-dir", masks, "--ignore", 255, "--classes"
    code, found = report(*flags, 4)
    sides = found["training"], found["validation"]
    shares = [[side[f"share of {name}"] for name in (1, 2, 3, 4)] for side in sides]
    assert np.allclose(shares, [[1 / 6, 1 / 6, 1 / 3, 0], [0, 3 / 8, 3 / 8, 0]])
    assert code == 0 and not found["findings"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        tints = {tuple(level & ~7 for level in colour) for _, colour in sheet.getcolors(10**6)}
    assert {(64, 0, 0), (0, 64, 0), (64, 64, 0)} < tints
    out = check(*flags, *"abc")[1]
    assert re.search("^share of a +16.67% +0.00%$", out, re.M)


@pytest.mark.parametrize("palette", [None, [7, 0, 0, 0, 7, 0, 0, 0, 7, 9, 0, 0, 0, 9, 0]])
def test_classes_that_nobody_named_are_one_error_beside_broken_files(data, report, palette):
    _, masks = write_classes(data, *[[0, 1, 2, 3, 4]] * 6, palette=palette)
    (masks / "train_f.png").write_bytes(b"")
    code, found = report()
    assert code == 2 and list(found["findings"]) == ["refused"]
    refused = files_of(found, "refused")
    assert "4 (20.0 %): name --classes 4, or" in refused["train_masks"]
    assert list(refused)[0] == "train_masks" and "0 bytes" in refused["train_f.png"]
    assert len(refused) == (7 if palette else 2)  # colours are refused one by one, too
    assert found["training"]["usable pairs"] == 0 and "share" not in str(found["training"])


def test_pixels_to_ignore_are_no_object(data, report):
    write_classes(data, [0, 1, *[9] * 6], [0, 0, 1, 1, *[9] * 12])
    code, found = report()
    assert code == 2 and "--ignore V" in files_of(found, "refused")["train_masks"]
    code, found = report("--ignore", 9)
    coverages = {found[side]["median coverage"] for side in ("training", "validation")}
    assert code == 0 and coverages == {1 / 8}


def test_masks_beside_their_photos_under_other_names(data, call, tmp_path):
    photos = data / "train_images"
    for path in (data / "train_masks").iterdir():
        path.rename(photos / path.name.replace("_mask", "-drawn"))
    flags = photos, photos, "--sheet", tmp_path / "sheet.png"
    assert_refused(call(check_data.main, *flags), "--mask-suffix=-drawn would pair all 10")
    code, out, _ = call(check_data.main, *flags, "--mask-suffix=-drawn")
    assert code == 0 and "nothing found" in out


def test_groups_are_counted_and_split_as_one(data, report):
    folders = data / "train_images", data / "train_masks"
    rename([f"frame_{number:04}" for number in range(1, 11)], *folders)
    code, found = report("--group", r"_(\d{3})")  # 000 and 001
    assert code == 0 and not found["findings"]
    assert found["training"]["cars or groups"] == found["validation"]["cars or groups"] == 1


def test_groups_on_both_sides_are_found(data, report):
    val = write_pairs(data, cars=1, side="val", seed=1)
    rename(["7_a"], data / "train_images", data / "train_masks")
    rename(["7_b", "8_b"], *val)
    flags = "--val-img-dir", val[0], "--val-mask-dir", val[1]
    assert not files_of(report(*flags)[1], "cars")
    code, found = report(*flags, "--group", "^(.*)_")
    assert code == 1 and files_of(found, "cars") == {"7": "1 in training, 1 in validation"}
    rename(["7_a"], *val)
    assert not files_of(report(*flags)[1], "cars")
    assert list(files_of(report(*flags, "--group", "^(7.*)")[1], "cars")) == ["7_a"]
