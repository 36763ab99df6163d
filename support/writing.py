"""Files that are whole or not there, and runs that are never overwritten."""

import contextlib
import functools
import os
import secrets
import time
from pathlib import Path

from support.errors import BadInput, display_path


@contextlib.contextmanager
def write_aside(path, remedy="free some space or choose another folder"):
    """Open `path` for writing bytes so that it is never seen half-written: beside its place,
    flushed and renamed, so that a kill leaves the file that was there before. Raises BadInput."""
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


@functools.cache  # once a process and folder: there may be thousands of files to look through
def remove_leftovers(folder):
    """Remove what processes killed while writing have left half-written, five minutes ago."""
    for leftover in folder.glob(".*.[0-9]*.partial"):
        with contextlib.suppress(OSError):  # others may look at the same time
            if time.time() - leftover.stat().st_mtime > 300:
                leftover.unlink()


def save_picture(image, path, **options):
    """Write a PIL image as PNG, whole or not at all; `options` are those of Pillow's writer."""
    with write_aside(path) as file:
        image.save(file, format="png", **options)


def check_output(folder, flag="--output-dir"):
    """Raises BadInput where the folder of this flag cannot be made or written to."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BadInput(folder, "cannot be written", f"name another {flag}")


def move_aside(output, names):
    """Rename those of `names` that are in the folder, and its pictures, to `*.previous`, or where
    that is taken to `*.2.previous` and so on: nothing is overwritten."""
    pictures, suffix, number = output / "saved_images", ".previous", 1
    old = [output / name for name in names if (output / name).exists()]
    drawn = list(pictures.glob("[!.]*"))
    if not old and not drawn:
        return
    while any(path.with_name(path.name + suffix).exists() for path in (*old, pictures)):
        number += 1
        suffix = f".{number}.previous"
    for path in old:
        path.rename(path.with_name(path.name + suffix))
    old_pictures = output / (pictures.name + suffix)
    for path in drawn:
        old_pictures.mkdir(exist_ok=True)
        path.rename(old_pictures / path.name)
    print(
        f"An earlier run's files in {display_path(output)} are now called *{suffix}; to resume "
        "that run instead, stop, rename them back and add --load-model"
    )
