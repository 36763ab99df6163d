"""From photos to masks, cut-outs and the challenge's submission.

    python predict.py car.jpg                             its mask: predictions/car_mask.png
    python predict.py photos --output DIR --cutout        of a whole folder, cut-outs too
    python predict.py "photos/*.jpg" --background beach.jpg
    python predict.py photos --submission submission.csv  the challenge's file, no pictures
    python predict.py photos --checkpoint unet.onnx       by onnxruntime, see export.py

Pictures have their photo's own size. Those that exist are not made again, so an interrupted run
goes on when it is started anew.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor
from tqdm import tqdm

from command_line import Parser, add_network_flags, number, run_script, whole
from distributed import hide_progress
from files import (
    BadInput,
    check_output,
    cpu_count,
    find_photos,
    in_threads,
    photo_size,
    read_photo,
    shown,
)
from pictures import colour_profile, cut_out, grey, in_front_of, overlay, save_mask
from predictor import Predictor, binary_mask, scale
from submission import Submission
from utils import pick_device, save_picture, set_up

OUTPUT = "predictions"  # the folder, where none is named
PICTURES = ("mask", "cutout", "background", "overlay", "probability")  # <photo>_<picture>.png
LARGE = 16_000_000  # pixels; of photos above, one at a time is read or drawn


def get_args_parser():
    parser = Parser(prog="predict.py", description="Masks and cut-outs of photos.")
    parser.add_argument(
        "photos", nargs="+", metavar="PHOTO", help="files, folders, patterns such as 'a/*.jpg'"
    )
    group = parser.add_argument_group("network")
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="of train.py, or .onnx of export.py; without, the repository's best_checkpoint, else "
        "its my_checkpoint, else the weights that ship",
    )
    size = {"type": whole(1, 16384), "metavar": "N"}
    group.add_argument("--image-height", help="photos are scaled to it, as in training", **size)
    group.add_argument("--image-width", help="likewise", **size)
    group.add_argument(
        "--threshold",
        type=lambda text: number(text, "between 0 and 1", lambda value: 0 < value < 1),
        metavar="X",
        help="a pixel is object above this probability; without, the checkpoint's own",
    )
    add_network_flags(group)
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output", metavar="DIR", type=Path, help=f"folder for pictures (default: {OUTPUT})"
    )
    group.add_argument(
        "--cutout", action="store_true", help="the object alone, its background transparent"
    )
    group.add_argument(
        "--background",
        metavar="X",
        type=read_background,
        help="the object in front of a photo (a file) or a colour (red, '#00ff00')",
    )
    group.add_argument("--overlay", action="store_true", help="the mask as a tint over the photo")
    group.add_argument(
        "--probability",
        nargs="?",
        type=int,
        const=8,
        choices=(8, 16),
        help="probabilities as grey, of 8 bits (without a number) or 16",
    )
    group.add_argument(
        "--submission",
        metavar="FILE",
        help="the challenge's CSV file; no pictures then, unless --output names a folder",
    )
    group.add_argument("--overwrite", action="store_true", help="make again what exists")
    return parser


# What there is to do ------------------------------------------------------------------------------


class Task(NamedTuple):
    """A photo, and what of it is still to be made: {picture: its path}, and a row or not."""

    photo: str
    pictures: dict
    row: bool


def check_names(photos, kinds, output):
    """Raises BadInput for photos whose results would have one name, or lie where photos are."""
    by_name = {}
    for photo in photos:
        name = Path(photo).stem if kinds else Path(photo).name
        by_name.setdefault(name, []).append(photo)
        if len(os.fsencode(name)) > 255 - len("_probability.png"):
            raise BadInput(
                f"{shown(photo)}: no name is left for its results: give it a shorter one"
            )
    same = [", ".join(paths) for paths in by_name.values() if len(paths) > 1]
    if same:
        what = "photos of one name, which their results would have too: call for each folder apart"
        raise BadInput.listing(f"{what}, with an --output of its own", same)
    folders = {os.path.dirname(photo) or "." for photo in photos}
    if kinds and output.exists() and any(os.path.samefile(path, output) for path in folders):
        raise BadInput(f"{shown(output)}: holds the photos: name another folder with --output")


def find_tasks(photos, kinds, args, submission):
    """A Task for each photo."""
    tasks = []
    for photo in photos:
        paths = {kind: args.output / f"{Path(photo).stem}_{kind}.png" for kind in kinds}
        pictures = {k: path for k, path in paths.items() if args.overwrite or not path.exists()}
        row = submission is not None and os.path.basename(photo) not in submission
        tasks.append(Task(photo, pictures, row))
    return tasks


def open_submission(args, predictor, threshold, photos):
    """A context of the Submission to add rows to; of None where there is none to make."""
    if not args.submission:
        return contextlib.nullcontext()
    facts = {
        "checkpoint": hashlib.sha256(Path(predictor.filename).read_bytes()).hexdigest(),
        "size": predictor.size,
        "threshold": threshold,
        "tta": args.tta,
        "device": predictor.device.type,
        "batch_size": args.batch_size,
        "folders": sorted({os.path.dirname(os.path.abspath(photo)) for photo in photos}),
    }
    names = [os.path.basename(photo) for photo in photos]
    return Submission(args.submission, names, json.dumps(facts), afresh=args.overwrite)


def read_background(text):
    """An argparse type: a colour or a photo, as a picture."""
    with contextlib.suppress(ValueError):
        return Image.new("RGB", (1, 1), ImageColor.getrgb(text)[:3])
    try:
        return Image.fromarray(read_photo(text))
    except BadInput as problem:
        raise argparse.ArgumentTypeError(f"{problem} (and it is no colour)") from None


# Reading, the network, writing: all at the same time ----------------------------------------------


class Clock:
    """Seconds spent in each part of the work, by all threads."""

    def __init__(self):
        self.seconds, self.lock = {}, threading.Lock()

    @contextlib.contextmanager
    def __call__(self, part):
        start = time.perf_counter()
        yield
        with self.lock:
            self.seconds[part] = self.seconds.get(part, 0) + time.perf_counter() - start

    def shares(self):
        """The parts' shares of that time, as a text."""
        total = sum(self.seconds.values())
        return ", ".join(f"{part} {spent / total:.0%}" for part, spent in self.seconds.items())


