import csv
import io
import re
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, draw_pair
from PIL import Image

import export
import predict
import test as evaluation
import train
from checkpoints import SHIPPED
from files import read_mask, read_photo
from predictor import Predictor
from submission import decode


@pytest.fixture
def run(call, network, tmp_path, monkeypatch):
    """Call predict.py in tmp_path: run(*photos and flags) -> (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: call(predict.main, "--checkpoint", network, "--device", "cpu", *flags)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_each_photo_of_a_folder_gets_a_mask_of_its_own_size(run, photos, network):
    Image.fromarray(np.full((30, 500, 3), 255, np.uint8)).save(photos / "wide.png")
    code, out, err = run(photos)
    assert code == 0 and err == "", err
    assert names("predictions") == sorted(f"{p.stem}_mask.png" for p in photos.iterdir())
    assert "11 photos at 160x240 on cpu" in out and "predictions/*_mask.png" in out
    predictor = Predictor(network, "cpu")
    for photo in photos.iterdir():
        with Image.open(f"predictions/{photo.stem}_mask.png") as mask, Image.open(photo) as image:
            assert mask.mode == "L" and mask.size == image.size
            assert np.array_equal(np.asarray(mask), predictor.mask(photo))
    assert np.asarray(Image.open("predictions/wide_mask.png")).min() == 255


def test_masks_have_the_dice_that_full_size_evaluation_gives_them(call, run, data, tmp_path):
    run(data / "train_images")
    folders = "--image-dir", data / "train_images", "--mask-dir", data / "train_masks"
    flags = "--checkpoint", tmp_path / "bright.pth.tar", "--full-size", "--device", "cpu"
    call(evaluation.main, *folders, *flags, "--output-dir", tmp_path, "--csv", tmp_path / "s.csv")
    for row in read_csv(tmp_path / "s.csv")[1:]:
        found = read_mask(f"predictions/{row[0]}_mask.png")
        true = read_mask(data / "train_masks" / f"{row[0]}_mask.gif")
        dice = 2 * (found & true).sum() / (found.sum() + true.sum())
        assert dice == pytest.approx(float(row[3]), abs=1e-3)


def test_photos_of_all_kinds_are_taken(run, photos):
    photo = Image.open(min(photos.iterdir())).convert("RGB")
    folder = Path("kinds")
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=turned, quality=98)
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "tiff.tif", exif=turned)
    photo.convert("CMYK").save(folder / "cmyk.jpg", quality=98)
    photo.convert("L").save(folder / "grey.png")
    deep = (np.asarray(photo.convert("L")).astype(np.uint16) * 257,)
    Image.fromarray(*deep).save(folder / "deep.png")
    photo.putalpha(128)
    photo.save(folder / "alpha.webp", lossless=True)
    photo.convert("P").save(folder / "palette.PNG")
    photo.convert("RGB").save(
        folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", photo.size)]
    )
    code, _, err = run(folder, "--cutout")
    assert code == 0, err
    for path in folder.iterdir():
        with Image.open(f"predictions/{path.stem}_mask.png") as mask:
            assert mask.size == (72, 48), path
        with Image.open(f"predictions/{path.stem}_cutout.png") as cutout:
            assert cutout.mode == "RGBA" and cutout.size == (72, 48)
    first = read_mask("predictions/alpha_mask.png")
    for name in ("turned", "tiff", "cmyk", "moving"):
        assert (read_mask(f"predictions/{name}_mask.png") == first).mean() > 0.97, name


def spoil(photos):
    """Make five bad photos of a folder's ten; returns their paths."""
    bad = sorted(photos.iterdir())[:5]
    bad[0].write_bytes(b"")
    bad[1].write_text("no photo at all")
    bad[2].write_bytes(bad[2].read_bytes()[:-600])
    bad[3].unlink()
    bad[3] = bad[3].with_suffix(".tif")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(bad[3])
    bad[4].unlink()
    bad[4] = bad[4].with_suffix(".png")
    Image.new("1", (16000, 16000)).save(bad[4])
    return bad


