"""Harm done for real: kills at any moment, full disks, photos that vanish, long runs.

python -m pytest tests/test_harm.py -m "not torture"    a minute
python -m pytest tests/test_harm.py -m torture -s       the long versions, which print their figures
"""

import contextlib
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
from conftest import SMALL, assert_same_run, start, workers_of, write_pairs
from PIL import Image

import train
from data import prepare
from support.command_line import run_script
from support.run import SaveThrottle
from utils import load_checkpoint

FLAGS = [*SMALL, "--batch-size", "2", "--epochs", "3", "--save-every", "1"]
UNLIMITED = resource.RLIM_INFINITY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's limits and /proc")


@pytest.fixture
def fork(forkserver, tmp_path):
    """Start a script in a process of its own: fork(*argv, main=, limit=) -> Process.

    `limit`, in bytes, is the size of files that it may write. What it prints is then in `log`.
    """

    def fork(*argv, main=train.main, limit=UNLIMITED):
        args = main, [*map(str, argv)], limit, tmp_path / "log"
        process = forkserver.Process(target=run_main, args=args)
        process.start()
        return process

    return fork


def run_main(main, argv, limit, log):
    sys.stdout = sys.stderr = io.StringIO()
    multiprocessing.set_start_method(None, force=True)  # for workers, as in a process of its own
    SaveThrottle.is_due = lambda *_: True  # so each step saves
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, UNLIMITED))
    try:
        run_script(lambda: main(argv))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
        log.write_text(sys.stdout.getvalue())


@pytest.fixture
def train_to(fork, data, tmp_path):
    """Train and wait: train_to(folder, *flags, code=, limit=, meanwhile=) -> the error's line."""

    def train_to(name, *flags, code=0, limit=UNLIMITED, meanwhile=lambda process: None):
        argv = [*FLAGS, "--data-dir", data, "--output-dir", tmp_path / name, *flags]
        process = fork(*argv, limit=limit)
        meanwhile(process)
        process.join()
        text = (tmp_path / "log").read_text()
        assert process.exitcode == code and "Traceback" not in text, text
        return text.rpartition("error: ")[2]

    return train_to


READERS = {
    ".tar": load_checkpoint,
    ".npy": np.load,
    ".png": lambda path: Image.open(path).load(),
    ".csv": lambda path: np.loadtxt(path, delimiter=",", skiprows=1),
}


def read_whole(*folders):
    """Read all files to their end, but for those that a kill left aside; how many there are."""
    paths = [path for folder in folders for path in folder.rglob("*.*") if path.is_file()]
    paths = [path for path in paths if path.suffix != ".partial"]
    for path in paths:
        READERS[next(suffix for suffix in path.suffixes if suffix in READERS)](path)
    return len(paths)


def kill(process, rng, seconds, *folders):
    """SIGKILL at a random moment, half of the time one at which a file is being written.

    Returns whether the process was alive, and whether it was writing. Its workers end too.
    """
    end, while_writing = time.monotonic() + rng.uniform(0, seconds), rng.random() < 0.5

    def writing():
        return any(path for folder in folders for path in folder.rglob("*.partial"))

    while process.is_alive() and not (writing() if while_writing else time.monotonic() > end):
        time.sleep(0.0005)
    workers = workers_of(process) if process.is_alive() else []
    process.kill()
    process.join()
    while any(map(lives, workers)):
        assert time.monotonic() < end + 60, "its workers live on"
    return process.exitcode == -signal.SIGKILL, writing()