def predict_all(tasks, predictor, batch_size, write, clock):
    """Yield (task, problem or None) for each task that leaves something to be done, in order.

    Threads read some photos ahead of the network and `write(task, logits)` some behind it, so
    memory does not grow with the number of photos. Batches follow from all tasks, done or not: a
    mask does not depend on where an earlier run stopped.
    """
    batches = [tasks[i : i + batch_size] for i in range(0, len(tasks), batch_size)]
    batches = [batch for batch in batches if any(task.pictures or task.row for task in batch)]
    empty = np.zeros((*predictor.size, predictor.channels), np.uint8)
    ahead = 2 * batch_size + cpu_count()

    def read(task):
        with clock("reading"):
            return read_or_problem(predictor, task.photo)

    def logits():
        every_task = (task for batch in batches for task in batch)
        with contextlib.closing(in_threads(read, every_task, ahead)) as read_photos:
            for batch in batches:
                photos = list(itertools.islice(read_photos, len(batch)))
                with clock("network"):
                    good = [empty if isinstance(photo, BadInput) else photo for photo in photos]
                    logits = predictor.logits(good)
                yield from zip(batch, photos, logits, strict=True)

    def write_one(job):
        task, photo, logits = job
        if isinstance(photo, BadInput):
            return task, str(photo)
        with clock("writing"):
            return task, write(task, logits)

    with contextlib.closing(logits()) as answered:
        for task, problem in in_threads(write_one, answered, ahead):
            if task.pictures or task.row:
                yield task, problem


def read_or_problem(predictor, path):
    """The photo, or the BadInput that it is: one bad file does not stop the others."""
    try:
        with turn(photo_size(path)):
            return predictor.read(path)
    except BadInput as problem:
        return problem


