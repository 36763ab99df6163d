import csv
import zipfile

import numpy as np
import pytest

from files import BadInput, read_mask
from submission import Submission, decode, encode

MASK = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1]], np.uint8)


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_runs_count_from_one_left_to_right_then_top_to_bottom():
    assert encode(MASK) == "2 3 9 1"
    assert encode(MASK * 255) == encode(MASK > 0) == "2 3 9 1"


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (37, 1), (64, 91)])
def test_decoding_undoes_encoding(shape, share):
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = (rng.random(shape) < share).astype(np.uint8)
        assert np.array_equal(decode(encode(mask), *shape), mask)


def test_empty_and_full_masks_have_no_run_and_one():
    assert encode(np.zeros((4, 5))) == "" and encode(np.ones((4, 5))) == "1 20"


@pytest.mark.parametrize("text", ["1", "0 2", "5 7", "3 2 1 1", "1 3 2 1", "1 -1", "a b"])
def test_what_is_no_list_of_runs_is_refused(text):
    with pytest.raises(ValueError):
        decode(text, 2, 5)


def test_the_challenges_own_runs_come_out(carvana, tmp_path):
    with zipfile.ZipFile(carvana / "kaggle" / "train_masks.zip") as archive:
        archive.extractall(tmp_path)
    rows = read(carvana / "kaggle" / "train_masks.csv")
    assert rows[0] == ["img", "rle_mask"] and len(rows) == 129
    for name, runs in rows[1:]:
        mask = read_mask(tmp_path / "train_masks" / name.replace(".jpg", "_mask.gif"))
        assert encode(mask) == runs, name
        assert np.array_equal(decode(runs, *mask.shape), mask), name


def test_rows_come_in_the_photos_order_whatever_order_they_were_added_in(tmp_path):
    path = tmp_path / "out" / "s.csv"
    with Submission(path, ["a, b.jpg", "b.jpg"], "as made") as submission:
        submission.add("b.jpg", MASK)
        submission.add("a, b.jpg", MASK * 0)
        submission.finish()
    assert read(path) == [["img", "rle_mask"], ["a, b.jpg", ""], ["b.jpg", "2 3 9 1"]]
    assert [file.name for file in path.parent.iterdir()] == ["s.csv"]


@pytest.mark.parametrize(
    "torn", [b'["b.jpg", "2 3', b'["b.jpg", "2 3"]', b"\0\0\0\n", b"[1]\n", b"1\n"]
)
def test_what_a_kill_left_unfinished_is_cut_off(tmp_path, torn):
    names = ["a.jpg", "b.jpg"]
    with Submission(tmp_path / "s.csv", names, "as made") as first:
        first.add("a.jpg", MASK)
    with open(first.rows_path, "ab") as file:
        file.write(torn)
    with Submission(tmp_path / "s.csv", names, "as made") as again:
        assert "a.jpg" in again and "b.jpg" not in again
        again.add("b.jpg", MASK)
        again.finish()
    assert read(tmp_path / "s.csv")[1:] == [["a.jpg", "2 3 9 1"], ["b.jpg", "2 3 9 1"]]


def test_rows_made_otherwise_are_not_gone_on_with_and_not_lost(tmp_path):
    with Submission(tmp_path / "s.csv", ["a.jpg"], "with a threshold of 0.5") as first:
        first.add("a.jpg", MASK)
    with Submission(tmp_path / "s.csv", ["a.jpg"], "with a threshold of 0.6") as other:
        assert "a.jpg" not in other
    with Submission(tmp_path / "s.csv", ["a.jpg"], "with a threshold of 0.5") as again:
        assert "a.jpg" in again


def test_an_incomplete_submission_keeps_its_rows_to_go_on_with(tmp_path):
    names = ["a.jpg", "b.jpg"]
    with Submission(tmp_path / "s.csv", names, "as made") as submission:
        submission.add("a.jpg", MASK)
        submission.finish()
    assert len(read(tmp_path / "s.csv")) == 2
    with pytest.raises(BadInput, match="without 1 of these photos"):
        Submission(tmp_path / "s.csv", names, "made otherwise")
    with Submission(tmp_path / "s.csv", names, "as made") as again:
        assert "a.jpg" in again and "b.jpg" not in again
        again.add("b.jpg", MASK)
        again.finish()
    assert len(read(tmp_path / "s.csv")) == 3


def test_a_whole_submission_is_made_again_only_for_other_photos_and_if_told_so(tmp_path):
    def add(name, *names, afresh=False):
        with Submission(tmp_path / "s.csv", names, "as made", afresh) as submission:
            if name in submission:
                return False
            submission.add(name, MASK)
            submission.finish()
            return True

    assert add("a.jpg", "a.jpg") and not add("a.jpg", "a.jpg")
    with pytest.raises(BadInput, match="add --overwrite"):
        add("b.jpg", "a.jpg", "b.jpg")
    assert add("b.jpg", "b.jpg", afresh=True)
    assert read(tmp_path / "s.csv")[1:] == [["b.jpg", "2 3 9 1"]]


def test_two_processes_do_not_make_one_submission(tmp_path):
    pytest.importorskip("fcntl")
    with (
        Submission(tmp_path / "s.csv", ["a.jpg"], "as made") as first,
        pytest.raises(BadInput, match="another process"),
    ):
        first.add("a.jpg", MASK)
        Submission(tmp_path / "s.csv", ["a.jpg"], "as made")


def test_neither_a_folder_nor_a_photo_is_a_submission(tmp_path):
    (tmp_path / "a.csv").mkdir()
    for path in (tmp_path / "a.csv", ".", tmp_path / "photo.jpg"):
        with pytest.raises(BadInput, match="ends in .csv"):
            Submission(path, [], "as made")
