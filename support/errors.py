"""The exception for what a user can mend, and how file names look in messages."""

import contextlib
import os

LISTED = 10  # problems in one message


class BadInput(Exception):
    """Something that the user can mend. Scripts print it in one line and exit with 2.

    Attributes:
        path: the file, folder or flag that it is about; None if there is no single one.
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
        """One for several problems: how many there are, and the first LISTED of them."""
        lines = [str(problem) for problem in problems[:LISTED]]
        if len(problems) > LISTED:
            lines.append(f"... and {len(problems) - LISTED} more")
        return cls(None, "\n  ".join([f"{what} ({len(problems)}):", *lines]))


def short_path(path):
    """The shortest form of a path that can be typed from the working directory.

    Anything else becomes its text, so that every BadInput can be printed.
    """
    with contextlib.suppress(ValueError, TypeError):  # ValueError: on another drive of Windows
        return min(str(path), os.path.relpath(path or "."), key=len)
    return str(path)


def display_path(path):
    """A path for a message: short_path, and on one line."""
    return printable(short_path(path))


def printable(text):
    """Text with line breaks, escape codes and invalid characters written out: file names may hold
    any of them."""
    characters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(characters)
