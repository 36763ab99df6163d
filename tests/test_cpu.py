"""On a CPU: half of the cores, while other programs keep the rest busy."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from support import cpu
from support.pairs import cpu_count

linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are moved on Linux alone")


@pytest.mark.parametrize(
    "now, busy, own, expected",
    [
        (None, (1.0, 1.0), 2.0, {None}),  # all of it is ours
        (None, (1.0, 1.0), 1.6, {None}),
        (None, (1.0, 1.0), 1.4, {0, 1}),  # somebody else wants more than half a core
        (0, (1.0, 1.0), 1.0, {0}),  # each on its own half
        (1, (1.0, 1.0), 1.0, {1}),
        (1, (0.1, 1.0), 0.8, {1}),  # it has just begun, or is about to end
        (0, (1.0, 0.1), 1.0, {None}),
        (0, (1.0, 0.0), 0.5, {0, 1}),  # two that keep to the same half: one of them will leave
    ],
)
def test_half_of_two_cores_is_left_to_who_keeps_it_busy(now, busy, own, expected):
    assert {cpu.pick_half(now, busy, own, 2) for _ in range(99)} == expected


def test_one_busy_core_of_eight_moves_nobody():
    assert cpu.pick_half(None, (4.0, 4.0), 7.0, 8) is None
    assert cpu.pick_half(None, (4.0, 4.0), 4.0, 8) in (0, 1)


@linux
def test_time_is_this_process_with_its_children_and_that_of_all():
    halves = [[], sorted(os.sched_getaffinity(0))]
    before, here = cpu.measure(halves), time.process_time()
    spin = "import time\nwhile time.process_time() < 0.5: pass"
    child, spent = subprocess.Popen([sys.executable, "-c", spin]), []
    for wait in (lambda: time.sleep(0.3), child.wait):  # while it lives, and when it has ended
        wait()
        _, nothing, busy, own = (y - x for x, y in zip(before, cpu.measure(halves), strict=True))
        spent.append(own - (time.process_time() - here))
        assert nothing == 0 and own < busy + 0.1
    assert 0 < spent[0] < spent[1] and spent[1] > 0.4


@linux
@pytest.mark.skipif(cpu_count() < 2, reason="one core has no half")
def test_the_same_numbers_come_out_of_half_of_the_cores():
    script = """
import os, time, torch
from support import cpu

def gradient():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(16, 16, 3)
    convolution(torch.rand(8, 16, 64, 64)).relu().sum().backward()
    return convolution.weight.grad

def measure(halves):  # a second a look, in which others were busy or not
    global seconds, busy
    seconds, busy = seconds + 1, busy + len(all_cores) / 2 * others
    return seconds, busy, 0.0, 0.0

seconds, busy = 0.0, 0.0
all_cores, others = os.sched_getaffinity(0), False
cpu.measure, cpu.INTERVAL = measure, 0.05
cpu.tune_for_cpu()
seen, first = [], gradient()
for others in (True, False):
    while (len(os.sched_getaffinity(0)) < len(all_cores)) != others:
        time.sleep(0.01)
    time.sleep(0.2)  # until the second team has come, or gone
    assert torch.equal(gradient(), first)
    seen += [len(os.sched_getaffinity(0)), len(os.listdir("/proc/self/task"))]
print(*seen, len(all_cores))
"""
    env = os.environ | {"OMP_NUM_THREADS": str(cpu_count())}
    env = {name: value for name, value in env.items() if name not in cpu.BINDING}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    half, more_threads, whole, threads, there = map(int, done.stdout.split())
    assert whole == there and half in (there // 2, there - there // 2)
    assert more_threads == threads + there, "OpenMP's second team, which keeps both from spinning"