def test_bad_photos_are_listed_at_the_end_and_stop_no_other(run, photos):
    bad = spoil(photos)
    code, out, err = run(photos, "--batch-size", 4, "--submission", "s.csv", "--output", "out")
    assert code == 1 and "5 photos in" in out
    assert err.startswith("photos that cannot be used (5):\n") and len(err.splitlines()) == 6
    assert all(path.name in err for path in bad)
    good = sorted(set(photos.iterdir()) - set(bad))
    assert names("out") == [f"{path.stem}_mask.png" for path in good]
    assert [row[0] for row in read_csv("s.csv")[1:]] == [path.name for path in good]


def test_mended_photos_are_all_that_another_run_has_to_do(run, photos):
    bad = spoil(photos)
    run(photos, "--submission", "s.csv")
    Image.new("RGB", (4, 4), "white").save(bad[0])
    code, out, _ = run(photos, "--submission", "s.csv")
    assert code == 1 and "5 are done already" in out
    assert read_csv("s.csv")[1] == [bad[0].name, "1 16"]


def test_nothing_but_bad_photos_is_bad_input(run, photos):
    bad = spoil(photos)
    assert run(*bad)[0] == 2
    assert not Path("predictions").exists()


def test_what_exists_is_made_again_only_with_overwrite(run, photos):
    run(photos)
    files = sorted(Path("predictions").iterdir())
    for file in files:
        file.write_text("of an earlier run")
    files[3].unlink()
    code, out, _ = run(photos)
    assert code == 0 and "9 are done already" in out and "1 photos at" in out
    assert [file.read_bytes() == b"of an earlier run" for file in files].count(False) == 1
    code, out, _ = run(photos, "--overwrite")
    assert code == 0 and "already" not in out
    assert all(read_mask(file).shape == (48, 72) for file in files)


def test_pictures_asked_for_later_are_added(run, photos):
    Image.new("RGB", (100, 100), (0, 0, 255)).save("sea.png")
    photo = min(photos.iterdir())
    run(photo)
    more = "--cutout", "--overlay", "--probability", 16, "--background", "sea.png"
    assert run(photo, *more)[0] == 0
    assert names("predictions") == [
        f"{photo.stem}_{kind}.png"
        for kind in ("background", "cutout", "mask", "overlay", "probability")
    ]
    mask = read_mask(f"predictions/{photo.stem}_mask.png").astype(bool)
    cutout = np.asarray(Image.open(f"predictions/{photo.stem}_cutout.png"))
    assert np.array_equal(cutout[..., 3] > 127, mask)
    assert np.array_equal(cutout[..., :3], read_photo(photo))
    background = read_photo(f"predictions/{photo.stem}_background.png")
    assert (background[cutout[..., 3] == 0] == (0, 0, 255)).all()


def test_a_cut_out_keeps_its_photos_colour_profile(run, photos):
    path = min(photos.iterdir())
    Image.open(path).save(path.with_suffix(".webp"), icc_profile=b"wide")
    run(path.with_suffix(".webp"), "--cutout")
    with Image.open(f"predictions/{path.stem}_cutout.png") as cutout:
        assert cutout.info["icc_profile"] == b"wide"


def test_a_long_name_is_no_hindrance_until_none_is_left_for_the_results(run, photos):
    path = min(photos.iterdir())
    path.rename(photos / ("x" * 235 + ".jpg"))
    assert run(photos)[0] == 0 and len(names("predictions")) == 10
    (photos / ("x" * 235 + ".jpg")).rename(photos / ("x" * 250 + ".jpg"))
    code, _, err = run(photos)
    assert code == 2 and "give it a shorter one" in err


def test_a_threshold_moves_the_mask(run, photos):
    counts = []
    for threshold in (0.48, 0.5, 0.55):
        run(photos, "--threshold", threshold, "--output", str(threshold))
        counts.append(sum(read_mask(path).sum() for path in Path(str(threshold)).iterdir()))
    assert counts[0] > counts[1] > counts[2] > 0


