"""Masks, cut-outs and the challenge's submission from photos.

    python predict.py car.jpg                             its mask: predictions/car_mask.png
    python predict.py photos --output DIR --cutout        a whole folder, cut-outs too
    python predict.py "photos/*.jpg" --background beach.jpg
    python predict.py photos --submission submission.csv  the challenge's file, no pictures

Pictures that exist are kept, so a run that was stopped continues when you start it again.
From Python: mask = Predictor("weights/unet_carvana.pth").mask("car.jpg")
"""

import support.startup  # noqa: F401  first, since importing torch takes seconds

# isort: split

import glob
import math
import os
import sys
import threading
from contextlib import closing, nullcontext, suppress
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor

import utils
from dataset import get_eval_transform
from support.checkpoint_files import find_checkpoint
from support.command_line import (
    Parser,
    add_network_flags,
    arguments,
    number_between,
    run_script,
    whole_number,
)
from support.errors import BadInput, display_path
from support.images import photo_size, read_photo, rereadable
from support.networks import Network, load_onnx
from support.pairs import cpu_count, in_threads, list_images
from support.pictures import (
    cut_out,
    draw,
    find_objects,
    likeliest_class,
    read_with_profile,
    scale,
    sigmoid,
)
from support.progress import ProgressBar
from support.submission import Submission, encode
from support.tiles import in_tiles

ROOT = Path(__file__).resolve().parent
OUTPUT = Path("predictions")  # where pictures are written without --output
LARGE_PHOTO = 16_000_000  # pixels; above, only one photo at a time is read or drawn
large_photo_lock = threading.Lock()

# The network --------------------------------------------------------------------------------------


def load_torch(filename, device):
    """The Network of a checkpoint of train.py. Raises BadInput."""
    checkpoint = utils.load_checkpoint(filename)
    model = utils.build_model(checkpoint, device)

    def answer(photos):
        transform = get_eval_transform(*photos.shape[1:3], **checkpoint["normalization"])
        images = torch.stack([transform(image=photo)["image"] for photo in photos])
        return utils.logits_of(model, images, device).cpu()

    return Network(
        answer=answer,
        image_size=tuple(checkpoint["image_size"]),
        channels=checkpoint["model"]["in_channels"],
        threshold=checkpoint["threshold"],
        classes=checkpoint["classes"],
        crop=checkpoint["crop"],
    )


