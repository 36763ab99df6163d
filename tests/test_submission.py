import csv
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT, assert_refused, write_pairs

import predict
from support.masks import read_mask
from support.submission import Submission, decode, encode

MASK = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1]])


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 1])
def test_decoding_undoes_encoding(share):
    assert encode(MASK) == encode(MASK * 255) == "2 3 9 1"  # left to right, then top to bottom
    for shape in ((1, 1), (1, 50), (37, 1), (64, 91)):
        mask = np.random.default_rng(1).random(shape) < share
        assert np.array_equal(decode(encode(mask), *shape), mask)


@pytest.mark.parametrize("text", ["1", "0 2", "5 7", "3 2 1 1", "1 3 2 1", "1 -1", "a b"])
def test_what_is_no_list_of_runs_is_refused(text):
    with pytest.raises(ValueError):
        decode(text, 2, 5)


@pytest.mark.slow
def test_the_challenges_own_runs_come_out(carvana, tmp_path):
    with zipfile.ZipFile(carvana / "kaggle" / "train_masks.zip") as archive:
        archive.extractall(tmp_path)
    for name, runs in read(carvana / "kaggle" / "train_masks.csv")[1:]:
        mask = read_mask(tmp_path / "train_masks" / name.replace(".jpg", "_mask.gif"))
        assert encode(mask) == runs, name
        assert np.array_equal(decode(runs, *mask.shape), mask // 255), name


def test_rows_are_gone_on_with_but_not_those_made_otherwise_nor_one_left_unfinished(tmp_path):
    names = ['a, "b".jpg', "b.jpg"]
    first = Submission(tmp_path / "s.csv", names, "a threshold of 0.5")
    first.add(f"photos/{names[0]}", "")
    with open(first.partial, "ab") as file:
        file.write(b"b.jpg,2 3")
    assert names[0] not in Submission(tmp_path / "s.csv", names, "a threshold of 0.6")
    again = Submission(tmp_path / "s.csv", names, "a threshold of 0.5")
    assert names[0] in again and "b.jpg" not in again
    again.add("b.jpg", "2 3 9 1")
    again.finish()
    assert read(tmp_path / "s.csv") == [["img", "rle_mask"], [names[0], ""], ["b.jpg", "2 3 9 1"]]
    assert [file.name for file in tmp_path.iterdir()] == ["s.csv"]


def test_a_folder_in_the_submissions_place_is_refused_before_the_work(
    call, network, photos, tmp_path
):
    flags = "--checkpoint", network, "--submission", tmp_path, "--device", "cpu", "--overwrite"
    assert_refused(call(predict.main, photos, *flags), "is a folder", "name a file")


def test_a_submission_that_exists_is_made_again_only_with_overwrite(
    call, network, photos, tmp_path
):
    flags = "--checkpoint", network, "--submission", tmp_path / "s.csv", "--device", "cpu"
    assert call(predict.main, photos, *flags)[0] == 0
    rows = read(tmp_path / "s.csv")
    assert [name for name, _ in rows[1:]] == sorted(path.name for path in photos.iterdir())
    predictor = predict.Predictor(network, "cpu")
    for name, runs in rows[1:]:
        assert np.array_equal(decode(runs, 48, 72), predictor.mask(photos / name) > 0)
    assert "10 are done already" in call(predict.main, photos, *flags)[1]
    min(photos.iterdir()).rename(photos / "other.jpg")
    assert "add --overwrite" in call(predict.main, photos, *flags)[2]
    assert read(tmp_path / "s.csv") == rows
    call(predict.main, photos, *flags, "--overwrite")
    assert read(tmp_path / "s.csv")[-1] == ["other.jpg", rows[1][1]]


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(network, tmp_path):
    photos, _ = write_pairs(tmp_path, cars=100)
    flags = f"--checkpoint {network} --submission s.csv --device cpu --batch-size 1".split()
    command = [sys.executable, ROOT / "predict.py", photos, *flags]
    with subprocess.Popen(command, cwd=tmp_path) as killed:
        while not any(path.read_bytes().count(b"\n") > 20 for path in tmp_path.glob("s.csv.*")):
            assert killed.poll() is None
        killed.kill()
    assert not (tmp_path / "s.csv").exists()
    assert b"are done already" in subprocess.check_output(command, cwd=tmp_path)
    names = [row[0] for row in read(tmp_path / "s.csv")]
    assert names == ["img", *sorted(path.name for path in photos.iterdir())]
