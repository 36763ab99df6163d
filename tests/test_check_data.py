import json
import os
import re
import shutil
import time

import numpy as np
import pytest
from conftest import draw_pair, write_pairs
from PIL import Image, ImageChops, ImageOps

import check_data
from check_data import quick_findings
from files import find_pairs, read_mask
from measures import find_shift


@pytest.fixture
def report(call, data, tmp_path):
    """Check `data`: report(*flags) -> (exit code, the JSON report)."""

    def report(*flags):
        folders = data / "train_images", data / "train_masks"
        code, out, err = call(
            check_data.main, *folders, "--json", "--sheet", tmp_path / "sheet.png", *flags
        )
        return code, json.loads(out)

    return report


@pytest.fixture
def more(data):
    """`data` with 40 photos more: enough to say what is usual."""
    write_pairs(data, cars=20, seed=1)
    return data


def files_of(report, kind):
    """{file's name: details} of the finding of a kind, {} where there is none."""
    found = [finding for finding in report["findings"] if finding["kind"] == kind]
    assert len(found) <= 1
    return {os.path.basename(file): text for one in found for file, text in one["files"].items()}


def mask_of(data, number, change=None):
    """The path of a mask by its number; with `change`, changed by it."""
    path = sorted((data / "train_masks").iterdir())[number]
    if change:
        with Image.open(path) as mask:
            change(mask.convert("L")).save(path)
    return path


def photo_of(data, number):
    return sorted((data / "train_images").iterdir())[number]


def test_sound_data_has_no_findings_and_exit_code_0(call, more, tmp_path):
    sheet = tmp_path / "sheet.png"
    folders = more / "train_images", more / "train_masks"
    code, out, err = call(check_data.main, *folders, "--sheet", sheet)
    assert code == 0 and "nothing found" in out, out + err
    assert re.search(r"^pairs +\d+ +\d+$", out, re.M) and "72x48" in out and "RGB" in out
    with Image.open(sheet) as picture:
        assert picture.width == check_data.COLUMNS * check_data.TILE[0]


def test_coverage_is_that_of_the_masks_at_full_size(data, report):
    _, found = report()
    coverages = [read_mask(path).mean() for path in (data / "train_masks").iterdir()]
    sides = found["training"], found["validation"]
    assert min(side["least coverage"] for side in sides) == pytest.approx(min(coverages), abs=1e-6)
    assert max(side["most coverage"] for side in sides) == pytest.approx(max(coverages), abs=1e-6)
    assert sum(side["pairs"] for side in sides) == len(coverages)


def test_all_that_training_would_refuse_is_collected_in_one_scan(data, report):
    first, second, third, fourth, fifth, sixth = (photo_of(data, number) for number in range(6))
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    second.write_bytes(b"")
    mask_of(data, 2, lambda mask: mask.transpose(Image.Transpose.ROTATE_90))
    Image.open(fourth).save(mask_of(data, 3).with_suffix(".png"))
    mask_of(data, 3).unlink()
    mask_of(data, 4).unlink()
    draw_pair(np.random.default_rng(0), (9, 9))[1].save(data / "train_masks" / "alone.png")
    code, found = report()
    assert code == 2
    unreadable = files_of(found, "unreadable")
    assert set(unreadable) == {first.name, second.name, f"{fourth.stem}_mask.png"}
    assert "truncated" in unreadable[first.name] and "0 bytes" in unreadable[second.name]
    assert set(files_of(found, "sizes")) == {third.name}
    assert "no mask" in files_of(found, "unpaired")[fifth.name]
    assert "no photo" in files_of(found, "unpaired")["alone.png"]


def test_findings_name_ten_files_and_count_the_others(call, more, tmp_path):
    for number in range(13):
        photo_of(more, number).write_bytes(b"")
    folders = more / "train_images", more / "train_masks"
    code, out, _ = call(check_data.main, *folders, "--sheet", tmp_path / "sheet.png")
    assert code == 2 and "(13)" in out and "... and 3 more" in out and out.count("0 bytes") == 10


def test_an_inverted_mask_among_others_is_found(more, report):
    path = mask_of(more, 3, ImageOps.invert)
    code, found = report()
    assert code == 1 and len(found["findings"]) == 1
    assert list(files_of(found, "inverted")) == [path.name.replace("_mask.gif", ".jpg")]


def test_a_whole_set_that_is_inverted_is_found(more, report):
    for number in range(50):
        mask_of(more, number, ImageOps.invert)
    code, found = report()
    assert code == 1 and len(files_of(found, "inverted")) == 50
    assert "most of the set" in found["findings"][0]["what"]


