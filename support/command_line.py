"""From a shell to a script and back: its words, types of flags, errors in one line, exit codes.

Exit codes: 0 done, 1 done in part, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import contextlib
import os
import re
import signal
import sys

import torch
from PIL import Image

from support.errors import BadInput, display_path, printable
from support.signals import Stopped, handling, stop_now

OUT_OF_MEMORY = (
    "out of memory: try, in this order, a smaller --batch-size (in training: half of it with "
    "--accumulate 2), --checkpoint-activations, smaller --image-height and --image-width"
)


def arguments(argv=None):
    """The words of a command line as text: those of argv, or without it the script's own.

    Called from a notebook's cell there are none: sys.argv has those of the notebook's kernel.
    """
    if argv is None:
        runs_script = hasattr(sys.modules["__main__"], "__file__")  # also with IPython's %run
        argv = sys.argv[1:] if runs_script or not in_ipython() else []
    return [str(word) for word in argv]


def in_ipython():
    """Whether this runs in a notebook or in IPython's shell."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises BadInput for a wrong flag."""

    def error(self, message):
        raise BadInput(self.prog, printable(message), "--help lists the flags")


def whole_number(least, most):
    """An argparse type: a whole number from `least` to `most`."""
    return number(int, lambda n: least <= n <= most, f"a whole number from {least} to {most}")


def number_between(low, high):
    """An argparse type: a number between two others, neither of them included."""
    return number(float, lambda x: low < x < high, f"a number between {low} and {high}")


def number(kind, fits, expected):
    """An argparse type: a number of this kind that fits."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")

    return parse


def regular_expression(text):
    """An argparse type: a regular expression with a group."""
    with contextlib.suppress(re.error):
        if re.compile(text).groups:
            return text
    raise argparse.ArgumentTypeError("a regular expression with a (group)")


def add_network_flags(group):
    """Add the flags of scripts that only use a network."""
    group.add_argument(
        "--tta", action="store_true", help="average each photo's result with its mirror image's"
    )
    group.add_argument(
        "--batch-size",
        type=whole_number(1, 65536),
        default=4,
        metavar="N",
        help="photos at once (default: 4; a GPU may want more)",
    )
    group.add_argument("--device", default="auto", help="cuda, mps or cpu (default: auto)")


def message_of(problem):
    """One line for a problem that the user can mend; all other exceptions are raised again.

    These are BadInput, too little memory, files that the system refuses, and a killed data worker.
    """
    text = str(problem)
    if isinstance(problem, BadInput):
        return text
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return OUT_OF_MEMORY
    if is_dead_worker(problem):
        return "a data worker was killed, as when memory is short: try --num-workers 0"
    if isinstance(problem, OSError) and problem.strerror:
        where = display_path(problem.filename) if problem.filename else "the output"
        return f"{where}: {problem.strerror}: check that it exists, is allowed and has room"
    raise problem


def is_dead_worker(problem):
    """Whether a DataLoader reports that one of its workers has died.

    An exception that a worker raised, such as one in a user's transform, reads otherwise: "Caught
    ... in DataLoader worker process".
    """
    return isinstance(problem, RuntimeError) and "DataLoader worker (pid" in str(problem)


def run_script(main):
    """Call a script's main() and exit with its code; bad input is one line and no traceback."""
    Image.MAX_IMAGE_PIXELS = None  # support/images.py has its own bound, with a remedy
    if hasattr(sys.stdout, "reconfigure"):  # names of files may hold what is not text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with handling(stop_now, signal.SIGINT, signal.SIGTERM):
            code = main()
            sys.stdout.flush()
            sys.exit(code)
    except BrokenPipeError:  # python test.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again
        sys.exit(1)
    except (BadInput, MemoryError, OSError, RuntimeError) as problem:
        print(f"error: {message_of(problem)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        sys.exit(stop.exit_code if isinstance(stop, Stopped) else 128 + signal.SIGINT)
