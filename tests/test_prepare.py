import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from conftest import ROOT, write_pairs
from PIL import Image

import dataset
import files
from data import draw_demo, prepare
from data.prepare import prepare_carvana
from files import BadInput

FOUR = ["train_images", "train_masks", "val_images", "val_masks"]


@pytest.fixture
def zips(tmp_path):
    """A folder with train.zip and train_masks.zip as Kaggle ships them: 20 cars of two photos."""
    images, masks = write_pairs(tmp_path / "drawn", cars=20)
    source = tmp_path / "source"
    source.mkdir()
    for name, folder in (("train", images), ("train_masks", masks)):
        with zipfile.ZipFile(source / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}/", b"")
            for path in sorted(folder.iterdir()):
                archive.write(path, f"{name}/{path.name}")
    return source


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def prepared(folder):
    return {name: sorted(os.listdir(folder / name)) for name in FOUR}


def test_the_zips_are_unpacked_split_by_car_and_pair(zips, tmp_path, capsys):
    prepare_carvana(zips, tmp_path / "data")
    found = prepared(tmp_path / "data")
    assert sum(len(found[name]) for name in ("train_images", "val_images")) == 40
    for side in ("train", "val"):
        folders = tmp_path / f"data/{side}_images", tmp_path / f"data/{side}_masks"
        assert len(files.find_pairs(*folders)) == len(found[f"{side}_images"]) > 0
    cars = [{name.split("_")[0] for name in found[f"{side}_images"]} for side in ("train", "val")]
    assert not cars[0] & cars[1]
    assert sorted(os.listdir(tmp_path / "data")) == FOUR
    assert f"{len(found['train_images'])} pairs for training" in capsys.readouterr().out


def test_unzipped_folders_give_the_same(zips, tmp_path):
    prepare_carvana(zips, tmp_path / "from zips")
    for name in ("train", "train_masks"):
        with zipfile.ZipFile(zips / f"{name}.zip") as archive:
            archive.extractall(tmp_path / "unzipped")
    prepare_carvana(tmp_path / "unzipped", tmp_path / "from folders")
    assert contents(tmp_path / "from zips") == contents(tmp_path / "from folders")


def test_a_kill_between_the_last_renames_is_mended(zips, tmp_path):
    prepare_carvana(zips, tmp_path / "data")
    whole = contents(tmp_path / "data")
    names = sorted(path.stem for path in (tmp_path / "data").glob("*_images/*"))
    digest = hashlib.blake2b(" ".join(names).encode(), digest_size=8).hexdigest()
    aside = tmp_path / "data" / f".carvana-{digest}.partial"
    aside.mkdir()
    for name in ("train_images", "train_masks"):
        os.replace(tmp_path / "data" / name, aside / name)
    prepare_carvana(zips, tmp_path / "data")
    assert contents(tmp_path / "data") == whole


def test_folders_that_exist_are_not_touched(zips, tmp_path):
    write_pairs(tmp_path / "data", cars=1)
    before = contents(tmp_path / "data")
    with pytest.raises(BadInput, match="train_images: exists already"):
        prepare_carvana(zips, tmp_path / "data")
    assert contents(tmp_path / "data") == before


def test_what_another_source_left_is_neither_used_nor_mixed_in(zips, tmp_path):
    smaller = tmp_path / "smaller"
    shutil.copytree(zips, smaller)
    for name in ("train", "train_masks"):
        rewrite(
            smaller / f"{name}.zip", lambda n, c: c if n.split("/")[1] < "000000000003" else None
        )
    rewrite(smaller / "train.zip", lambda n, c: c[:-300] if "000000000001_02" in n else c)
    with pytest.raises(BadInput, match="000000000001_02"):
        prepare_carvana(smaller, tmp_path / "data")
    prepare_carvana(zips, tmp_path / "data")
    prepare_carvana(zips, tmp_path / "afresh")
    assert contents(tmp_path / "data") == contents(tmp_path / "afresh")


