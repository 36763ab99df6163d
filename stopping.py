"""Ctrl-C and SIGTERM: where a script stops, and with which exit code."""

import contextlib
import os
import signal
import sys
import threading


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end; the exit code is 128 and the signal's number."""

    def __init__(self, number):
        super().__init__()
        self.exit_code = 128 + number


def exit_code(stop):
    """The exit code of a KeyboardInterrupt: 143 after SIGTERM, else 130."""
    return getattr(stop, "exit_code", 128 + signal.SIGINT)


@contextlib.contextmanager
def sigterm_raises():
    """SIGTERM raises Stopped in the block, as Ctrl-C raises KeyboardInterrupt: files half-written
    are removed on the way out."""

    def stop(number, frame):
        raise Stopped(number)

    with handling({signal.SIGTERM: stop}):
        yield


@contextlib.contextmanager
def handling(handlers):
    """Handle these signals, {number: function}, in the block, unless they are being ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as in a shell's background job
            signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """What a signal asked for, to be looked at where the work can be stopped without loss.

        with StopRequest() as stop:
            ...                     # a signal only sets stop.number here
            if stop.number: ...
            with stop.at_once():
                ...                 # here it raises Stopped

    A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.number = 0  # the signal's; 0: none came
        self.waits = True

    def __enter__(self):
        self.handling = handling({signal.SIGINT: self.receive, signal.SIGTERM: self.receive})
        self.handling.__enter__()
        return self

    def __exit__(self, *error):
        return self.handling.__exit__(*error)

    def receive(self, number, frame):
        self.number = self.number or number
        # torchrun hands on to its processes what the terminal has sent them already.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if "WORLD_SIZE" not in os.environ and not ignored:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.waits:
            raise Stopped(self.number)
        print(
            "\nStopping after this step; Ctrl-C again leaves at once", file=sys.stderr, flush=True
        )

    @contextlib.contextmanager
    def at_once(self):
        """In the block a signal does not wait; nor does one that came before it."""
        try:
            self.waits = False
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self.waits = True
