"""Progress of long work: a bar on a terminal, elsewhere a line now and then."""

import io
import sys

from tqdm import tqdm

from support.distributed import rank

SECONDS = 60  # between two lines


class ProgressBar(tqdm):
    """tqdm's bar, in the first process only; without a terminal, a printed line a minute instead.

    Takes the arguments of tqdm.
    """

    def __init__(self, *args, **options):
        self.is_terminal = sys.stderr.isatty()
        options = {"delay": 1} | options
        if not self.is_terminal:
            options |= {
                "file": io.StringIO(),  # tqdm's own output goes nowhere
                "delay": SECONDS,
                "mininterval": SECONDS,
                "miniters": 1,
                "ncols": 80,
                "ascii": True,
            }
        super().__init__(*args, leave=False, disable=rank() > 0, **options)

    def display(self, msg=None, pos=None):
        """Show the progress; tqdm calls this when it is due, and with "" to clear the bar."""
        if self.is_terminal:
            super().display(msg, pos)
        elif msg != "":
            print(self, flush=True)