def test_patterns_mean_the_files_that_fit(run, photos):
    (photos / "more").mkdir()
    assert run(f"{photos}/**/*_01.jpg", f"{photos}/*", min(photos.iterdir()))[0] == 0
    assert len(names("predictions")) == 10


@pytest.mark.parametrize(
    "flags, line",
    [
        (["nowhere"], "nowhere: no such photo or folder"),
        (["nowhere/*.jpg"], "no such photo or folder"),
        (["empty"], "empty: holds no images"),
        (["PHOTOS", "--output", "PHOTOS"], "name another folder with --output"),
        (["PHOTOS", "other"], "photos of one name"),
        (["PHOTOS", "--background", "nowhere.jpg"], "nowhere.jpg: no such file"),
        (["PHOTOS", "--output", "x" * 300], "cannot be written"),
        (["PHOTOS", "--submission", "s.jpg"], "s.jpg: no CSV file"),
        (["PHOTOS", "--threshold", "1"], "no number between 0 and 1"),
        (["PHOTOS", "--submission", "s.csv", "--cutout"], "name a folder with --output"),
        (["PHOTOS", "--output", "/dev/null/x"], "cannot be written"),
        (["PHOTOS", "--submission", "/dev/null/x/s.csv"], "cannot be written"),
        (["PHOTOS", "--checkpoint", "nowhere.pth"], "nowhere.pth: no such checkpoint"),
        ([], "arguments are required: PHOTO"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(run, photos, flags, line):
    Path("empty").mkdir()
    Path("other").mkdir()
    Image.new("RGB", (4, 4)).save(Path("other", min(photos.iterdir()).name).with_suffix(".png"))
    Path("s.jpg").write_text("a photo")
    code, _, err = run(*(str(photos) if flag == "PHOTOS" else flag for flag in flags))
    assert code == 2 and line in err and "Traceback" not in err
    assert not Path("predictions").exists()


@pytest.mark.parametrize("flags", ["--cutout", "--submission S"])
def test_a_disk_that_is_full_ends_the_run_and_leaves_nothing_half_written(
    photos, network, tmp_path, flags
):
    for path in photos.iterdir():
        Image.open(path).resize((720, 480)).save(path)
    flags = flags.replace("S", str(tmp_path / "s.csv")) if "S" in flags else flags
    limited = (
        "import resource, signal, sys, predict, command_line\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "command_line.run_script(predict.main)\n"
    )
    command = [sys.executable, "-c", limited, str(photos), "--checkpoint", str(network)]
    flags = [*flags.split(), "--output", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written (" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    for path in (tmp_path / "out").glob("*"):
        Image.open(path).load()
    assert not (tmp_path / "s.csv").exists()


def test_a_submission_alone_writes_the_masks_as_runs_and_no_pictures(run, photos):
    assert run(photos, "--submission", "s.csv")[0] == 0
    assert not Path("predictions").exists()
    run(photos)
    rows = read_csv("s.csv")
    assert rows[0] == ["img", "rle_mask"]
    assert [row[0] for row in rows[1:]] == names(photos)
    for name, runs in rows[1:]:
        mask = read_mask(f"predictions/{Path(name).stem}_mask.png")
        assert np.array_equal(decode(runs, *mask.shape), mask)


def test_a_submission_that_exists_is_made_again_only_with_overwrite(run, photos):
    run(photos, "--submission", "s.csv")
    whole = Path("s.csv").read_text()
    Path("s.csv").write_text(whole.replace(" ", "  "))
    assert "10 are done already" in run(photos, "--submission", "s.csv")[1]
    assert Path("s.csv").read_text() == whole.replace(" ", "  ")
    assert run(photos, "--submission", "s.csv", "--overwrite")[0] == 0
    assert Path("s.csv").read_text() == whole


def test_a_long_submission_takes_no_more_memory_and_survives_a_kill(network, tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(50):
        buffer = io.BytesIO()
        draw_pair(rng, (72, 48))[0].save(buffer, "jpeg")
        drawn.append(buffer.getvalue())
    for number in range(1000):
        (tmp_path / "photos" / f"{number:04d}.jpg").write_bytes(drawn[number * 7 % 50])

    def start(name):
        flags = ["--checkpoint", str(network), "--submission", str(tmp_path / name / "s.csv")]
        command = [sys.executable, "predict.py", str(tmp_path / "photos"), *flags]
        size = ["--image-height", "64", "--image-width", "96", "--device", "cpu"]
        with open(tmp_path / f"{name}.log", "w") as log:
            return subprocess.Popen([*command, *size], cwd=ROOT, stdout=log, stderr=log)

    def rows(name):
        lines = [file.read_bytes().count(b"\n") for file in (tmp_path / name).glob(".s.csv.*.rows")]
        return lines[0] if lines else 0

    whole, memory = start("whole"), []
    while whole.poll() is None:
        done = rows("whole")
        statm = Path(f"/proc/{whole.pid}/statm")
        if done and statm.exists() and (pages := statm.read_text().split()):
            memory.append((done, int(pages[1])))
        time.sleep(0.01)
    assert whole.returncode == 0
    first = [pages for done, pages in memory if 50 < done <= 300]
    last = [pages for done, pages in memory if 700 < done < 1000]
    if memory:  # where /proc tells
        assert statistics.median(last) < 1.05 * statistics.median(first)

    killed = start("parts")
    while rows("parts") < 400:
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "parts" / "s.csv").exists()
    again = start("parts")
    assert again.wait(timeout=300) == 0
    kept = re.search(r"(\d+) are done already", (tmp_path / "parts.log").read_text())
    assert int(kept.group(1)) >= 400
    whole, parts = (tmp_path / name / "s.csv" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes() and len(read_csv(whole)) == 1001
    assert names(tmp_path / "parts") == ["s.csv"]


def test_a_grey_network_goes_through_training_evaluation_prediction_and_export(
    call, data, tmp_path, monkeypatch, float32
):
    monkeypatch.chdir(tmp_path)
    grey = "--in-channels 1 --features 64 128 --image-height 128 --image-width 128".split()
    flags = ["--data-dir", data, *grey, "--output-dir", tmp_path, "--batch-size", 4]
    assert call(train.main, *flags, "--epochs", 1, "--lr", "1e-3", "--device", "cpu")[0] == 0
    assert call(evaluation.main, "--output-dir", tmp_path, "--device", "cpu")[0] == 0
    best = ["--checkpoint", tmp_path / train.BEST_CHECKPOINT, "--device", "cpu"]
    code, out, err = call(predict.main, data / "train_images", *best, "--cutout")
    assert code == 0 and "at 128x128" in out, err
    assert np.asarray(Image.open(min(Path("predictions").glob("*_cutout.png")))).shape == (
        48,
        72,
        4,
    )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is in requirements-extra.txt")
    code, _, err = call(export.main, data / "train_images", *best[:2], "--output", "grey.onnx")
    assert code == 0, err
    flags = ["--checkpoint", "grey.onnx", "--output", "onnx"]
    assert call(predict.main, data / "train_images", *flags)[0] == 0
    for path in Path("onnx").iterdir():
        same = read_mask(path) == read_mask(Path("predictions") / path.name)
        assert same.mean() > 0.999


def test_photos_that_were_never_seen_get_masks_of_cars(call, carvana, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(carvana / "kaggle" / "test.zip") as archive:
        for name in sorted(archive.namelist())[1:24:6]:
            archive.extract(name)
    flags = ["--checkpoint", ROOT / SHIPPED, "--device", "cpu", "--cutout", "--background", "teal"]
    code, _, err = call(predict.main, "test", *flags)
    assert code == 0 and len(names("predictions")) == 12, err
    for path in Path("predictions").glob("*_mask.png"):
        mask = read_mask(path)
        assert mask.shape == (1280, 1918)
        assert 0.08 < mask.mean() < 0.42  # as masks of this challenge do
        assert mask[:200].mean() < 0.01 and mask[-100:].mean() < 0.01
