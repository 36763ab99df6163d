"""Progress of long work: a bar on a terminal and in a notebook, elsewhere a line now and then."""

import io
import sys

import support.startup  # noqa: F401  imports tqdm.auto without a warning

# isort: split

from tqdm.auto import tqdm

from support.command_line import in_ipython
from support.distributed import rank

SECONDS = 60  # between two lines


class ProgressBar(tqdm):
    """tqdm's bar, in the first process only; where there is neither a terminal nor a notebook, a
    printed line a minute instead.

    Takes the arguments of tqdm.
    """

    def __init__(self, *args, **options):
        self.shows_bar = sys.stderr.isatty() or in_ipython()
        options = {"delay": 1} | options
        if not self.shows_bar:
            options |= {
                "file": io.StringIO(),  # tqdm's own output goes nowhere
                "delay": SECONDS,
                "mininterval": SECONDS,
                "miniters": 1,
                "ncols": 80,
                "ascii": True,
            }
        super().__init__(*args, leave=False, disable=rank() > 0, **options)

    def display(self, msg=None, *args, **options):
        """Show the progress; tqdm calls this when it is due, and with "" to clear the bar."""
        if self.shows_bar:
            super().display(msg, *args, **options)
        elif msg != "":
            print(self, flush=True)
