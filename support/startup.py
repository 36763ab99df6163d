"""Imported first by each script: Ctrl-C while torch is being imported leaves no traceback."""

import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXIT_CODE = 130  # of Ctrl-C


def leave(number, frame):
    """A signal's handler."""
    sys.exit(EXIT_CODE)


def is_our_script():
    """Whether this process runs a script of this repository, rather than importing parts of it."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return script is not None and ROOT in Path(script).resolve().parents


if is_our_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
