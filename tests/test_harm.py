"""Harm done for real: kills at any moment, full disks, read-only folders, files that vanish.

python -m pytest tests/test_harm.py                 a minute of it
python -m pytest tests/test_harm.py -m torture -s   the long versions, which print their figures
"""

import contextlib
import csv
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, assert_same_run, draw_pair, start, workers_of, write_pairs
from PIL import Image
from test_prepare import contents, zips  # noqa: F401  (a fixture)

import check_data
import command_line
import predict
import test as evaluation
import train
from checkpoints import load_checkpoint
from data import prepare
from data.prepare import prepare_carvana
from run import COLUMNS, Run

FLAGS = [*SMALL, "--batch-size", "2", "--lr", "1e-2", "--epochs", "3", "--save-every", "1"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's limits and /proc")


@pytest.fixture
def fork(forkserver):
    """Start a script in a process of its own: fork(argv, log, limit, main) -> Process.

    `limit`, in bytes, is the size of files that it may write.
    """

    def fork(argv, log, limit=resource.RLIM_INFINITY, main=train.main):
        process = forkserver.Process(target=run_main, args=(main, [*map(str, argv)], log, limit))
        process.start()
        return process

    return fork


def run_main(main, argv, log, limit):
    sys.stdout = sys.stderr = io.StringIO()
    multiprocessing.set_start_method(None, force=True)  # for workers, as in a process of its own
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        command_line.run_script(lambda: main(argv))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, [resource.RLIM_INFINITY] * 2)
        log.write_text(sys.stdout.getvalue())


def read_whole(folder):
    """Read each file of a folder to its end, but for those a kill left aside; how many there are.

    What is read of each is all that it should have.
    """
    count = 0
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.endswith(".partial"):
            continue
        count += 1
        kind = path.name.partition(".previous")[0].rpartition(".")[2].rstrip("0123456789")
        if kind in ("tar",):
            assert set(load_checkpoint(path)) >= {"optimizer", "part", "history"}
        elif kind == "png":
            with Image.open(path) as image:
                image.load()
        elif kind == "csv":
            with open(path) as file:
                rows = list(csv.DictReader(file))
            assert rows and all(row[name] for row in rows for name in COLUMNS)
        elif kind == "npy":
            np.load(path, mmap_mode="r")
        else:
            raise AssertionError(f"{path}: nobody knows what this is")
    return count


def wait(process, rng, seconds, *folders):
    """Until a random moment, or until a file is being written; then SIGKILL. Whether it was alive.

    The second of the pair is whether it was in the middle of writing.
    """
    end = time.monotonic() + rng.uniform(0, seconds)
    writing = rng.random() < 0.5  # else whatever it does then
    partial = lambda: any(list(f.rglob("*.partial")) for f in folders)  # noqa: E731
    while process.is_alive():
        if partial() if writing else time.monotonic() > end:
            break
        time.sleep(0.0005)
    workers = []
    with contextlib.suppress(OSError):  # it may just have ended
        workers = workers_of(process)
    process.kill()
    process.join()
    end = time.monotonic() + 60
    while any(map(lives, workers)):
        assert time.monotonic() < end, "its workers live on"
        time.sleep(0.0005)
    return process.exitcode == -signal.SIGKILL, partial()


