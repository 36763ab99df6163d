import csv
import zipfile

import numpy as np
import pytest

from files import read_mask
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
    submission = Submission(tmp_path / "out" / "s.csv", "as made")
    submission.add("b.jpg", MASK)
    submission.add("a, b.jpg", MASK * 0)
    submission.finish(["a, b.jpg", "b.jpg"])
    assert read(submission.path) == [["img", "rle_mask"], ["a, b.jpg", ""], ["b.jpg", "2 3 9 1"]]
    assert [path.name for path in submission.path.parent.iterdir()] == ["s.csv"]


@pytest.mark.parametrize(
    "torn", [b'["b.jpg", "2 3', b'["b.jpg", "2 3"]', b"\0\0\0\n", b"[1, 2, 3]\n"]
)
def test_what_a_kill_left_unfinished_is_cut_off(tmp_path, torn):
    first = Submission(tmp_path / "s.csv", "as made")
    first.add("a.jpg", MASK)
    first.close()
    with open(first.rows_path, "ab") as file:
        file.write(torn)
    again = Submission(tmp_path / "s.csv", "as made")
    assert "a.jpg" in again and "b.jpg" not in again
    again.add("b.jpg", MASK)
    again.finish(["a.jpg", "b.jpg"])
    assert read(tmp_path / "s.csv")[1:] == [["a.jpg", "2 3 9 1"], ["b.jpg", "2 3 9 1"]]


def test_rows_made_otherwise_are_not_gone_on_with_and_not_lost(tmp_path):
    first = Submission(tmp_path / "s.csv", "with a threshold of 0.5")
    first.add("a.jpg", MASK)
    first.close()
    other = Submission(tmp_path / "s.csv", "with a threshold of 0.6")
    assert "a.jpg" not in other
    other.close()
    again = Submission(tmp_path / "s.csv", "with a threshold of 0.5")
    assert "a.jpg" in again
    again.close()


def test_an_incomplete_submission_keeps_its_rows_to_go_on_with(tmp_path):
    submission = Submission(tmp_path / "s.csv", "as made")
    submission.add("a.jpg", MASK)
    submission.finish(["a.jpg", "b.jpg"], complete=False)
    submission.close()
    assert len(read(tmp_path / "s.csv")) == 2
    again = Submission(tmp_path / "s.csv", "as made")
    assert "a.jpg" in again and "b.jpg" not in again
    again.add("b.jpg", MASK)
    again.finish(["a.jpg", "b.jpg"])
    assert len(read(tmp_path / "s.csv")) == 3
    assert "c.jpg" in Submission(tmp_path / "s.csv", "as made"), "a whole one is not made again"
