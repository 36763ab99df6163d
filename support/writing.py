"""Files that are either whole or not there, and runs that are never overwritten."""

import contextlib
import functools
import os
import secrets
import time
from pathlib import Path

from support.errors import BadInput, display_path

LEFTOVER_AGE = 300  # seconds without a write, after which a half-written file is left over


@contextlib.contextmanager
def write_aside(path, remedy="free some space or choose another folder"):
    """Open `path` for writing bytes so that nobody ever sees it half-written. Raises BadInput.

    The bytes go to another file beside it, which is flushed to the disk and then renamed: a process
    killed while writing leaves the earlier file as it was.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name[:60]}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise BadInput(path, f"cannot be written ({error.strerror or error})", remedy) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@functools.cache  # once for each folder and process: it may hold thousands of files
def remove_leftovers(folder):
    """Remove what processes that were killed while writing left in a folder half-written."""
    for leftover in folder.glob(".*.[0-9]*.partial"):
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                leftover.unlink()


def save_picture(image, path, **options):
    """Write a PIL image as PNG, whole or not at all; `options` are those of Pillow's writer. Raises
    BadInput."""
    with write_aside(path) as file:
        image.save(file, format="png", **options)


def check_output(folder, flag="--output-dir"):
    """Raise BadInput if the folder that this flag names cannot be made or written to."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(folder, "cannot be written", f"name another {flag}")


def move_aside(output, names):
    """Rename an earlier run's files to `*.previous`, or if that exists to `*.2.previous` and so on.

    In the folder `output`, a Path, these are the files `names` and the pictures in `saved_images`.
    """
    pictures = output / "saved_images"
    files = [output / name for name in names if (output / name).exists()]
    drawn = list(pictures.glob("[!.]*"))
    if not files and not drawn:
        return
    suffix = ".previous"
    number = 1
    while any(path.with_name(path.name + suffix).exists() for path in (*files, pictures)):
        number += 1
        suffix = f".{number}.previous"
    for path in files:
        path.rename(path.with_name(path.name + suffix))
    old_pictures = output / (pictures.name + suffix)
    for path in drawn:
        old_pictures.mkdir(exist_ok=True)
        path.rename(old_pictures / path.name)
    print(
        f"An earlier run's files in {display_path(output)} are now called *{suffix}; to resume "
        "that run instead, stop, rename them back and add --load-model"
    )