def test_a_set_whose_objects_reach_the_border_is_not_called_inverted(more, report):
    sky = Image.new("L", (72, 48))
    sky.paste(255, (0, 0, 72, 30))
    for number in range(50):
        mask_of(more, number, lambda mask: sky)
    mask_of(more, 3, lambda mask: ImageChops.offset(sky, 0, -29))
    _, found = report()
    assert not files_of(found, "inverted")


@pytest.mark.parametrize("right, down", [(8, 0), (-6, 4), (0, -9)])
def test_a_mask_moved_against_its_photo_is_found_with_the_way_back(right, down):
    photo, mask = draw_pair(np.random.default_rng(2), (120, 80))
    assert find_shift(np.asarray(photo), np.asarray(mask)) is None
    moved = ImageChops.offset(mask, right, down)
    back = find_shift(np.asarray(photo), np.asarray(moved))
    assert back == pytest.approx((-right / 120, -down / 120), abs=0.01)


def test_a_photo_without_edges_says_nothing_about_its_mask():
    mask = np.asarray(draw_pair(np.random.default_rng(0), (120, 80))[1])
    flat = np.full((80, 120, 3), 90, np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, flat.shape).astype(np.uint8)
    assert find_shift(flat, mask) is None and find_shift(noise, mask) is None
    assert find_shift(noise, mask * np.uint8(0)) is None


def test_a_shifted_mask_is_a_warning(more, report):
    path = mask_of(more, 7, lambda mask: ImageChops.offset(mask, 7, 0))
    code, found = report()
    assert code == 1 and list(files_of(found, "shifted")) == [
        path.name.replace("_mask.gif", ".jpg")
    ]


def test_empty_masks_are_a_note_full_and_tiny_ones_warnings(more, report):
    black, white = Image.new("L", (72, 48)), Image.new("L", (72, 48), 255)
    mask_of(more, 0, lambda mask: black)
    code, found = report()
    assert code == 0 and list(files_of(found, "empty")) == [photo_of(more, 0).name]
    dot = black.copy()
    dot.paste(255, (30, 20, 33, 22))
    mask_of(more, 1, lambda mask: dot)
    mask_of(more, 2, lambda mask: white)
    code, found = report()
    assert code == 1
    assert list(files_of(found, "coverage")) == [photo_of(more, 1).name]
    assert list(files_of(found, "full")) == [photo_of(more, 2).name]


def test_a_set_of_empty_masks_is_an_error_as_in_training(data, report):
    for number in range(10):
        mask_of(data, number, lambda mask: Image.new("L", (72, 48)))
    code, found = report()
    assert code == 2 and found["findings"][0]["kind"] == "empty"


def test_photos_of_the_same_bytes_are_found_under_other_names(tmp_path, call):
    images, masks = write_pairs(tmp_path)
    val_images, val_masks = write_pairs(tmp_path, cars=2, side="val", seed=1)
    pairs = find_pairs(images, masks)
    for pair, folders, name in (
        (pairs[0], (images, masks), "twin"),
        (pairs[4], (val_images, val_masks), "other"),
        (pairs[5], (val_images, val_masks), pairs[5].name),
    ):
        shutil.copy(pair.photo, folders[0] / f"{name}.jpg")
        shutil.copy(pair.mask, folders[1] / f"{name}.gif")
    sides = ["--val-img-dir", val_images, "--val-mask-dir", val_masks]
    code, out, _ = call(
        check_data.main, images, masks, *sides, "--json", "--sheet", tmp_path / "sheet.png"
    )
    found = json.loads(out)
    assert code == 1
    (duplicate,) = files_of(found, "duplicate").items()
    assert "twin" in str(duplicate) and pairs[0].name in str(duplicate)
    assert set(files_of(found, "leak")) == {"other.jpg", f"{pairs[5].name}.jpg"}
    assert list(files_of(found, "cars")) == [pairs[5].name[:12]]

    lines = quick_findings(find_pairs(images, masks), find_pairs(val_images, val_masks))
    assert len(lines) == 2 and pairs[5].name[:12] in lines[0] and "other.jpg" in lines[1]
    assert not any("\n" in line for line in lines)
    assert quick_findings(pairs[:4], pairs[6:]) == []


def test_a_start_of_training_reads_no_more_than_a_bound(tmp_path, monkeypatch):
    images, masks = write_pairs(tmp_path)
    pairs = find_pairs(images, masks)
    assert len(quick_findings(pairs, pairs)) == 2
    monkeypatch.setattr(check_data, "START_BYTES", 10)
    assert len(quick_findings(pairs, pairs)) == 1  # the cars


