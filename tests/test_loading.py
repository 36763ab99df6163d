"""Batches by data workers: the same as without, whatever happens to the workers."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, assert_refused

import train
from dataset import get_loaders

# A run whose data workers start right after threads have used OpenCV, as the look at masks did.
THREADS_FIRST = """
import sys, threading
import cv2, numpy as np
import train
from support.command_line import run_script

make_loaders, busy = train.make_loaders, True

def use_opencv():
    while busy:
        cv2.resize(np.zeros((256, 256), np.float32), (99, 99))

def with_threads(*args):
    global busy
    threads = [threading.Thread(target=use_opencv) for _ in range(4)]
    for thread in threads:
        thread.start()
    loaders = make_loaders(*args)
    iter(loaders[0])
    busy = False
    return loaders

train.make_loaders = with_threads
if __name__ == "__main__":
    run_script(train.main)
"""


def start_many(data, tmp_path, number):
    """Start so many runs with workers, one after another; each must end."""
    (tmp_path / "start.py").write_text(THREADS_FIRST)
    flags = ["--data-dir", data, *SMALL, "--num-workers", "2", "--epochs", "1"]
    for run in range(number):
        subprocess.run(
            [sys.executable, tmp_path / "start.py", *flags, "--output-dir", tmp_path / str(run)],
            check=True,
            timeout=100,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )


def test_workers_start_while_other_threads_use_opencv(data, tmp_path):
    start_many(data, tmp_path, 1)


@pytest.mark.torture
def test_two_hundred_starts_with_workers_end(data, tmp_path):
    start_many(data, tmp_path, 200)


class Failing:
    """A transform of a user's that fails."""

    def __init__(self, error):
        self.error = error

    def __call__(self, **_):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("my own"), OSError("my own"), ValueError("my own")])
def test_what_a_users_transform_raises_in_a_worker_is_not_called_a_killed_worker(
    fit, monkeypatch, error
):
    def failing_loaders(*args, **options):
        return get_loaders(*args, train_transform=Failing(error), **options)

    monkeypatch.setattr(train, "get_loaders", failing_loaders)
    with pytest.raises(type(error), match="my own"):
        fit("run", "--num-workers", 1)


class Dying:
    """A transform that kills its process, as the system does when memory is short."""

    def __call__(self, **_):
        os._exit(9)


def test_a_worker_that_died_is_told_in_a_line(fit, monkeypatch):
    def dying_loaders(*args, **options):
        return get_loaders(*args, train_transform=Dying(), **options)

    monkeypatch.setattr(train, "get_loaders", dying_loaders)
    assert_refused(fit("run", "--num-workers", 1), "a data worker was killed", "--num-workers 0")
