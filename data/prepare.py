"""Fill data/ with the challenge's photos, or with a drawn demo set.

    python data/prepare.py demo                      draw cars into data/demo, in about 10 seconds
    python data/prepare.py carvana DIR               unpack DIR/train.zip and DIR/train_masks.zip
    python data/prepare.py carvana DIR --download    download the two into DIR first

Both make the folders train_images, train_masks, val_images and val_masks. They appear only once
they are complete; after an interruption the same carvana command continues where it stopped.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import support.startup  # noqa: E402, F401

# isort: split

from PIL import Image  # noqa: E402

from data.draw_demo import make_demo  # noqa: E402
from dataset import split_by_car  # noqa: E402
from support.cache import stable_hash  # noqa: E402
from support.command_line import Parser, arguments, run_script  # noqa: E402
from support.errors import BadInput, display_path  # noqa: E402
from support.pairs import Pair, for_all  # noqa: E402
from support.settings import FOLDERS  # noqa: E402
from support.writing import check_output  # noqa: E402

DATA = Path(__file__).resolve().parent
COMPETITION = "carvana-image-masking-challenge"
AGAIN = "download it again"

# Bounds against zip bombs.
MAX_GROWTH = 20  # unpacked bytes per byte of the zip file; photos and masks hardly shrink
MAX_PIXELS = 25_000_000  # of one photo; the challenge's have 2.5 million


def prepare_carvana(source, target=DATA):
    """Copy the challenge's pairs into the four folders under `target`, a Path, split by car.

    Every file is decoded once, and the sizes of photo and mask are compared.

    Args:
        source: a folder, a Path, that contains train.zip and train_masks.zip, or both unzipped.

    Raises:
        BadInput: one of the four folders exists, or files are missing or broken. The four folders
            are then neither created nor changed.
    """
    photos = list_source(source, "train", r"\.jpg")
    masks = list_source(source, "train_masks", r"_mask\.gif")
    if unpaired := sorted(photos.keys() ^ masks.keys()):
        problem = f"{display_path(source)}: photos and masks do not pair: {AGAIN}"
        raise BadInput.listing(problem, unpaired)
    pairs = [Pair(name, f"{name}.jpg", f"{name}_mask.gif") for name in sorted(photos)]
    train, val = split_by_car(pairs)
    side_of = dict.fromkeys(train, "train") | dict.fromkeys(val, "val")
    partial_folder = open_partial_folder(target, " ".join(sorted(photos)))

    def copy(pair):
        photo_path = partial_folder / f"{side_of[pair]}_images" / pair.photo
        mask_path = partial_folder / f"{side_of[pair]}_masks" / pair.mask
        if not photo_path.exists():
            copy_pair(photos[pair.name], masks[pair.name], photo_path, mask_path)

    for _ in for_all(copy, pairs, "checking and copying"):
        pass
    if hasattr(os, "sync"):  # the photos reach the disk before their folders' new names do
        os.sync()
    # Training photos last: train.py never starts on part of the folders.
    for folder in reversed(FOLDERS.values()):
        os.replace(partial_folder / folder, target / folder)
    partial_folder.rmdir()
    print(f"{display_path(target)}: {len(train)} pairs for training, {len(val)} for validation")


def list_source(source, name, ending):
    """{photo's name: function that returns a file's content} of source/name.zip or source/name/."""
    archive = source / f"{name}.zip"
    unzipped = source / name
    if archive.exists():
        files = list_zip(archive)
    elif unzipped.is_dir():
        files = {f"{name}/{path.name}": path.read_bytes for path in unzipped.iterdir()}
    else:
        remedy = f"get the files from kaggle.com/c/{COMPETITION}/data, or add --download"
        raise BadInput(source, f"holds neither {archive.name} nor a folder {name}", remedy)
    # Zip files are untrusted input: only names of this form are ever used as file names.
    pattern = re.compile(rf"{name}/([0-9a-f]{{12}}_(?:0[1-9]|1[0-6])){ending}")
    found = {}
    for path, read in files.items():
        if match := pattern.fullmatch(path):
            found[match[1]] = read
    if not found:
        raise BadInput(source, f"its {name} holds no file of the challenge", AGAIN)
    return found


def list_zip(archive):
    """{member's name: function that returns its content} of a zip file. Raises BadInput."""
    try:
        opened = zipfile.ZipFile(archive)
    except Exception as error:  # zipfile raises many types for broken files
        raise BadInput(archive, f"cannot be read ({error})", AGAIN) from None
    size = sum(info.file_size for info in opened.infolist())
    if size > MAX_GROWTH * archive.stat().st_size:
        raise BadInput(archive, f"would unpack to {size} bytes, far too many for photos", AGAIN)
    return {info.filename: partial(opened.read, info) for info in opened.infolist()}


def read_image(read, name):
    """The content of an image file, bytes, and its (width, height); `name` is for messages."""
    try:
        content = read()
        with Image.open(io.BytesIO(content), formats=("JPEG", "GIF")) as image:
            size = image.size
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is too large")
            image.draft(None, (1, 1))  # reads all of a JPEG, at the lowest resolution
            image.load()
    except Exception as error:  # decoders raise many types for broken files
        raise BadInput(name, f"cannot be read ({error})", AGAIN) from None
    return content, size


def open_partial_folder(target, names):
    """Create the folder in which the four are built, or reuse that of an interrupted run.

    Its name holds a hash of the photos' names: with other photos the split is another one.
    """
    partial_folder = target / f".carvana-{stable_hash(names):016x}.partial"
    existing = [folder for folder in FOLDERS.values() if (target / folder).exists()]
    for folder in existing:
        # A run interrupted while renaming has left its folder without those it had renamed.
        if not partial_folder.exists() or (partial_folder / folder).exists():
            remedy = "move it away, or name another --output-dir"
            raise BadInput(target / folder, "already exists", remedy)
    for other in set(target.glob(".carvana-*.partial")) - {partial_folder}:
        shutil.rmtree(other)
    for folder in existing:
        os.replace(target / folder, partial_folder / folder)
    for folder in FOLDERS.values():
        (partial_folder / folder).mkdir(parents=True, exist_ok=True)
    return partial_folder


def copy_pair(read_photo, read_mask, photo_path, mask_path):
    """Check a pair and write it, the photo last: where it exists, the pair is complete."""
    mask, mask_size = read_image(read_mask, mask_path.name)
    photo, photo_size = read_image(read_photo, photo_path.name)
    if mask_size != photo_size:
        raise BadInput(photo_path.name, f"its mask has another size: {mask_size}", AGAIN)
    for path, content in ((mask_path, mask), (photo_path, photo)):
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        os.replace(part, path)


def download(folder):
    """Download the two zip files with Kaggle's client. Raises BadInput where that fails."""
    token = f"put a token into ~/.kaggle/kaggle.json and accept kaggle.com/c/{COMPETITION}/rules"
    if shutil.which("kaggle") is None:
        raise BadInput("kaggle", "the client is not installed", f"pip install kaggle, {token}")
    for name in ("train.zip", "train_masks.zip"):
        if zipfile.is_zipfile(folder / name):
            continue
        command = ["kaggle", "competitions", "download", "--force", "-c", COMPETITION, "-f", name]
        if subprocess.run([*command, "-p", str(folder)], check=False).returncode:
            raise BadInput(None, f"{' '.join(command)} failed", token)


def get_args_parser():
    """The parser of the two commands."""
    parser = Parser(prog="prepare.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="draw the demo set")
    demo.add_argument(
        "--output-dir", metavar="DIR", type=Path, default=DATA / "demo", help="default: data/demo"
    )
    carvana = commands.add_parser("carvana", help="unpack the challenge's photos and masks")
    carvana.add_argument(
        "source", metavar="DIR", type=Path, help="folder with train.zip and train_masks.zip"
    )
    carvana.add_argument("--download", action="store_true", help="download them into DIR first")
    carvana.add_argument(
        "--output-dir", metavar="DIR", type=Path, default=DATA, help="default: data"
    )
    return parser


def main(argv=None):
    """Do what the flags in argv ask for; returns the exit code."""
    args = get_args_parser().parse_args(arguments(argv))
    check_output(args.output_dir)
    if args.command == "carvana":
        if args.download:
            download(args.source)
        prepare_carvana(args.source, args.output_dir)
        return 0
    if args.output_dir.exists():
        raise BadInput(args.output_dir, "already exists", "remove it to draw the demo set again")
    make_demo(args.output_dir)
    print(f"{display_path(args.output_dir)}: the demo set is drawn; now run python train.py")
    return 0


if __name__ == "__main__":
    run_script(main)
