"""Ctrl-C and SIGTERM: where a script stops, with which exit code, and its data workers with it."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading

import cv2
from torch import distributed as dist


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end; the argument is its number, less 128 the exit code."""


def stop_now(number, frame):
    """A signal's handler: what is being written is removed on the way out."""
    raise Stopped(number)


@contextlib.contextmanager
def handling(handler, *signals):
    """Handle these signals so in the block, unless they are ignored, as in a job begun with `&`."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        before = {n: signal.getsignal(n) for n in signals if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


class StopRequest:
    """What signals asked for, to be looked at between two steps; a second Ctrl-C does not wait."""

    number = 0  # the signal's; 0: none came

    def receive(self, number, frame):
        """A signal's handler."""
        self.number = self.number or number
        # torchrun hands on to its processes what the terminal has sent them already.
        if not dist.is_initialized() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nStopping after this step; Ctrl-C again leaves at once", file=sys.stderr)

    def watch(self, batches):
        """Batches of work that may be given up. Raises Stopped between two of them."""
        for batch in batches:
            if self.number and not dist.is_initialized():  # the other processes would wait
                raise Stopped(self.number)
            yield batch


@contextlib.contextmanager
def stop_request():
    """A block in which Ctrl-C and SIGTERM only set the `number` of the StopRequest it gives."""
    request = StopRequest()
    with handling(request.receive, signal.SIGINT, signal.SIGTERM):
        yield request


def init_worker(_):
    """A worker leaves signals to its run, ends when that does, and uses one core."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which may be sent to all processes
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    cv2.setNumThreads(0)


def end_with_parent():
    """End this process as soon as its run has ended, also by SIGKILL: PyTorch may never look."""
    multiprocessing.parent_process().join()
    os._exit(1)
