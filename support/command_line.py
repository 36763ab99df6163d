"""From a shell to a script and back: types of flags, one-line answers, exit codes.

0 done, 1 done in part, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
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


class Parser(argparse.ArgumentParser):
    """Raises BadInput for a wrong flag."""

    def error(self, message):
        raise BadInput(self.prog, printable(message), "--help lists the flags")


def whole_number(least, most):
    """An argparse type: a whole number within bounds."""
    return number(int, lambda n: least <= n <= most, f"whole number from {least} to {most}")


def number_between(low, high):
    """An argparse type: a number between two others, neither of them included."""
    return number(float, lambda x: low < x < high, f"number between {low} and {high}")


def number(kind, fits, expected):
    """An argparse type: a number of this kind that fits."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} is no {expected}")

    return parse


def regular_expression(text):
    """An argparse type: a regular expression with a group."""
    with contextlib.suppress(re.error):
        if re.compile(text).groups:
            return text
    raise argparse.ArgumentTypeError(f"{text} is no regular expression with a (group)")


def add_network_flags(group):
    """The flags of scripts that only use a network: how it is run on photos."""
    add, count = group.add_argument, {"type": whole_number(1, 65536), "default": 4, "metavar": "N"}
    add("--tta", action="store_true", help="mean over each photo and its mirror image")
    add("--batch-size", help="photos at once (default: 4; a GPU may want more)", **count)
    add("--device", default="auto", help="cuda, mps or cpu (default: auto)")


def message_of(problem):
    """One line for what the user can mend: BadInput, too little memory, a data worker that died.

    Raises all other exceptions again.
    """
    text = str(problem)
    if isinstance(problem, BadInput):
        return text
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return (
            "out of memory: try, in this order, a smaller --batch-size (training: half of it with "
            "--accumulate 2), --checkpoint-activations, smaller --image-height and --image-width"
        )
    if "DataLoader worker" in text:
        return "a process that loads data was killed, as when memory is short: try --num-workers 0"
    if isinstance(problem, OSError) and problem.strerror:
        where = display_path(problem.filename) if problem.filename else "the output"
        return f"{where}: {problem.strerror}: check that it is there, allowed and has room"
    raise problem


def run_script(main):
    """Call a script's main() and exit with its code; one line and no traceback for bad input."""
    Image.MAX_IMAGE_PIXELS = None  # support/images.py has a bound of its own, which says what to do
    if hasattr(sys.stdout, "reconfigure"):  # names of files may hold what is no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with handling(stop_now, signal.SIGTERM):
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
        sys.exit(128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT))
