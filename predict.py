"""From photos to masks, cut-outs and the challenge's submission.

    python predict.py car.jpg                             its mask: predictions/car_mask.png
    python predict.py photos --output DIR --cutout        of a whole folder, cut-outs too
    python predict.py "photos/*.jpg" --background beach.jpg
    python predict.py photos --submission submission.csv  the challenge's file, no pictures

Pictures that exist are not made again, so a run that was stopped goes on when started anew.
From Python: mask = Predictor("weights/unet_carvana.pth").mask("car.jpg")
"""

import glob
import json
import os
import sys
import threading
from contextlib import closing, nullcontext, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor

import utils
from dataset import get_eval_transform
from support import pictures
from support.checkpoints import find_checkpoint
from support.command_line import Parser, add_network_flags, number_between, run_script, whole_number
from support.errors import BadInput, display_path
from support.images import open_image, photo_size, read_photo
from support.pairs import cpu_count, in_threads, list_images
from support.plots import palette
from support.progress import ProgressBar
from support.submission import Submission, encode
from support.tiles import in_tiles
from support.writing import save_picture

ROOT = Path(__file__).resolve().parent
KINDS = ("mask", "cutout", "background", "overlay", "probability")  # of pictures: car_mask.png
LARGE = 16_000_000  # pixels; of photos above, one at a time is read or drawn
large_photos = threading.Lock()


class Predictor:
    """A trained network that takes photos' files.

    Args:
        checkpoint: a file of train.py or tools/export.py (.onnx); by default the repository's
            best checkpoint, else its latest, else the weights that ship.
        device: "cuda", "mps", "cpu" or "auto".
        height, width: what photos are scaled to for the network; None: as in training.
        tta: average each photo's logits with those of its mirror image.

    Attributes: `filename`, the checkpoint's; `size`, (height, width) that photos are scaled to;
    `crop`, side of the tiles in which a network of crops sees photos at their own size (`size` is
    None then), else None; `channels`, 3 for RGB, 1 for grey; `device`; `threshold`, the
    checkpoint's own; `classes`, the names of the K classes. Raises BadInput for a checkpoint that
    cannot be used; its methods, for a photo that cannot.
    """

    def __init__(self, checkpoint=None, device="auto", height=None, width=None, tta=False):
        own = (ROOT / utils.BEST_CHECKPOINT, ROOT / utils.CHECKPOINT, Path(utils.SHIPPED))
        self.filename = os.fspath(checkpoint or find_checkpoint(*own))
        self.device, self.tta = utils.pick_device(device, tune=False), tta
        load = load_onnx if self.filename.lower().endswith(".onnx") else load_torch
        facts, self.answer = load(self.filename, self.device)
        self.channels, self.threshold = facts["model"]["in_channels"], facts["threshold"]
        self.classes, self.crop = facts["classes"], facts["crop"]
        if self.crop and (height or width):
            why = f"{display_path(self.filename)} sees photos at their own size, in tiles"
            raise BadInput("--image-height and --image-width", why, "leave them out")
        own = facts["image_size"]
        self.size = None if self.crop else (height or own[0], width or own[1])

    def read(self, path):
        """A photo as `logits` takes it: (height, width, channels), uint8."""
        return read_photo(path, self.size, self.channels)

    def logits(self, photos):
        """The network's answer to photos of one size that `read` gave: (N, K, height, width),
        float32. A tile is normalized when its turn comes: large photos take little memory more."""

        def answer(images):
            photos = images.movedim(1, -1).numpy()
            logits = self.answer(photos)
            if self.tta:
                logits = (logits + self.answer(photos[:, :, ::-1]).flip(-1)) / 2
            return logits

        images = torch.from_numpy(np.stack(photos)).movedim(-1, 1)
        return (in_tiles(answer, images, self.crop) if self.crop else answer(images)).numpy()

    def full_size_logits(self, path):
        """The network's answer to a photo, at the photo's own size: (K, H, W), float32."""
        return pictures.scale(self.logits([self.read(path)])[0], photo_size(path))

    def probabilities(self, path):
        """A photo's probabilities of being object, at its own size: (H, W), float32, 0 to 1; of
        several classes (K, H, W)."""
        probabilities = pictures.sigmoid(self.full_size_logits(path))
        return probabilities if len(self.classes) > 1 else probabilities[0]

    def mask(self, path, threshold=None):
        """A photo's mask at its own size: (H, W), uint8, 0 and 255; of several classes 0 for
        background and 1 to K."""
        threshold = self.threshold if threshold is None else threshold
        return pictures.find_objects(self.full_size_logits(path), threshold)