class Predictor:
    """A trained network that takes photos: each a path, the bytes of a file, an open binary file, a
    PIL image, or a NumPy array (H, W), (H, W, 3) or (H, W, 4), uint8, grey, RGB or RGBA.

    Args:
        checkpoint: file of train.py or tools/export.py (.onnx); by default the repository's
            best checkpoint, else its latest, else the weights that ship.
        device: "cuda", "mps", "cpu" or "auto".
        height, width: size that photos are scaled to for the network; None: as in training.
        tta: average each photo's logits with those of its mirror image.

    Attributes:
        filename: the checkpoint's.
        size: (height, width) that photos are scaled to; None if `crop` is set.
        crop: side of the tiles in which a network trained on crops sees photos at their own size;
            None for other networks.
        channels: 3 for RGB, 1 for grey.
        device: a torch.device.
        threshold: the checkpoint's.
        classes: names of the K classes.

    Raises BadInput for a checkpoint that cannot be used; methods raise it for such a photo.
    """

    def __init__(self, checkpoint=None, device="auto", height=None, width=None, tta=False):
        trained_here = (ROOT / utils.BEST_CHECKPOINT, ROOT / utils.CHECKPOINT)
        self.filename = os.fspath(checkpoint or find_checkpoint(*trained_here, Path(utils.SHIPPED)))
        self.device = utils.pick_device(device, tune=False)
        self.tta = tta
        load = load_onnx if self.filename.lower().endswith(".onnx") else load_torch
        network = load(self.filename, self.device)
        self.answer = network.answer
        self.channels = network.channels
        self.threshold = network.threshold
        self.classes = network.classes
        self.crop = network.crop
        if self.crop and (height or width):
            why = f"{display_path(self.filename)} sees photos at their own size, in tiles"
            raise BadInput("--image-height and --image-width", why, "leave them out")
        trained_height, trained_width = network.image_size
        self.size = None if self.crop else (height or trained_height, width or trained_width)

    def read(self, photo):
        """A photo as `logits` takes it: (height, width, channels), uint8."""
        return read_photo(photo, self.size, self.channels)

    def logits(self, photos):
        """Logits (N, K, height, width), float32, of N photos of one size that `read` returned."""
        photos = np.stack(photos)  # (N, height, width, channels), uint8
        if not self.crop:
            return self._tta_answer(photos).numpy()

        def answer_tile(tile):  # normalizes it, so that a large photo stays in uint8
            return self._tta_answer(tile.movedim(1, -1).numpy())

        images = torch.from_numpy(photos).movedim(-1, 1)  # (N, channels, height, width)
        return in_tiles(answer_tile, images, self.crop).numpy()

    def _tta_answer(self, photos):
        """The network's answer to photos (N, height, width, channels): a tensor of logits, with
        `tta` the mean over each photo and its mirror image."""
        logits = self.answer(photos)
        if self.tta:
            logits = (logits + self.answer(photos[:, :, ::-1]).flip(-1)) / 2
        return logits

    def full_size_logits(self, photo):
        """Logits of a photo at the photo's own size: (K, H, W), float32."""
        photo = rereadable(photo)
        return scale(self.logits([self.read(photo)])[0], photo_size(photo))

    def probabilities(self, photo):
        """Probabilities of a photo's pixels, at its own size: (H, W), float32, 0 to 1; with several
        classes (K, H, W)."""
        probabilities = sigmoid(self.full_size_logits(photo))
        return probabilities if len(self.classes) > 1 else probabilities[0]

    def mask(self, photo, threshold=None):
        """A photo's mask at its own size: (H, W), uint8, 0 and 255; with several classes 0 for
        background and 1 to K.

        threshold: a pixel is object above this probability; None: the checkpoint's.
        """
        return self.masks([photo], threshold)[0]

    def masks(self, photos, threshold=None, batch_size=4):
        """The masks of several photos, a list in their order; each is what `mask` gives.

        batch_size: how many photos the network takes at once; 1 if it was trained on crops.
        """
        threshold = self.threshold if threshold is None else threshold
        photos = [rereadable(photo) for photo in photos]
        batch_size = 1 if self.crop else batch_size  # at their own size, they make no batch
        masks = []
        for start in range(0, len(photos), batch_size):
            batch = photos[start : start + batch_size]
            answers = self.logits([self.read(photo) for photo in batch])
            for photo, logits in zip(batch, answers, strict=True):
                masks.append(find_objects(scale(logits, photo_size(photo)), threshold))
        return masks

    def cutout(self, photo, threshold=None):
        """The object of a photo, or with several classes everything except background, as a PIL
        image of the photo's own size, RGBA: the background is transparent, the edge soft."""
        threshold = self.threshold if threshold is None else threshold
        photo = rereadable(photo)
        logits = likeliest_class(self.full_size_logits(photo))
        return cut_out(read_with_profile(photo), logits, threshold)


# Flags --------------------------------------------------------------------------------------------


