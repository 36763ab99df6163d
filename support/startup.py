"""Imported first by each script: no traceback on Ctrl-C during imports, no warning of tqdm's."""

import signal
import sys
import warnings
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

# Without ipywidgets, the first import of tqdm.auto in a notebook warns; its bar is text then. Other
# packages import it too.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tqdm.auto  # noqa: F401