def lives(pid):
    """Whether there is such a process, and it is no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


WAYS = ["", "--no-cache", "--num-workers 2 --scheduler onecycle --accumulate 2 --optimizer muon"]


@pytest.mark.parametrize(
    "kills, flags",
    [pytest.param(6, "", marks=pytest.mark.slow)]
    + [pytest.param(50, flags, marks=pytest.mark.torture) for flags in WAYS],
)
def test_runs_killed_at_any_moment_end_as_one_never_killed(fork, tmp_path, kills, flags):
    rng, done = random.Random(kills), Counter()
    data = write_pairs(tmp_path / "data", cars=8, size=(240, 160))[0].parent
    argv, begin = ["--data-dir", data, *FLAGS, *flags.split(), "--output-dir"], time.monotonic()
    fork(*argv, tmp_path / "whole").join()
    seconds = time.monotonic() - begin
    while done["kills"] < kills:
        shutil.rmtree(data / ".cache", ignore_errors=True)
        run, killed = tmp_path / f"run{done['runs']}", True
        while killed:
            process = fork(*argv, run, "--load-model")
            killed, writing = kill(process, rng, seconds, run, data)
            done.update({"kills": killed, "while a file was written": killed and writing})
            done.update({"files read whole": read_whole(run, data / ".cache")})
            for partial in tmp_path.rglob("*.partial"):
                partial.unlink()  # as remove_leftovers does once they are old
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        assert_same_run(tmp_path / "whole", run)
        done["runs"] += 1
    print(f"\ntrain.py {flags}: {dict(done)}, files lost: 0")


@pytest.mark.torture
def test_prepare_killed_many_times_ends_with_the_same_files(fork, tmp_path):
    def contents(folder):
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder): path.read_bytes() for path in files}

    rng, done, source = random.Random(0), Counter(), tmp_path / "source"
    write_pairs(source, cars=20)[0].rename(source / "train")
    prepare.prepare_carvana(source, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    while done["kills"] < 100:
        data, killed = tmp_path / f"data{done['times']}", True
        while killed:
            process = fork("carvana", source, "--output-dir", data, main=prepare.main)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            process.join()
            killed = process.exitcode == -signal.SIGKILL
            done["kills"] += killed
            # Where there are photos to train on, all the others are too.
            assert not (data / "train_images").exists() or contents(data).items() >= whole.items()
        assert contents(data) == whole, (tmp_path / "log").read_text()
        done["times"] += 1
    print(f"\nprepare.py: {dict(done)}, files lost: 0")


@pytest.mark.slow
def test_a_killed_data_worker_costs_no_more_than_a_restart(train_to, tmp_path):
    def kill_worker(process):
        while not (tmp_path / "run" / "metrics.csv").exists():  # until the first epoch has ended
            time.sleep(0.001)
        os.kill(workers_of(process)[0], signal.SIGKILL)

    workers = "--no-cache", "--num-workers", 2
    train_to("whole", *workers)
    error = train_to("run", *workers, code=2, meanwhile=kill_worker)
    assert error.startswith("a data worker was killed") and error.count("\n") == 1
    train_to("run", *workers, "--load-model")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_disk_that_is_full_anywhere_costs_no_more_than_a_restart(train_to, data, tmp_path):
    train_to("whole")
    shutil.rmtree(data / ".cache")
    cache = 10 * 32 * 48 * 4 + 128  # bytes
    for limit, refused in ((8192, "npy"), (cache, "tar"), (100, "csv"), (2048, "png")):
        if refused == "csv":  # which is smaller than a checkpoint, and comes after one
            train_to("run", "--load-model", "--epochs", 1)
        error = train_to("run", "--load-model", code=2, limit=limit)
        name, reason = error.split(": cannot be written (")
        assert name.endswith(refused) and "free some space" in reason and error.count("\n") == 1
        assert not list(tmp_path.rglob("*.partial"))
        read_whole(tmp_path / "run", data / ".cache")
    train_to("run", "--load-model")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def figures_of(process):
    """What a process and its children hold now: {what: how much}."""
    found = Counter()
    for pid in (process.pid, *workers_of(process)):
        found["file descriptors"] += len(os.listdir(f"/proc/{pid}/fd"))
        found["threads"] += len(os.listdir(f"/proc/{pid}/task"))
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        found["resident MiB"] += pages * resource.getpagesize() / 2**20
    found["shared MiB"] = shutil.disk_usage("/dev/shm").used / 2**20
    return found


@pytest.mark.torture
@pytest.mark.parametrize("epochs, photos", [(20, 2000), (80, 100)])
def test_a_long_run_holds_no_more_at_its_end(epochs, photos, tmp_path):
    data = write_pairs(tmp_path / "data", cars=photos // 2)[0].parent
    flags = ["--epochs", epochs, "--num-workers", 2, "--batch-size", 16]
    with start(data, tmp_path / "run", *flags) as process:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (256, 256))
        figures = [figures_of(process) for line in process.stdout if line.startswith("epoch ")]
        assert process.wait() == 0
    print(f"\n{epochs} epochs over {photos} photos")
    for name in figures[0]:
        values = np.array([one[name] for one in figures[2:-1]])  # the last may be ending already
        slope = np.polyfit(np.arange(len(values)), values, 1)[0]
        print(f"{name}: {values.min():.0f} to {values.max():.0f}, {slope:+.3f} an epoch")
        assert slope * len(values) < 0.05 * values.max() + 1, (name, values)
