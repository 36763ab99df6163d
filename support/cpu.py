"""How this process uses a CPU: it keeps freed memory, and leaves half of the cores to others.

Many times a step the threads of a network's computation wait for each other, and spin meanwhile. A
thread that another program keeps off its core holds up all of them, while they spin on cores that
others want: beside a second training, both may run at a fiftieth of their speed. The number of
threads cannot follow the load, since sums, and so the last bits of weights, depend on it. So, on
Linux, the same threads crowd on half of the cores then, and wait without spinning, until others
are done.
"""

import contextlib
import ctypes
import glob
import os
import platform
import random
import threading
import time
from functools import cache
from pathlib import Path

import torch

INTERVAL = 0.5  # seconds between two looks at how busy the cores are
BINDING = {"OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"}
coin = random.SystemRandom()  # leaves alone what a seed determines


@cache  # once is enough
def tune_for_cpu():
    """Set this process up to compute on a CPU."""
    keep_freed_memory()
    if os.access("/proc/stat", os.R_OK) and BINDING.isdisjoint(os.environ):  # on Linux
        share_cores()


def keep_freed_memory():
    """Keep freed memory for the next step, where the C library is glibc. Given back, it has to be
    cleared by the system for each large tensor anew, which costs a third of a step's time."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets a mapping of its own, which ends with it
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def share_cores():
    """From now on, keep to half of the cores while other programs keep about as many busy: until
    they keep less than half of that busy."""
    cores = sorted(os.sched_getaffinity(0))
    if torch.get_num_threads() > (len(cores) + 1) / 2 > 1:  # else there is room for others anyway
        threading.Thread(target=watch, args=(cores,), daemon=True).start()


def watch(cores):
    """Move this process between all cores and one half of them as pick_half says, without end."""
    halves = cores[: len(cores) // 2], cores[len(cores) // 2 :]
    now, done, before = None, threading.Event(), measure(halves)
    while True:
        time.sleep(INTERVAL)
        try:
            was, after = now, measure(halves)
        except OSError:  # such as too many open files
            continue
        seconds, *busy, own = (y - x for x, y in zip(before, after, strict=True))
        now, before = pick_half(was, [x / seconds for x in busy], own / seconds, len(cores)), after
        if now is None:
            done.set()
        elif was is None:
            done = threading.Event()
            threading.Thread(target=stop_spinning, args=(done,), daemon=True).start()
        if now is not None or was is not None:  # each time, since threads come and go
            run_on(cores if now is None else halves[now])


def pick_half(now, busy, own, cores):
    """Which half of the cores to compute on, 0 or 1; None for all of them.

    Args:
        now: what it returned last.
        busy: how many cores of each half have been busy since; own: how many with this process.
        cores: how many there are.
    """
    others, most = sum(busy) - own, (cores - 1) / 2
    if others < (most if now is None else most / 2):  # does not follow each ripple
        return None
    if now is None:
        return coin.randrange(2)
    crowded = busy[now] - own > busy[1 - now] + 0.25  # by another one that keeps to its half
    return 1 - now if crowded and coin.random() < 0.5 else now


def measure(halves):
    """(time, time that all programs were busy on each half, that of this one), in seconds."""
    tick = os.sysconf("SC_CLK_TCK")
    lines = Path("/proc/stat").read_text().splitlines()
    rows = {name: numbers for name, *numbers in map(str.split, lines)}
    # user, nice and system; irq and softirq
    busy = {core: sum(map(int, (*row[:3], *row[5:7]))) / tick for core, row in rows.items()}
    own = sum(os.times()[:4])  # with children that have ended
    for child in children():
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            own += sum(map(int, stat[11:13])) / tick
    each = (sum(busy.get(f"cpu{core}", 0) for core in half) for half in halves)
    return time.monotonic(), *each, own


def children():
    """Numbers of the processes that this one has started, such as those that load data."""
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            yield from Path(path).read_text().split()


def run_on(cores):
    """Let all threads of this process, and of its children, run on these cores alone."""
    for process in ("self", *children()):
        for path in glob.glob(f"/proc/{process}/task/*"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(os.path.basename(path)), cores)


def stop_spinning(done):
    """Until `done` is set, keep a second team of OpenMP's threads asleep: GNU's OpenMP does not
    let threads spin while there are, of all teams, more than cores."""
    torch.ones(2**20).add_(1)  # large enough for a whole team
    done.wait()
