"""Pairing photos with masks, and work on many files at a time."""

import os
import shlex
import time

import numpy as np
import pytest
from conftest import draw_pair
from PIL import Image

from support.errors import BadInput, printable
from support.masks import Labels
from support.pairs import find_pairs, for_all, in_threads, read_pair

PHOTO, MASK = draw_pair(np.random.default_rng(0), (8, 6))


def folders(tmp_path, photos, masks):
    """Write photos and masks of these names: their two folders."""
    for folder, image, names in (("images", PHOTO, photos), ("masks", MASK, masks)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in names:
            image.save(tmp_path / folder / name)
    return tmp_path / "images", tmp_path / "masks"


@pytest.mark.parametrize(
    "photo, mask",
    [
        ("a.jpg", "a_mask.gif"),
        ("b.JPG", "B_MASK.GIF"),
        ("c.png", "c.png"),
        ("D.jpeg", "d_mask.png"),
        ("e f.jpg", "e f.bmp"),
        ("ü'\".jpg", "ü'\"_mask.tif"),
        ("g.webp", "g_mask.webp"),
        ("h.i.jpg", "h.i_mask.png"),
        ("j_mask.jpg", "j_mask_mask.gif"),
    ],
)
def test_masks_are_found_by_all_the_promised_names(tmp_path, photo, mask):
    images, masks = folders(tmp_path, [photo], [mask])
    (images / ".hidden.jpg").write_bytes(b"")
    for name in ("notes.txt", "manual.pdf", "clip.mpg"):
        (images / name).write_text("not an image")
        (masks / name).write_text("not an image")
    (images / "folder.jpg").mkdir()
    assert find_pairs(images, masks) == [
        (os.path.splitext(photo)[0], str(images / photo), str(masks / mask))
    ]


def test_pairs_are_sorted_by_name(tmp_path):
    names = ["c", "a", "B"]
    found = find_pairs(*folders(tmp_path, [f"{n}.png" for n in names], [f"{n}.gif" for n in names]))
    assert [pair.name for pair in found] == ["a", "B", "c"]


def test_photos_and_masks_may_share_a_folder(tmp_path):
    PHOTO.save(tmp_path / "a.jpg"), MASK.save(tmp_path / "a_mask.gif")
    assert [pair.name for pair in find_pairs(tmp_path, tmp_path)] == ["a"]


def test_files_without_partner_are_all_listed_capped_at_ten_and_counted(tmp_path):
    photos = [f"{n}.jpg" for n in range(10)]
    masks = [f"{n}_mask.gif" for n in range(7, 10)] + [f"extra{n}.png" for n in range(6)]
    with pytest.raises(BadInput) as problem:
        find_pairs(*folders(tmp_path, photos, masks))
    message = str(problem.value)
    assert "(13)" in message and "... and 3 more" in message and len(message.splitlines()) == 12
    assert "0.jpg: no mask in " in message and "extra0.png: no photo: " in message


@pytest.mark.parametrize("second", ["a_mask.png", "a.gif"])
def test_two_masks_for_a_photo_are_refused(tmp_path, second):
    masks = ["a_mask.gif", second, "b_mask.gif", "c_mask.gif"]
    with pytest.raises(BadInput, match="a_mask.gif.*one photo and one mask were expected"):
        find_pairs(*folders(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], masks))


def test_a_photo_that_is_turned_pairs_with_an_upright_mask(tmp_path):
    images, masks = folders(tmp_path, [], ["a.gif"])
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.transpose(Image.Transpose.ROTATE_90).save(images / "a.jpg", exif=exif)
    photo, mask = read_pair(*find_pairs(images, masks))
    assert photo.shape[:2] == mask.shape == (6, 8)


def test_swapped_folders_with_equal_names_are_recognized_by_colours(tmp_path):
    images, masks = folders(tmp_path, ["a.png"], ["a.png"])
    with pytest.raises(BadInput, match="swapped"):
        read_pair(*find_pairs(masks, images))


def test_labels_and_counts_reach_the_mask(tmp_path):
    images, masks = folders(tmp_path, ["a.png"], [])
    Image.fromarray(np.full((6, 8), 7, np.uint8)).save(masks / "a.png")
    _, mask = read_pair(*find_pairs(images, masks), None, 3, Labels(values=(7,)), counts := [])
    assert (mask == 255).all() and counts


# Names of other data sets