def test_photos_of_the_users_beside_a_killed_run_are_not_mixed_with_the_challenges(zips, tmp_path):
    rewrite(zips / "train.zip", lambda n, c: c[:-300] if "000000000005_01" in n else c)
    with pytest.raises(BadInput):
        prepare_carvana(zips, tmp_path / "data")
    write_pairs(tmp_path / "data", cars=1)
    with pytest.raises(BadInput, match="train_images: exists already"):
        prepare_carvana(zips, tmp_path / "data")
    assert len(os.listdir(tmp_path / "data/train_images")) == 2


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "member, reason",
    [
        ("../escaped.jpg", "not in train/"),
        ("/tmp/escaped.jpg", "not in train/"),
        ("train/../../0123456789ab_01.jpg", "no file of the challenge"),
        ("train/sub/0123456789ab_01.jpg", "no file of the challenge"),
        ("train/notes.txt", "no file of the challenge"),
        ("train/0123456789ab_17.jpg", "no file of the challenge"),
        (link("train/0123456789ab_01.jpg"), "link, encrypted or packed"),
        ("train/000000000000_01.jpg", "in it twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_have_no_business_there_refuse_the_archive_whole(
    zips, tmp_path, member, reason
):
    with zipfile.ZipFile(zips / "train.zip", "a") as archive:
        archive.writestr(member, b"content")
    before = contents(tmp_path)
    with pytest.raises(BadInput, match=f"train.zip: .*{reason}.*nothing was unpacked"):
        prepare_carvana(zips, tmp_path / "data")
    assert contents(tmp_path) == before


def test_a_member_without_a_name_refuses_the_archive(zips, tmp_path):
    content = bytearray((zips / "train.zip").read_bytes())
    entry = content.rindex(b"PK\1\2")  # the last one's; its name becomes its comment
    content[entry + 32 : entry + 34] = content[entry + 28 : entry + 30]
    content[entry + 28 : entry + 30] = b"\0\0"
    (zips / "train.zip").write_bytes(content)
    with pytest.raises(BadInput, match="'' is not in train/"):
        prepare_carvana(zips, tmp_path / "data")


def test_a_member_that_is_absurdly_large_refuses_the_archive(zips, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(BadInput, match="bytes: nothing was unpacked"):
        prepare_carvana(zips, tmp_path / "data")


def rewrite(path, change):
    """Write a zip file again, each member's content as change(name, content) gives it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            content = change(name, content)
            if content is not None:
                archive.writestr(name, content)


def test_files_that_do_not_pair_or_decode_are_listed(zips, tmp_path):
    rewrite(zips / "train.zip", lambda n, c: None if "000000000003_01" in n else c)
    with pytest.raises(
        BadInput, match=r"do not pair: download it again \(1\):\n  train_masks/000000000003_01_mask"
    ):
        prepare_carvana(zips, tmp_path / "data")
    rewrite(zips / "train_masks.zip", lambda n, c: None if "000000000003_01" in n else c)
    rewrite(zips / "train.zip", lambda n, c: c[:-300] if "000000000005" in n else c)
    with pytest.raises(BadInput, match=r"(?s)\(2\):\n  000000000005_01.jpg: cannot be read"):
        prepare_carvana(zips, tmp_path / "data")
    assert not set(FOUR) & set(os.listdir(tmp_path / "data"))


def test_a_zip_cut_off_or_missing_is_named_with_the_remedy(zips, tmp_path):
    path = zips / "train.zip"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BadInput, match="train.zip: cannot be read .*download it again"):
        prepare_carvana(zips, tmp_path / "data")
    path.unlink()
    with pytest.raises(BadInput, match="neither train.zip nor a folder train: .*--download"):
        prepare_carvana(zips, tmp_path / "data")


def test_download_says_what_to_do_where_the_client_is_missing_or_not_set_up(
    call, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call(prepare.main, "carvana", tmp_path, "--download")
    assert code == 2 and "pip install kaggle" in err and len(err.splitlines()) == 1
    client = tmp_path / "kaggle"
    client.write_text("#!/bin/sh\nexit 1\n")
    client.chmod(0o755)
    code, _, err = call(prepare.main, "carvana", tmp_path, "--download")
    assert code == 2 and "is your API token in" in err


# The demo set


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    command = [sys.executable, ROOT / "data/prepare.py", "demo", "--output-dir", folder]
    subprocess.run(command, check=True)
    return folder


def test_the_demo_has_the_challenges_names_formats_and_folders(demo):
    found = prepared(demo)
    assert len(found["train_images"]) == 16 * 16 and len(found["val_images"]) == 4 * 16
    for side in ("train", "val"):
        pairs = files.find_pairs(demo / f"{side}_images", demo / f"{side}_masks")
        assert all(dataset.car_id(pair.name) != pair.name for pair in pairs)
        assert len({dataset.car_id(pair.name) for pair in pairs}) * 16 == len(pairs)
    with Image.open(pairs[0].mask) as mask:
        assert mask.format == "GIF" and mask.mode == "P" and set(np.unique(mask)) == {0, 1}
    with Image.open(pairs[0].photo) as photo:
        assert photo.format == "JPEG" and photo.size == (480, 320)


def test_the_demo_is_the_same_each_time(demo, tmp_path):
    for car in (0, draw_demo.CARS - 1):
        draw_demo.draw_car((car, tmp_path / "again"))
    again = contents(tmp_path / "again")
    assert len(again) == 2 * 2 * draw_demo.VIEWS and again.items() <= contents(demo).items()


def test_the_demos_masks_cover_a_car_and_differ_by_view_and_car(demo):
    paths = sorted((demo / "val_masks").iterdir())
    masks = np.stack([files.read_mask(path) for path in paths])  # (64, 320, 480)
    coverage = masks.mean(axis=(1, 2))
    assert coverage.min() > 0.06 and coverage.max() < 0.45
    assert len({mask.tobytes() for mask in masks}) == 64
    assert not masks[:, :10].any() and not masks[:, -4:].any(), "no car is cut off"


@pytest.mark.parametrize("flags", [[], ["carvana"], ["nonsense"], ["demo", "--nonsense"]])
def test_wrong_flags_are_answered_in_one_line(call, flags):
    code, _, err = call(prepare.main, *flags)
    assert code == 2 and len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_named(call, zips):
    code, _, err = call(prepare.main, "carvana", zips, "--output-dir", "/dev/null/x")
    assert code == 2 and "/dev/null/x" in err and "--output-dir" in err
    assert len(err.splitlines()) == 1


def test_a_demo_that_exists_is_not_drawn_over(call, demo):
    code, _, err = call(prepare.main, "demo", "--output-dir", demo)
    assert code == 2 and "exists already" in err


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX's groups of processes")
def test_a_signal_to_all_processes_ends_the_drawing(tmp_path):
    command = [sys.executable, ROOT / "data/prepare.py", "demo", "--output-dir", tmp_path / "demo"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.rglob("*.gif")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert not (tmp_path / "demo").exists()