def get_args_parser():
    """The flags of predict.py."""
    parser = Parser(prog="predict.py", description="Masks and cut-outs of photos.")
    patterns = "files, folders, or patterns such as 'a/*.jpg'"
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help=patterns)
    group = parser.add_argument_group("network")
    add = group.add_argument
    which = "default: your best_checkpoint, else my_checkpoint, else the weights that ship"
    add("--checkpoint", metavar="FILE", help=f"of train.py or tools/export.py ({which})")
    pixels = {"type": whole_number(1, 16384), "metavar": "N"}
    add("--image-height", **pixels, help="height to scale photos to (default: as in training)")
    add("--image-width", **pixels, help="width to scale photos to (default: as in training)")
    above = "a pixel is object above this probability (default: the checkpoint's)"
    add("--threshold", type=number_between(0, 1), metavar="X", help=above)
    add_network_flags(group)
    add = parser.add_argument_group("results").add_argument
    add("--output", metavar="DIR", type=Path, help=f"folder for pictures (default: {OUTPUT})")
    add("--cutout", action="store_true", help="also the object on a transparent background")
    behind = "also the object in front of this photo or colour"
    add("--background", metavar="X", type=read_background, help=behind)
    add("--overlay", action="store_true", help="also the photo with the mask as a tint")
    grey = "also probabilities as grey levels of 8 bits (default) or 16"
    add("--probability", nargs="?", type=int, const=8, choices=(8, 16), help=grey)
    add("--submission", metavar="FILE", help="the challenge's CSV file; masks only with --output")
    add("--overwrite", action="store_true", help="replace files that exist")
    return parser


def parse_flags(argv=None):
    """The flags in argv, or without it those of the command line. Raises BadInput."""
    words = arguments(argv)
    for index, word in enumerate(words):
        # argparse would take a photo that follows for the number of bits.
        if word == "--probability" and words[index + 1 : index + 2] not in (["8"], ["16"]):
            words[index] = "--probability=8"
    return get_args_parser().parse_args(words)


def read_background(text):
    """An argparse type: a colour or a photo, as an RGB image. Raises BadInput."""
    with suppress(ValueError):
        return Image.new("RGB", (1, 1), ImageColor.getrgb(text)[:3])
    return Image.fromarray(read_photo(text))


def choose_kinds(args):
    """The kinds of pictures that the flags ask for, as draw and the pictures' names have them."""
    asked_for = {
        "mask": args.output or not args.submission,
        "cutout": args.cutout,
        "background": args.background,
        "overlay": args.overlay,
        "probability": args.probability,
    }
    return [kind for kind, asked in asked_for.items() if asked]


# Photos and their pictures ------------------------------------------------------------------------


def find_photos(names):
    """The photos that files, folders and patterns name, in order, each once. Raises BadInput."""
    photos = {}  # {absolute path: path as named}
    missing = []
    for name in names:
        found = photos_named(name)
        photos |= {os.path.abspath(photo): photo for photo in found}
        if not found:
            missing.append(name)
    if missing:
        raise BadInput(", ".join(missing), "no such photo or folder", "check the path")
    return list(photos.values())


def photos_named(name):
    """Sorted photos of one file, folder or pattern. Raises BadInput for a folder without any."""
    if os.path.isdir(name):
        return sorted(chain.from_iterable(list_images(name).values()))
    if os.path.exists(name):
        return [name]
    return sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))


def check_names(photos, kinds, folder):
    """Raises BadInput if results would share a name, or pictures would be among the photos."""
    by_name = {Path(photo).stem: photo for photo in photos}
    same = [display_path(photo) for photo in photos if by_name[Path(photo).stem] != photo]
    if same:
        what = "photos of the same name as others, whose results they would replace"
        raise BadInput.listing(f"{what}: run each folder by itself, with its own --output", same)
    if kinds and folder.resolve() in {Path(photo).resolve().parent for photo in photos}:
        raise BadInput(folder, "holds the photos", "name another folder with --output")


def open_submission(args, photos, network, threshold):
    """The Submission that the flags ask for, or None. Raises BadInput."""
    if not args.submission:
        return None
    if len(network.classes) > 1:
        found = f"{len(network.classes)} classes, but the challenge has one"
        reason = f"{display_path(network.filename)} has {found}"
        raise BadInput("--submission", reason, "leave it out")
    changed = os.stat(network.filename).st_mtime_ns
    made_by = (network.filename, changed, network.size, threshold, args.tta)
    return Submission(args.submission, photos, made_by, args.overwrite)