def load_torch(filename, device):
    """(facts, answer) of a checkpoint of train.py: load_checkpoint's dict, and a function from
    photos (N, height, width, channels), uint8, to logits (N, K, height, width), a tensor on the
    CPU. Raises BadInput."""
    checkpoint = utils.load_checkpoint(filename)
    model = utils.build_model(checkpoint | {"crop": None}, device)

    def answer(photos):
        transform = get_eval_transform(*photos.shape[1:3], **checkpoint["normalization"])
        images = torch.stack([transform(image=photo)["image"] for photo in photos])
        return utils.logits_of(model, images, device).cpu()

    return checkpoint, answer


def load_onnx(filename, device):
    """The same of a file of tools/export.py, computed by onnxruntime."""
    try:
        import onnxruntime

        wanted = f"{device.type.upper()}ExecutionProvider", "CPUExecutionProvider"
        there = [name for name in onnxruntime.get_available_providers() if name in wanted]
        session = onnxruntime.InferenceSession(filename, providers=there)
        (photos,), (output,) = session.get_inputs(), session.get_outputs()
        written = {"classes": '["object"]', "crop": "null"}  # what files of version 1.0 do not say
        written |= session.get_modelmeta().custom_metadata_map
        facts = {n: json.loads(written[n]) for n in ("image_size", "threshold", "classes", "crop")}
        facts["model"] = {"in_channels": photos.shape[3]}
    except Exception as error:  # onnxruntime has many
        reason = f"cannot be used ({' '.join(str(error).split())[:200]})"
        raise BadInput(filename, reason, "pip install onnxruntime, or export it again") from None

    def answer(images):
        (result,) = session.run(None, {"photos": np.ascontiguousarray(images)})
        result = torch.from_numpy(result.astype(np.float32))
        return result.logit_(eps=1e-7) if output.name == "probabilities" else result

    return facts, answer


def get_args_parser():
    """The flags of predict.py."""
    parser = Parser(prog="predict.py", description="Masks and cut-outs of photos.")
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="files, folders, 'a/*.jpg'")
    group = parser.add_argument_group("network")
    add, size = group.add_argument, {"type": whole_number(1, 16384), "metavar": "N"}
    which = "your best_checkpoint, else my_checkpoint, else the weights that ship"
    add("--checkpoint", metavar="FILE", help=f"of train.py or tools/export.py (default: {which})")
    add("--image-height", **size, help="photos are scaled to it (default: as in training)")
    add("--image-width", **size, help="likewise")
    add(
        "--threshold",
        type=number_between(0, 1),
        metavar="X",
        help="object is above this probability",
    )
    add_network_flags(group)
    add, bits = parser.add_argument_group("results").add_argument, {"const": 8, "choices": (8, 16)}
    add("--output", metavar="DIR", type=Path, help="folder for pictures (default: predictions)")
    add("--cutout", action="store_true", help="the object alone, its background transparent")
    add("--background", metavar="X", type=read_background, help="in front of this photo or colour")
    add("--overlay", action="store_true", help="the mask as a tint over the photo")
    add("--probability", nargs="?", type=int, **bits, help="as grey of 8 bits (default) or 16")
    add("--submission", metavar="FILE", help="the challenge's CSV file; masks only with --output")
    add("--overwrite", action="store_true", help="make again what exists")
    return parser


def read_background(text):
    """An argparse type: a colour or a photo, as a picture. Raises BadInput."""
    with suppress(ValueError):
        return Image.new("RGB", (1, 1), ImageColor.getrgb(text)[:3])
    return Image.fromarray(read_photo(text))


def find_photos(names):
    """The photos that files, folders and patterns name, in order, each once. Raises BadInput."""
    photos, missing = {}, []
    for name in names:
        found = [name]
        if os.path.isdir(name):
            found = sorted(path for paths in list_images(name).values() for path in paths)
        elif not os.path.exists(name):
            found = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        photos |= {os.path.abspath(photo): photo for photo in found}
        missing += [] if found else [name]
    if missing:
        raise BadInput(", ".join(missing), "no such photo or folder", "check the path")
    return list(photos.values())


def check_names(photos, kinds, output):
    """Raises BadInput for photos whose results would have one name, or lie where photos are."""
    by_name = {Path(photo).stem: photo for photo in photos}
    same = [display_path(photo) for photo in photos if by_name[Path(photo).stem] != photo]
    if same:
        what = "photos of the same name as others, which their results would have too"
        raise BadInput.listing(f"{what}: call for each folder apart, with its own --output", same)
    if kinds and output.resolve() in {Path(photo).resolve().parent for photo in photos}:
        raise BadInput(output, "holds the photos", "name another folder with --output")


