"""Files that are whole or not there, and runs that are never overwritten."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from support.errors import BadInput
from support.writing import check_output, move_aside, save_picture, write_aside


def test_a_file_is_replaced_once_it_is_whole_and_not_before(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for content in (b"first", b"second"):
        with write_aside(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content and os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize(
    "error, line",
    [(OSError(28, "full"), r"file.txt: cannot be written \(full\): free"), (SystemExit(), "^$")],
)
def test_writing_that_fails_leaves_the_file_that_was_there(tmp_path, error, line):
    path = tmp_path / "file.txt"
    path.write_bytes(b"first")
    with pytest.raises((BadInput, SystemExit), match=line), write_aside(path) as file:
        file.write(b"sec")
        raise error
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file.txt"]


def test_many_threads_may_clear_away_what_a_killed_process_left(tmp_path):
    for number in range(50):
        (tmp_path / f".{number}.png.123-ab.partial").touch()
        os.utime(tmp_path / f".{number}.png.123-ab.partial", (0, 0))
    (tmp_path / ".another process's.png.124-ab.partial").touch()
    picture = Image.new("L", (1, 1))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: save_picture(picture, tmp_path / f"{n}.png"), range(50)))
    assert {path.name for path in tmp_path.glob("[!.]*")} == {f"{n}.png" for n in range(50)}
    assert [path.name[:8] for path in tmp_path.glob(".*")] == [".another"]


@pytest.mark.parametrize("place", ["file/new", "file"])
def test_a_folder_that_cannot_be_made_is_refused_and_not_made(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written: name another --flag"):
        check_output(tmp_path / place, "--flag")
    check_output(tmp_path / "a" / "b", "--flag")
    assert os.listdir(tmp_path) == ["file"]


def test_runs_are_moved_aside_and_never_overwritten(tmp_path, capsys):
    names = ("checkpoint", "metrics.csv")
    move_aside(tmp_path, names)
    assert not os.listdir(tmp_path) and not capsys.readouterr().out, "there was nothing to move"
    for run in ("one", "two", "three"):
        os.makedirs(tmp_path / "saved_images", exist_ok=True)
        for name in (*names, "saved_images/.gitkeep", "saved_images/pred_0.png"):
            (tmp_path / name).write_text(run)
        move_aside(tmp_path, names)
    assert "are now called *.3.previous" in capsys.readouterr().out
    for suffix, run in ((".previous", "one"), (".2.previous", "two"), (".3.previous", "three")):
        for name in (*(name + suffix for name in names), f"saved_images{suffix}/pred_0.png"):
            assert (tmp_path / name).read_text() == run
    assert os.listdir(tmp_path / "saved_images") == [".gitkeep"]