def test_looking_at_thousands_of_pairs_at_a_start_takes_well_below_a_second(tmp_path):
    images, masks = write_pairs(tmp_path, cars=1, views=1)
    (pair,) = find_pairs(images, masks)
    pairs = []
    for number in range(5000):
        photo = images / f"{number}.jpg"
        os.link(pair.photo, photo)
        pairs.append(pair._replace(name=str(number), photo=str(photo)))
    start = time.perf_counter()
    assert len(quick_findings(pairs[500:], pairs[:500])) == 1
    assert time.perf_counter() - start < 2  # 0.2 s, but machines are shared


def test_names_are_printed_without_their_control_characters(data, call, tmp_path):
    shutil.copy(photo_of(data, 0), data / "train_images" / "a\n\x1b[31m'b.jpg")
    folders = data / "train_images", data / "train_masks"
    code, out, err = call(check_data.main, *folders, "--sheet", tmp_path / "sheet.png")
    assert code == 2 and r"a\n\x1b[31m'b.jpg" in out and "\x1b" not in out + err


def test_photos_and_masks_may_share_a_folder(tmp_path, call):
    images, masks = write_pairs(tmp_path)
    for path in masks.iterdir():
        path.rename(images / path.name)
    flags = images, images, "--sheet", tmp_path / "sheet.png"
    assert call(check_data.main, *flags)[0] == 0


def test_the_sheet_shows_the_suspicious_first_and_at_most_48(more, report, tmp_path):
    path = mask_of(more, 40, lambda mask: Image.new("L", mask.size, 255))
    report()
    with Image.open(tmp_path / "sheet.png") as sheet:
        width, height, below = check_data.TILE
        assert sheet.height == 8 * (height + below)
        first, second = (
            np.asarray(sheet.crop((i * width, height, (i + 1) * width, height + below)))
            for i in (0, 1)
        )
    red = [((tile[..., 0] > 200) & (tile[..., 1] < 80)).sum() for tile in (first, second)]
    assert red[0] > 0 == red[1], path


def test_one_pair_is_too_few_for_a_split(tmp_path, call):
    images, masks = write_pairs(tmp_path, cars=1, views=1)
    code, out, _ = call(check_data.main, images, masks, "--sheet", tmp_path / "sheet.png")
    assert code == 2 and "the only car or photo" in out and (tmp_path / "sheet.png").exists()


def test_swapped_folders_are_recognized(data, call, tmp_path):
    flags = data / "train_masks", data / "train_images", "--sheet", tmp_path / "sheet.png"
    code, _, err = call(check_data.main, *flags)
    assert code == 2 and "swap the two folders" in err


@pytest.mark.parametrize(
    "flags, line",
    [
        ("{0}/nothing {0}/train_masks", "nothing: no such folder"),
        ("{0} {0}/train_masks", "holds no images"),
        ("{0}/train_images {0}/train_masks --val-img-dir {0}", "belong together"),
        ("{0}/train_images {0}/train_masks --sheet /dev/null/a.png", "name another --sheet"),
        ("{0}/train_images", "MASKS"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call, data, flags, line):
    code, out, err = call(check_data.main, *flags.format(data).split())
    assert code == 2 and line in err and len(err.strip().splitlines()) == 1 and not out


def test_help_says_what_the_exit_codes_mean(call):
    code, out, _ = call(check_data.main, "--help")
    assert code == 0 and "Exit codes: 0" in out and "1 warnings" in " ".join(out.split())


def test_numbers_for_names_are_no_cars(tmp_path):
    pairs = []
    for seed, side in enumerate(("train", "val")):
        for folder in write_pairs(tmp_path, cars=2, views=1, side=side, seed=seed):
            for number, path in enumerate(sorted(folder.iterdir())):
                path.rename(folder / f"{number:04d}{path.suffix}")
        pairs.append(find_pairs(tmp_path / f"{side}_images", tmp_path / f"{side}_masks"))
    assert [pair.name for pair in pairs[0]] == [pair.name for pair in pairs[1]]
    assert quick_findings(*pairs) == []


def test_empty_masks_of_one_side_are_what_training_refuses(data, report, tmp_path):
    write_pairs(data, cars=2, side="val", seed=6)
    for path in (data / "val_masks").iterdir():
        Image.new("L", (72, 48)).save(path)
    code, found = report("--val-img-dir", data / "val_images", "--val-mask-dir", data / "val_masks")
    assert code == 2 and len(files_of(found, "empty")) == 4