def predict_all(network, photos, batch_size, write, problems):
    """Yield (photo, write(photo, logits)) in order; what is wrong with a photo goes to `problems`.

    Threads read some photos ahead of the network and write some behind it: memory stays flat.
    Photos at their own size go one by one, since they have many.
    """
    batch_size = 1 if network.crop else batch_size
    ahead = 1 if network.crop else 2 * batch_size + cpu_count()

    def attempt(work, photo, *more):
        try:
            with large_photos if np.prod(photo_size(photo)) > LARGE else nullcontext():
                return photo, work(photo, *more)
        except BadInput as problem:
            if problem.path != photo:  # such as a full disk
                raise
            problems.append(str(problem))

    def answers():
        images = in_threads(lambda photo: attempt(network.read, photo), photos, ahead)
        with closing(images):
            while batch := list(islice(images, batch_size)):
                good = dict(filter(None, batch))
                if good:
                    yield from zip(good, network.logits(list(good.values())), strict=True)

    with closing(answers()) as answered:
        yield from filter(None, in_threads(lambda one: attempt(write, *one), answered, ahead))


def draw(photo, logits, paths, threshold, background=None, bits=8):
    """Make pictures of a photo, {kind: path}; returns its mask, as Predictor.mask does."""
    logits = pictures.scale(logits, photo_size(photo))  # as test.py --full-size does
    mask, image = pictures.find_objects(logits, threshold), None
    colours = palette(len(logits)) if len(logits) > 1 else None
    logits = logits[0] if len(logits) == 1 else logits.max(axis=0)  # of the likeliest class
    if paths.keys() - {"mask", "probability"}:
        image = Image.fromarray(read_photo(photo))
        with open_image(photo) as file:  # without its profile, colours would be taken for others
            own = file.mode in ("RGB", "RGBA")
            image.info["icc_profile"] = file.info.get("icc_profile") if own else None
    make = {
        "cutout": lambda: pictures.cut_out(image, logits, threshold),
        "background": lambda: pictures.in_front_of(background, image, logits, threshold),
        "overlay": lambda: pictures.overlay(image, mask, colours),
        "probability": lambda: pictures.grey(logits, bits),
    }
    if "mask" in paths:
        pictures.save_mask(mask, paths["mask"], colours)
    for kind in paths.keys() & make.keys():
        save_picture(make[kind](), paths[kind], compress_level=1)
    return mask


def main(argv=None):
    """Make what the flags in argv ask for; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words):  # without a number, a photo may stand after it
        if word == "--probability" and words[i + 1 : i + 2] not in (["8"], ["16"]):
            words[i] = "--probability=8"
    args = get_args_parser().parse_args(words)
    as_picture = args.output or not args.submission
    kinds = [kind for kind in KINDS if getattr(args, kind, as_picture)]
    output = args.output or Path("predictions")
    photos = find_photos(args.photos)
    check_names(photos, kinds, output)

    utils.pick_device(args.device)  # sets this process up, which a Predictor by itself leaves alone
    network = Predictor(args.checkpoint, args.device, args.image_height, args.image_width, args.tta)
    if args.submission and len(network.classes) > 1:
        found = f"{len(network.classes)} classes, the challenge one"
        reason = f"{display_path(network.filename)} has {found}"
        raise BadInput("--submission", reason, "leave it out")
    threshold, stat = args.threshold or network.threshold, os.stat(network.filename)
    made_by = (network.filename, stat.st_mtime_ns, network.size, threshold, args.tta)
    rows = args.submission and Submission(args.submission, photos, made_by, args.overwrite)
    todo = {}  # {photo: {kind of picture that is to be made: its path}}
    for photo in photos:
        paths = {kind: output / f"{Path(photo).stem}_{kind}.png" for kind in kinds}
        paths = {k: path for k, path in paths.items() if args.overwrite or not path.exists()}
        if paths or (rows and photo not in rows):
            todo[photo] = paths

    def write(photo, logits):
        mask = draw(photo, logits, todo[photo], threshold, args.background, args.probability)
        return rows and encode(mask)

    where = display_path(output if kinds else args.submission)
    tiles = f"in tiles of {network.crop}x{network.crop}"
    at = tiles if network.crop else f"at {network.size[0]}x{network.size[1]}"
    how = f"{at} on {network.device}, into {where}"
    print(f"{display_path(network.filename)}: {len(todo)} photos {how}", flush=True)
    if len(todo) < len(photos):
        print(f"{len(photos) - len(todo)} are done already (--overwrite makes them again)")
    problems = []
    results = predict_all(network, todo, args.batch_size, write, problems)
    for photo, runs in ProgressBar(results, total=len(todo), unit=" photos"):
        if rows and photo not in rows:
            rows.add(photo, runs)
    if rows:
        rows.finish()
    if problems:
        print(BadInput.listing("photos that cannot be used", sorted(problems)), file=sys.stderr)
        return 1 if len(problems) < len(photos) else 2
    return 0


if __name__ == "__main__":
    run_script(main)
