"""How far long work is: a bar on a terminal, elsewhere a line now and then."""

import io
import sys

from tqdm import tqdm

from support.distributed import rank

SECONDS = 60  # between two lines


class ProgressBar(tqdm):
    """tqdm's bar, of the first process; where there is no terminal, a line a minute instead."""

    def __init__(self, *args, **options):
        self.terminal = sys.stderr.isatty()
        if not self.terminal:
            lines = {"file": io.StringIO(), "mininterval": SECONDS, "delay": SECONDS}
            options |= lines | {"miniters": 1, "ncols": 80, "ascii": True}
        super().__init__(*args, leave=False, disable=rank() > 0, **{"delay": 1} | options)

    def display(self, msg=None, pos=None):
        """Called by tqdm when it is time to show something; with "" to clear it."""
        if self.terminal:
            super().display(msg, pos)
        elif msg != "":
            print(self, flush=True)