def find_work(photos, kinds, folder, overwrite, submission):
    """{photo: {kind of picture: path to write it to}} of photos that lack a picture or a row."""
    work = {}
    for photo in photos:
        paths = {kind: folder / f"{Path(photo).stem}_{kind}.png" for kind in kinds}
        lacking = {kind: path for kind, path in paths.items() if overwrite or not path.exists()}
        if lacking or (submission and photo not in submission):
            work[photo] = lacking
    return work


# Work ---------------------------------------------------------------------------------------------


def predict_all(network, photos, batch_size, write, problems):
    """Yield (photo, write(photo, logits)) in order; for a photo that cannot be used, append a
    message to `problems` instead.

    Threads read a few photos ahead of the network and write a few behind it, so that memory use
    stays flat. Photos at their own size come one at a time, since they may be large.
    """
    batch_size = 1 if network.crop else batch_size
    ahead = 1 if network.crop else 2 * batch_size + cpu_count()

    def attempt(work, photo, *logits):
        try:
            is_large = math.prod(photo_size(photo)) > LARGE_PHOTO
            with large_photo_lock if is_large else nullcontext():
                return photo, work(photo, *logits)
        except BadInput as problem:
            if problem.path != photo:  # a full disk, for example
                raise
            problems.append(str(problem))
            return None

    def read(photo):
        return attempt(network.read, photo)

    def write_result(result):
        return attempt(write, *result)

    with (
        closing(in_threads(read, photos, ahead)) as images,
        closing(answer_batches(network, images, batch_size)) as answers,
        closing(in_threads(write_result, answers, ahead)) as written,
    ):
        yield from filter(None, written)


def answer_batches(network, images, batch_size):
    """Yield (photo, logits) from an iterator of (photo, image); it has None for unusable photos."""
    while batch := list(islice(images, batch_size)):
        usable = dict(filter(None, batch))
        if usable:
            yield from zip(usable, network.logits(list(usable.values())), strict=True)


def do_work(network, work, submission, threshold, args):
    """Write the pictures that find_work found and the submission; return messages about photos that
    cannot be used, sorted."""

    def write(photo, logits):
        mask = draw(photo, logits, work[photo], threshold, args.background, args.probability)
        return encode(mask) if submission else None

    problems = []
    results = predict_all(network, work, args.batch_size, write, problems)
    for photo, runs in ProgressBar(results, total=len(work), unit=" photos"):
        if submission and photo not in submission:
            submission.add(photo, runs)
    if submission:
        submission.finish()
    return sorted(problems)


def announce(network, n_work, n_photos, output):
    """Print what is about to be done."""
    if network.crop:
        how = f"in tiles of {network.crop}x{network.crop}"
    else:
        how = f"at {network.size[0]}x{network.size[1]}"
    where = f"on {network.device}, into {display_path(output)}"
    print(f"{display_path(network.filename)}: {n_work} photos {how} {where}", flush=True)
    if n_work < n_photos:
        print(f"{n_photos - n_work} are done already (--overwrite replaces them)")


def report(problems, n_photos):
    """Print the problems; return the exit code: 0 for none, 2 if no photo could be used."""
    if not problems:
        return 0
    print(BadInput.listing("photos that cannot be used", problems), file=sys.stderr)
    return 1 if len(problems) < n_photos else 2


def main(argv=None):
    """Write what the flags in argv ask for; return the exit code."""
    args = parse_flags(argv)
    kinds = choose_kinds(args)
    folder = args.output or OUTPUT
    photos = find_photos(args.photos)
    check_names(photos, kinds, folder)

    utils.pick_device(args.device)  # tunes the process, which a Predictor by itself leaves alone
    network = Predictor(args.checkpoint, args.device, args.image_height, args.image_width, args.tta)
    threshold = args.threshold or network.threshold
    submission = open_submission(args, photos, network, threshold)

    work = find_work(photos, kinds, folder, args.overwrite, submission)
    announce(network, len(work), len(photos), folder if kinds else args.submission)
    problems = do_work(network, work, submission, threshold, args)
    return report(problems, len(photos))


if __name__ == "__main__":
    run_script(main)
