"""The one exception for what a user can mend, and how names of files look in a message."""

import contextlib
import os


class BadInput(Exception):
    """Something that the user can mend. Scripts print it in one line and exit with 2.

    Attributes:
        path: the file, folder or flag that it is about; None where there is no single one.
        reason: what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, path, reason, remedy=None):
        super().__init__(path, reason, remedy)  # all three, or it could not be pickled
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self):
        path = None if self.path is None else display_path(self.path)
        return ": ".join(part for part in (path, self.reason, self.remedy) if part)

    @classmethod
    def listing(cls, what, problems):
        """Several of them as one: the first ten, and how many there are."""
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        lines = "".join(f"\n  {line}" for line in [*problems[:10], *more])
        return cls(None, f"{what} ({len(problems)}):{lines}")


def short_path(path):
    """A path as short as it can be typed from here."""
    with contextlib.suppress(ValueError):  # on another of Windows' drives
        return min(str(path), os.path.relpath(path or "."), key=len)
    return str(path)


def display_path(path):
    """A path for a message: as short as it can be typed from here, and on one line."""
    return printable(short_path(path))


def printable(text):
    """Text with its line breaks, escapes and broken letters written out: names hold anything."""
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(letters)
