"""data/prepare.py: the challenge's zip files become four folders, complete or not at all."""

import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile

import pytest
from conftest import ROOT, assert_refused, write_pairs

from data import draw_demo, prepare
from data.prepare import prepare_carvana
from support.errors import BadInput
from support.pairs import find_pairs

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


def rewrite(path, part, change=None):
    """Rewrite a zip file: members with `part` in their names are changed, or dropped."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if part not in name:
                archive.writestr(name, content)
            elif change:
                archive.writestr(name, change(content))


def test_the_zips_are_unpacked_split_by_car_and_pair(zips, tmp_path, call):
    data = tmp_path / "data"
    code, out, _ = call(prepare.main, "carvana", zips, "--output-dir", data)
    train, val = (find_pairs(data / f"{s}_images", data / f"{s}_masks") for s in ("train", "val"))
    assert code == 0 and len(train) + len(val) == 40
    assert not {pair.name[:12] for pair in train} & {pair.name[:12] for pair in val}
    assert sorted(os.listdir(data)) == FOUR
    assert f"{len(train)} pairs for training, {len(val)} for validation" in out


def test_unzipped_folders_give_the_same_result(zips, tmp_path):
    prepare_carvana(zips, tmp_path / "from zips")
    for name in ("train", "train_masks"):
        with zipfile.ZipFile(zips / f"{name}.zip") as archive:
            archive.extractall(tmp_path / "unzipped")
    prepare_carvana(tmp_path / "unzipped", tmp_path / "from folders")
    assert contents(tmp_path / "from zips") == contents(tmp_path / "from folders")


@pytest.mark.parametrize("renames", range(4))
def test_a_killed_run_is_resumed(zips, tmp_path, monkeypatch, renames):
    prepare_carvana(zips, tmp_path / "whole")

    def killed(source, target):
        if target.name in FOUR and len(set(FOUR) & set(os.listdir(tmp_path / "data"))) == renames:
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.os, "replace", killed)
        prepare_carvana(zips, tmp_path / "data")
    prepare_carvana(zips, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_resumed_run_does_not_write_complete_files_again(zips, tmp_path, monkeypatch):
    rewrite(zips / "train.zip", "000000000005_01", lambda content: content[:-300])
    with pytest.raises(BadInput, match="000000000005_01"):
        prepare_carvana(zips, tmp_path / "data")
    (unpacked,) = (tmp_path / "data").glob(".carvana-*")
    there = {path.name: path.stat().st_mtime_ns for path in unpacked.rglob("*.*")}
    whole = (tmp_path / "drawn/train_images/000000000005_01.jpg").read_bytes()
    rewrite(zips / "train.zip", "000000000005_01", lambda _: whole)
    prepare_carvana(zips, tmp_path / "data")
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.*")}
    assert len(there) == 78 and there.items() <= now.items()


def test_what_a_run_on_another_source_left_is_not_used(zips, tmp_path):
    smaller = tmp_path / "smaller"
    shutil.copytree(zips, smaller)
    rewrite(smaller / "train.zip", "/00000000000a")
    rewrite(smaller / "train_masks.zip", "/00000000000a")
    rewrite(smaller / "train.zip", "000000000001_02", lambda content: content[:-300])
    with pytest.raises(BadInput, match="000000000001_02"):
        prepare_carvana(smaller, tmp_path / "data")
    prepare_carvana(zips, tmp_path / "data")
    prepare_carvana(zips, tmp_path / "fresh")
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("killed", [False, True])
def test_a_users_own_photos_are_not_touched(zips, tmp_path, killed):
    if killed:
        rewrite(zips / "train.zip", "000000000005_01", lambda content: content[:-300])
        with pytest.raises(BadInput, match="cannot be read"):
            prepare_carvana(zips, tmp_path / "data")
    write_pairs(tmp_path / "data", cars=1)
    before = contents(tmp_path / "data")
    with pytest.raises(BadInput, match="train_images: already exists"):
        prepare_carvana(zips, tmp_path / "data")
    assert contents(tmp_path / "data") == before


def test_members_with_unexpected_names_are_not_unpacked(zips, tmp_path):
    prepare_carvana(zips, tmp_path / "before")
    with zipfile.ZipFile(zips / "train.zip", "a") as archive:
        for member in ("../escaped.jpg", "/tmp/escaped.jpg", "train/../../0123456789ab_01.jpg"):
            archive.writestr(member, b"content")
        for name in ("sub/0123456789ab_01.jpg", "notes.txt", "0123456789ab_17.jpg", "con\n.jpg"):
            archive.writestr(f"train/{name}", b"content")
    before = contents(tmp_path)
    prepare_carvana(zips, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "before")
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith("data/")} == before


def test_links_and_encrypted_members_are_reported_as_unreadable(zips, tmp_path):
    link = zipfile.ZipInfo("train/000000000001_01.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    rewrite(zips / "train.zip", "000000000001_01")
    with zipfile.ZipFile(zips / "train.zip", "a") as archive:
        archive.writestr(link, "/etc/passwd")
    content = bytearray((zips / "train_masks.zip").read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 1  # marks the last one as encrypted
    (zips / "train_masks.zip").write_bytes(content)
    with pytest.raises(BadInput, match=r"(?s)\(2\):\n  000000000001_01.jpg: .*encrypted"):
        prepare_carvana(zips, tmp_path / "data")
    assert not set(FOUR) & set(os.listdir(tmp_path / "data"))


@pytest.mark.parametrize("bound", ["MAX_GROWTH", "MAX_PIXELS"])
def test_zips_that_unpack_to_far_too_much_are_refused(zips, tmp_path, monkeypatch, bound):
    monkeypatch.setattr(prepare, bound, 0)
    with pytest.raises(BadInput, match="would unpack to|too large"):
        prepare_carvana(zips, tmp_path / "data")


def test_files_without_a_partner_or_that_do_not_decode_are_listed(zips, tmp_path):
    rewrite(zips / "train.zip", "000000000003_01")
    with pytest.raises(BadInput, match=r"do not pair: download it again \(1\):\n  000000000003_01"):
        prepare_carvana(zips, tmp_path / "data")
    rewrite(zips / "train_masks.zip", "000000000003_01")
    rewrite(zips / "train.zip", "000000000005", lambda content: content[:-300])
    with pytest.raises(BadInput, match=r"(?s)\(2\):\n  000000000005_01.jpg: cannot be read"):
        prepare_carvana(zips, tmp_path / "data")


def test_download_says_what_to_do_if_the_client_is_missing_or_not_set_up(
    call, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = "carvana", tmp_path, "--output-dir", tmp_path, "--download"
    assert_refused(call(prepare.main, *flags), "pip install kaggle")
    (tmp_path / "kaggle").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "kaggle").chmod(0o755)
    assert_refused(call(prepare.main, *flags), "failed: put a token into")


def test_the_demo_is_drawn_but_never_over_an_existing_folder(call, tmp_path, monkeypatch):
    for name, number in {"CARS": 2, "VAL_CARS": 1, "VIEWS": 2}.items():
        monkeypatch.setattr(draw_demo, name, number)
    flags = "demo", "--output-dir", tmp_path / "demo"
    assert call(prepare.main, *flags)[0] == 0
    assert [len(list((tmp_path / "demo" / name).iterdir())) for name in FOUR] == [2] * 4
    assert_refused(call(prepare.main, *flags), "already exists")


@pytest.mark.slow
def test_a_signal_ends_the_drawing(tmp_path):
    command = [sys.executable, ROOT / "data/prepare.py", "demo", "--output-dir", tmp_path / "demo"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.rglob("*.gif")):
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert not (tmp_path / "demo").exists()
