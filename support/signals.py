"""Ctrl-C and SIGTERM: where a script stops, its exit code, and the end of its data workers."""

import contextlib
import multiprocessing
import os
import signal
import threading

import cv2
from torch import distributed as dist


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end. Its argument is the signal's number."""

    @property
    def exit_code(self):
        """The exit code that shells expect: 128 and the signal's number."""
        return 128 + self.args[0]


def stop_now(number, frame):
    """A signal's handler: raises Stopped, so that what is being written is removed on the way."""
    raise Stopped(number)


@contextlib.contextmanager
def handling(handler, *signals):
    """Handle signals in the block by `handler`, unless they are ignored, as in a job started with
    `&`."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        before = {n: signal.getsignal(n) for n in signals if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class StopRequest:
    """The signal that asked a training to stop; the training looks at it between two steps.

    Attributes:
        number: the signal's number; 0 if none came.
    """

    def __init__(self):
        self.number = 0

    def receive(self, number, frame):
        """A signal's handler. A second Ctrl-C does not wait."""
        self.number = self.number or number
        # torchrun passes on to its processes what the terminal has sent them already.
        if not dist.is_initialized() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not print: the signal may have come while the main program was printing.
        os.write(2, b"\nStopping after this step; press Ctrl-C again to leave at once\n")

    def watch(self, batches):
        """Yield batches. Raises Stopped between two of them once a signal has come."""
        for batch in batches:
            if self.number and not dist.is_initialized():  # the other processes would wait
                raise Stopped(self.number)
            yield batch


@contextlib.contextmanager
def stop_request():
    """A block in which Ctrl-C and SIGTERM only set the number of the StopRequest that it gives."""
    request = StopRequest()
    with handling(request.receive, signal.SIGINT, signal.SIGTERM):
        yield request


def init_worker(_):
    """Set up a data worker: it ignores signals, ends with the main process, and uses one core."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which may be sent to all processes
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    cv2.setNumThreads(0)


def end_with_parent():
    """End this process as soon as its parent has ended, even by SIGKILL."""
    multiprocessing.parent_process().join()
    os._exit(1)


def clean_start_method():
    """The start method of processes that load or draw data: from a process without threads.

    A process forked while other threads hold locks, such as OpenCV's, may wait for them forever.
    """
    methods = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in methods else "spawn"