def lives(pid):
    """Whether there is such a process, and it is no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def torment(fork, tmp_path, kills, flags=(), seed=0):
    """Kill runs until so many kills are survived; figures of what happened, a Counter."""
    rng, done = random.Random(seed), Counter()
    data = tmp_path / "data"
    write_pairs(data, cars=8, views=2, size=(240, 160))
    argv = ["--data-dir", data, *FLAGS, *flags]
    begin = time.monotonic()
    whole = fork([*argv, "--output-dir", tmp_path / "whole"], tmp_path / "log")
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "log").read_text()
    seconds = time.monotonic() - begin

    while done["kills"] < kills:
        run = tmp_path / f"run{done['runs']}"
        run.mkdir()
        shutil.rmtree(data / ".cache", ignore_errors=True)
        while True:
            process = fork([*argv, "--output-dir", run, "--load-model"], tmp_path / "log")
            killed, writing = wait(process, rng, seconds, run, data)
            if not killed:
                break
            done["kills"] += 1
            done["while a file was being written"] += writing
            done["files read whole"] += read_whole(run) + read_whole(data / ".cache")
            for partial in [*run.rglob("*.partial"), *data.rglob("*.partial")]:
                partial.unlink()  # as remove_leftovers does once they are old
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        assert_same_run(tmp_path / "whole", run)
        done["runs"] += 1
        done["files read whole"] += read_whole(run)
    return done


def test_runs_killed_at_any_moment_end_as_one_never_killed(fork, tmp_path):
    done = torment(fork, tmp_path, 6, seed=1)
    assert done["runs"] >= 1 and done["files read whole"] > 20


@pytest.mark.torture
@pytest.mark.parametrize(
    "flags", ["", "--no-cache", "--num-workers 2 --ema 0.9 --scheduler onecycle --accumulate 2"]
)
def test_many_runs_killed_at_any_moment_end_as_one_never_killed(fork, tmp_path, flags):
    done = torment(fork, tmp_path, 100, flags.split(), seed=2)
    print(f"\ntrain.py {flags}: {dict(done)}, files lost: 0")


def torment_prepare(fork, zips, tmp_path, kills):  # noqa: F811
    """Kill prepare.py so many times; figures of what happened, a Counter."""
    rng, done, log = random.Random(0), Counter(), tmp_path / "log"
    prepare_carvana(zips, tmp_path / "whole")
    while done["kills"] < kills:
        data = tmp_path / f"data{done['times']}"
        while True:
            process = fork(["carvana", zips, "--output-dir", data], log, main=prepare.main)
            time.sleep(rng.uniform(0, 0.5) ** rng.choice([1, 2]))
            process.kill()
            process.join()
            for folder in ("train_images", "val_images"):  # where there are photos they are whole
                found = contents(data / folder) if (data / folder).is_dir() else {}
                assert found == (contents(tmp_path / "whole" / folder) if found else {})
                done["files read whole"] += len(found)
            if process.exitcode != -signal.SIGKILL:
                break
            done["kills"] += 1
        assert process.exitcode == 0 or "exists already" in log.read_text(), log.read_text()
        assert contents(data) == contents(tmp_path / "whole")
        assert sorted(os.listdir(data)) == sorted(prepare.FOLDERS)
        done["times"] += 1
    return done


def test_prepare_killed_at_any_moment_ends_with_the_same_files(fork, zips, tmp_path):  # noqa: F811
    assert torment_prepare(fork, zips, tmp_path, 8)["times"] >= 1


@pytest.mark.torture
def test_prepare_killed_many_times_ends_with_the_same_files(fork, zips, tmp_path):  # noqa: F811
    print(f"\nprepare.py: {dict(torment_prepare(fork, zips, tmp_path, 100))}, files lost: 0")


# Disks and folders


def test_a_disk_that_is_full_anywhere_costs_no_more_than_a_restart(fork, tmp_path):
    write_pairs(tmp_path / "data", cars=3)
    argv = ["--data-dir", tmp_path / "data", *FLAGS, "--output-dir"]
    whole = fork([*argv, tmp_path / "whole"], tmp_path / "log")
    whole.join()
    shutil.rmtree(tmp_path / "data" / ".cache")
    cache = 6 * 32 * 48 * 4 + 128
    for limit, refused, epochs in (
        (8192, ".npy", 3),
        (cache, ".tar", 3),
        (None, None, 1),  # and then on with a run
        (100, ".csv", 3),
        (2048, ".png", 3),
    ):
        limits = [limit] if limit else []
        again = [*argv, tmp_path / "run", "--epochs", epochs, "--load-model"]
        process = fork(again, tmp_path / "log", *limits)
        process.join()
        text = (tmp_path / "log").read_text()
        assert process.exitcode == (2 if limit else 0) and "Traceback" not in text, text
        if limit:
            error = text[text.index("error: ") :]
            name, reason = error.removeprefix("error: ").split(": cannot be written (")
            assert len(error.splitlines()) == 1 and "free some space" in reason, error
            assert Path(name).suffix == refused
        read_whole(tmp_path / "data" / ".cache")
        read_whole(tmp_path / "run")
        assert not list(tmp_path.rglob("*.partial"))
    process = fork([*argv, tmp_path / "run", "--load-model"], tmp_path / "log")
    process.join()
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("flag", ["--output-dir", "--cache-dir"])
def test_a_folder_that_cannot_be_written_is_named(data, call, tmp_path, flag):
    place = Path("/proc/harm")  # where root may not write either
    folders = {"--output-dir": tmp_path / "run"} | {flag: place}
    flags = [part for pair in folders.items() for part in pair]
    code, _, err = call(train.main, "--data-dir", data, *flags, *SMALL)
    assert code == 2 and "/proc/harm" in err and len(err.strip().splitlines()) == 1, err
    assert flag in err and not (tmp_path / "run").exists()


# Photos


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", ["removed", "cut off", "replaced by a text", "made smaller"])
def test_a_photo_harmed_between_epochs_is_named_and_the_run_goes_on_once_it_is_back(
    fit, data, tmp_path, monkeypatch, harm, workers
):
    flags = ["--epochs", 2, "--no-cache", "--num-workers", workers]
    assert fit("whole", *flags)[0] == 0
    photo = sorted((data / "train_images").iterdir())[0]
    content = photo.read_bytes()
    end_epoch = Run.end_epoch

    def end_and_harm(run, row):
        end_epoch(run, row)
        if harm == "removed":
            photo.unlink()
        elif harm == "made smaller":
            Image.open(photo).resize((36, 24)).save(photo)
        else:
            photo.write_bytes(content[:-300] if harm == "cut off" else b"text")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_epoch", end_and_harm)
        code, _, err = fit("run", *flags)
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert f"{photo}: " in err and "holds the run up to" in err and "to go on: " in err
    photo.write_bytes(content)
    assert fit("run", *flags, "--load-model")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_photo_harmed_after_it_is_cached_does_no_harm(fit, data, tmp_path, monkeypatch):
    fit("whole", "--epochs", 2)
    end_epoch = Run.end_epoch

    def end_and_remove(run, row):
        end_epoch(run, row)
        shutil.rmtree(data / "train_images", ignore_errors=True)

    monkeypatch.setattr(Run, "end_epoch", end_and_remove)
    assert fit("run", "--epochs", 2)[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# Long runs


def figures_of(process):
    """What a process and its children hold now: {what: how much}."""
    found = Counter()
    for pid in (process.pid, *workers_of(process)):
        found["file descriptors"] += len(os.listdir(f"/proc/{pid}/fd"))
        found["threads"] += len(os.listdir(f"/proc/{pid}/task"))
        with open(f"/proc/{pid}/statm") as statm:
            found["resident MiB"] += int(statm.read().split()[1]) * resource.getpagesize() / 2**20
    found["shared MiB"] = shutil.disk_usage("/dev/shm").used / 2**20
    return found


def figures_over(epochs, photos, folder):
    """Train with workers under `ulimit -n 256`; a list of figures_of, one an epoch."""
    write_pairs(folder / "data", cars=photos // 2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        flags = ["--epochs", epochs, "--num-workers", 2, "--batch-size", 16]
        process = start(folder / "data", folder / "run", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with process:
        figures = [figures_of(process) for line in process.stdout if line.startswith("epoch ")]
        assert process.wait() == 0, process.stderr.read()
    return figures


def test_descriptors_threads_and_shared_memory_stay_the_same(tmp_path):
    figures = figures_over(8, 10, tmp_path)
    for name in ("file descriptors", "threads"):
        held = [one[name] for one in figures[2:-1]]
        assert max(held) - min(held) <= 2, (name, figures)
    assert max(one["file descriptors"] for one in figures) < 256


@pytest.mark.torture
@pytest.mark.parametrize("epochs, photos", [(20, 2000), (80, 100)])
def test_a_long_run_holds_no_more_at_its_end(epochs, photos, tmp_path):
    figures = figures_over(epochs, photos, tmp_path)[1:-1]  # the last may be ending already
    print(f"\n{epochs} epochs over {photos} photos")
    for name in figures[0]:
        values = np.array([one[name] for one in figures])
        slope, late = (
            np.polyfit(np.arange(len(part)), part, 1)[0] for part in (values, values[epochs // 2 :])
        )
        print(
            f"{name}: {values.min():.0f} to {values.max():.0f}, {slope:+.3f} an epoch, "
            f"{late:+.3f} over the second half"
        )
        assert abs(slope) * len(values) < 0.05 * values.max() + 0.5, (name, values)


# Names

NAMES = [
    "with spaces",
    "new\nline",
    "quo'te\"s",
    "äöü 照片 🚗",
    "-dash",
    "--epochs",
    "red \x1b[31m",
    os.fsdecode(b"broken \xff"),
    "100% {0} [a]*?",
]


def test_any_name_that_the_system_allows_is_taken(call, network, tmp_path, monkeypatch):
    data, rng = tmp_path / "my \n photos", np.random.default_rng(0)
    images, masks = data / "train_images", data / "train_masks"
    images.mkdir(parents=True), masks.mkdir()
    for name in NAMES:
        photo, mask = draw_pair(rng, (72, 48))
        photo.save(images / f"{name}.jpg"), mask.save(masks / f"{name}_mask.gif")

    def run(main, *flags, codes=(0,)):
        code, out, err = call(main, *flags)
        assert code in codes, err
        for text in (out, err):
            assert text.encode(errors="strict") is not None and "\x1b" not in text
            assert "new\nline" not in text and "my \n photos" not in text
        return out, err

    folder = tmp_path / "run"
    run(train.main, "--data-dir", data, "--output-dir", folder, *SMALL, "--epochs", 1)
    flags = ["--image-dir", images, "--mask-dir", masks, "--csv", tmp_path / "scores.csv"]
    out, _ = run(evaluation.main, "--output-dir", folder, "--device", "cpu", *flags)
    assert "new\\nline" in out and "照片" in out
    with open(tmp_path / "scores.csv", newline="", errors="surrogateescape") as file:
        assert {row["photo"] for row in csv.DictReader(file)} == set(NAMES)

    flags = ["--checkpoint", network, "--device", "cpu", "--submission", tmp_path / "s.csv"]
    run(predict.main, images, *flags, "--output", tmp_path / "masks", "--cutout")
    assert len(list((tmp_path / "masks").iterdir())) == 2 * len(NAMES)
    with open(tmp_path / "s.csv", newline="", errors="surrogateescape") as file:
        assert {row["img"] for row in csv.DictReader(file)} == {f"{name}.jpg" for name in NAMES}
    monkeypatch.chdir(images)
    run(predict.main, *flags[:4], "--output", tmp_path / "dash", "--", "-dash.jpg", "--epochs.jpg")
    assert len(list((tmp_path / "dash").iterdir())) == 2

    sheet = ["--sheet", tmp_path / "sheet.png"]
    out, _ = run(check_data.main, images, masks, *sheet, codes=(0, 1))
    (images / "new\nline.jpg").write_bytes(b"text")
    out, _ = run(check_data.main, images, masks, *sheet, codes=(2,))
    assert "new\\nline.jpg" in out
    _, err = run(train.main, "--data-dir", data, "--output-dir", folder, *SMALL, codes=(2,))
    assert "new\\nline.jpg: cannot be read" in err
