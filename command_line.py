"""What the scripts share on the command line: types of flags, one-line answers, exit codes."""

import argparse
import math
import os
import sys

import torch

from files import BadInput, shown
from stopping import exit_code, sigterm_raises


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag with one line and exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def whole(least, most):
    """An argparse type: a whole number within bounds."""

    def parse(text):
        if not text.lstrip("-").isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} to {most}")
        return int(text)

    return parse


def above_zero(text):
    """An argparse type: a number above zero."""
    return number(text, "above 0", lambda value: 0 < value < math.inf)


def from_zero(text):
    """An argparse type: zero, or a number above it."""
    return number(text, "from 0 on", lambda value: 0 <= value < math.inf)


def fraction(text):
    """An argparse type: a number from 0 to below 1."""
    return number(text, "from 0 to below 1", lambda value: 0 <= value < 1)


def number(text, bounds, fits):
    """A number that fits; raises argparse's error, with the bounds in words, for any other."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text} is no number {bounds}")
    return value


def auto_or_threshold(text):
    """An argparse type: "auto", or a probability between 0 and 1."""
    if text == "auto":
        return text
    return number(text, 'between 0 and 1, nor "auto"', lambda value: 0 < value < 1)


def add_network_flags(group):
    """The flags of scripts that only use a network: how it is run on photos."""
    group.add_argument(
        "--tta",
        action="store_true",
        help="average each photo's logits with those of its mirror image (twice the time)",
    )
    group.add_argument(
        "--batch-size", type=whole(1, 65536), default=16, help="photos at once (default: 16)"
    )
    group.add_argument("--device", default="auto", help="cuda, mps or cpu (default: auto)")


def message_of(problem):
    """One line for what the user can mend: BadInput, too little memory, a data worker that died.

    Raises all other exceptions again.
    """
    text = str(problem)
    if isinstance(problem, BadInput):
        # From a data loader's worker it comes wrapped in the worker's traceback.
        return text.rpartition("files.BadInput: ")[2].rstrip()
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return (
            "out of memory: try, in this order, a smaller --batch-size (in training, with "
            "--accumulate 2 half of it is as good), in training --checkpoint-activations, a "
            "smaller --image-height and --image-width"
        )
    if "DataLoader worker" in text:
        return "a process that loads data was killed, as when memory is short: try --num-workers 0"
    if isinstance(problem, OSError) and problem.strerror:
        where = shown(problem.filename) if problem.filename else "the output"
        return f"{where}: {problem.strerror}: check that it is there, allowed and has room"
    raise problem


def run_script(main):
    """Call a script's main() and exit: 0 done, 2 bad input, with one line and no traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # names of files may hold what is no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with sigterm_raises():
            code = main()
            sys.stdout.flush()
            sys.exit(code)
    except BrokenPipeError:  # python test.py | head
        drop_output()
        sys.exit(1)
    except (BadInput, MemoryError, OSError, RuntimeError) as problem:
        print(f"error: {message_of(problem)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # python test.py > log, on a disk that is full
            drop_output()
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        sys.exit(exit_code(stop))


def drop_output():
    """Let go of what cannot be written, so that Python does not try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