large_photos = threading.Lock()


def turn(size):
    """A context that photos above LARGE enter one after the other, for the memory they take."""
    return large_photos if size[0] * size[1] > LARGE else contextlib.nullcontext()


def write_results(task, logits, threshold, args, submission):
    """Make what a Task asks for; returns what is wrong with the photo, or None.

    Raises BadInput for what stops all photos, such as a full disk.
    """
    if not (task.pictures or task.row):
        return None
    with contextlib.ExitStack() as stack:
        try:
            size = photo_size(task.photo)
            stack.enter_context(turn(size))
            photo = profile = None
            if set(task.pictures) - {"mask", "probability"}:
                photo = Image.fromarray(read_photo(task.photo))
                profile = colour_profile(task.photo)
        except BadInput as problem:
            return str(problem)
        logits = scale(logits, size)
        mask = binary_mask(logits, threshold)
        if task.row:
            submission.add(os.path.basename(task.photo), mask)
        for kind, path in task.pictures.items():
            if kind == "mask":
                save_mask(mask, path)
            elif kind == "probability":
                save_picture(grey(logits, args.probability), path, compress_level=1)
            else:
                if kind == "cutout":
                    picture = cut_out(photo, logits, threshold)
                elif kind == "background":
                    picture = in_front_of(args.background, photo, logits, threshold)
                else:
                    picture = overlay(photo, mask)
                save_picture(picture, path, compress_level=1, icc_profile=profile)
    return None


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    kinds = [kind for kind in PICTURES if kind == "mask" or getattr(args, kind)]
    if args.submission and args.output is None:
        if kinds != ["mask"]:
            raise BadInput(f"--{kinds[1]} beside --submission: name a folder with --output")
        kinds = []
    args.output = args.output or Path(OUTPUT)
    photos = find_photos(args.photos)
    if kinds:
        check_output(args.output, "--output")
    check_names(photos, kinds, args.output)

    device = pick_device(args.device)
    set_up(device)
    predictor = Predictor(args.checkpoint, device, args.image_height, args.image_width, args.tta)
    threshold = args.threshold or predictor.threshold
    with open_submission(args, predictor, threshold, photos) as submission:
        tasks = find_tasks(photos, kinds, args, submission)
        count = sum(bool(task.pictures or task.row) for task in tasks)
        size = f"{predictor.size[0]}x{predictor.size[1]}"
        print(f"{shown(predictor.filename)}: {count} photos at {size} on {device}", flush=True)
        if count < len(tasks):
            print(f"{len(tasks) - count} are done already (--overwrite makes them again)")

        write = functools.partial(
            write_results, threshold=threshold, args=args, submission=submission
        )
        clock, start, problems = Clock(), time.perf_counter(), []
        results = predict_all(tasks, predictor, args.batch_size, write, clock)
        for _, problem in tqdm(results, total=count, unit=" photos", disable=hide_progress()):
            if problem:
                problems.append(problem)
        if submission and len(problems) < len(tasks):
            submission.finish()

    print_summary(count, problems, time.perf_counter() - start, clock, kinds, args)
    if problems:
        print(BadInput.listing("photos that cannot be used", problems), file=sys.stderr)
        return 1 if len(problems) < len(tasks) else 2
    return 0


def print_summary(count, problems, seconds, clock, kinds, args):
    """How long it took, and where everything is."""
    if count and count == len(problems):
        return
    if count:
        print(
            f"{count - len(problems)} photos in {seconds:.1f} s, {count / seconds:.1f} photos/s "
            f"(of all threads' time: {clock.shares()})"
        )
    if kinds:
        which = kinds[0] if len(kinds) == 1 else f"{{{','.join(kinds)}}}"
        print(f"pictures: {shown(args.output)}/*_{which}.png")
    if args.submission and count:
        lacking = f", without the rows of {len(problems)} photos" if problems else ""
        print(f"submission: {shown(Path(args.submission))}{lacking}")


if __name__ == "__main__":
    run_script(main)