CONVENTIONS = [  # --mask-suffix; what names share; photos, masks and others; whether in one folder
    ("_segmentation", "ISIC_01 ISIC_02", "{}.jpg {}_segmentation.png", False),
    ("_training=_manual1", "21 22 1", "{}_training.tif {}_manual1.gif", False),
    (".jpg=_1stHO.png", "I_01L I_01R I_02L", "{}.jpg {}_1stHO.png {}_2ndHO.png", True),
    ("-mask", "1 10 100 11", "{}.png {}-mask.png", False),
    ("_sat=_mask", "7 12 100", "{}_sat.jpg {}_mask.png", True),
    ("_P", "01TP_006690 01TP_006720", "{}.png {}_P.png", False),
    (".png", "a b c-d", "{}.jpg {}.png", True),
    ("_rgb=_gt", "a b c-d", "{}_rgb.png {}_gt.png", True),
    ("_rgb=*", "a b c-d", "{}_rgb.png {}.png", False),
    ("img_*=mask_*", "1 2 10", "img_{}.jpg mask_{}.png", False),
    ("-a'b", "=\n1 =\n2", "{}.png {}-a'b.png", False),
    # Until here, this very flag is what is proposed.
    ("*_MANUAL1", "21 1", "{}.jpg {}_manual1.gif {}_manual2.gif", False),
    ("_manual1", "21 1", "{}.tif {}_manual1.gif", True),
    ("*.jpg=*_1stHO.png", "01L 01R", "{}.JPG {}_1stHO.PNG {}_2ndHO.png", True),
    ("img_*_x=*.y.png", "1 2", "img_{}_X.jpg {}.y.png {}.z.png", False),
]


def write_named(tmp_path, shared, names, one_folder):
    """Write pairs named as CONVENTIONS says: the two folders, and the pairs that they hold."""
    images, masks = tmp_path / "images", tmp_path / ("images" if one_folder else "masks")
    images.mkdir(), masks.mkdir(exist_ok=True)
    files = [names.replace("{}", core).split(" ") for core in shared.split(" ")]
    for photo, *others in files:
        PHOTO.save(images / photo)
        for name in others:
            MASK.save(masks / name)
    return (images, masks), sorted((str(images / name[0]), str(masks / name[1])) for name in files)


@pytest.mark.parametrize("suffix, shared, names, one_folder", CONVENTIONS)
def test_masks_are_found_by_patterns_of_names(tmp_path, suffix, shared, names, one_folder):
    places, pairs = write_named(tmp_path, shared, names, one_folder)
    assert sorted((photo, mask) for _, photo, mask in find_pairs(*places, suffix)) == pairs


@pytest.mark.parametrize("wrong", [None, "_other"])
@pytest.mark.parametrize("suffix, shared, names, one_folder", CONVENTIONS[:-4])
def test_the_flag_that_would_pair_them_is_named(tmp_path, suffix, shared, names, one_folder, wrong):
    places, pairs = write_named(tmp_path, shared, names, one_folder)
    with pytest.raises(BadInput, match=f" would pair all {len(pairs)}$") as problem:
        find_pairs(*places, wrong)
    flag = [f"--mask-suffix={suffix}"] if suffix.startswith("-") else ["--mask-suffix", suffix]
    assert shlex.split(problem.value.remedy.split(" would ")[0]) == flag  # as argparse takes it
    assert printable(os.path.basename(pairs[0][0])) in problem.value.reason


@pytest.mark.parametrize(
    "photos, masks",
    [
        (["1.jpg"], ["1_gt.png"]),
        (["1.jpg", "2.jpg", "3.jpg"], ["1_gt.png", "2_gt.png"]),
        ([f"{n}.jpg" for n in "1_1 1_2 2_1 2_2 3_1 3_2 4 5 x_s x_m y_s y_m".split()], []),
    ],
)
def test_no_flag_is_named_that_leaves_a_tenth_of_the_photos(tmp_path, photos, masks):
    images, masks = folders(tmp_path, photos, masks)
    with pytest.raises(BadInput, match="photos .*like 1.* do not pair: rename them, or give"):
        find_pairs(images, masks if os.listdir(masks) else images)


def test_files_that_fit_a_pattern_must_pair_and_once(tmp_path):
    masks = ["a_m.png", "b_m.png", "b_m.gif", "c_m.png", "d_m.png", "e_m.png", "g_m.png", "x.png"]
    place = folders(tmp_path, [f"{name}.png" for name in "abcdef"], masks)
    with pytest.raises(BadInput, match=r"do not pair \(2\)") as problem:
        find_pairs(*place, "_m")
    told = str(problem.value)
    assert "b_m.png: one photo" in told and "f.png: no mask" in told  # g_m.png is another folder's


@pytest.mark.parametrize("bad", ["", "=", "a=", "a=b=c", "a**", "*a*=b"])
def test_a_bad_pattern_is_refused(tmp_path, bad):
    with pytest.raises(BadInput, match="^--mask-suffix .*: is neither MASK nor PHOTO=MASK"):
        find_pairs(*folders(tmp_path, ["a.jpg"], ["a.png"]), bad)


# Many files at a time


def test_all_files_are_done_in_order_before_bad_ones_are_reported():
    def work(item):
        time.sleep(0.001 * (item % 3))
        if item % 5 == 4:
            raise BadInput(f"{item}.jpg", "bad")
        return item

    done = []
    with pytest.raises(BadInput, match=r"cannot be used \(4\)"):
        done.extend(for_all(work, range(20), "working"))
    assert done == [item for item in range(20) if item % 5 != 4]


def test_work_in_threads_keeps_its_order_and_stops_when_nobody_asks():
    started = []
    results = in_threads(lambda item: started.append(item) or item, range(1000), ahead=8)
    assert [next(results) for _ in range(20)] == list(range(20))
    results.close()
    assert len(started) <= 20 + 8
