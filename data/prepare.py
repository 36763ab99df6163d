"""Fill data/: with the challenge's photos, or with a demo set that is drawn.

    python data/prepare.py demo                      cars drawn into data/demo, a few seconds
    python data/prepare.py carvana DIR_WITH_ZIPS     from train.zip and train_masks.zip
    python data/prepare.py carvana DIR --download    fetch the two with the kaggle client first

Both end in train_images, train_masks, val_images and val_masks. Everything is built aside and
renamed when it is whole; a run that was stopped or killed goes on where it was.
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

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
from data.draw_demo import make_demo  # noqa: E402
from dataset import split_by_car  # noqa: E402
from support.cache import stable_hash  # noqa: E402
from support.command_line import Parser, run_script  # noqa: E402
from support.errors import BadInput, display_path  # noqa: E402
from support.pairs import Pair, for_all  # noqa: E402
from support.settings import FOLDERS  # noqa: E402
from support.writing import check_output  # noqa: E402

DATA = Path(__file__).resolve().parent
COMPETITION = "carvana-image-masking-challenge"
AGAIN = "download it again"
# Bounds against zip bombs.
MAX_GROWTH = 20  # bytes unpacked for each byte of the zip; photos and masks hardly shrink
MAX_PIXELS = 25_000_000  # of one photo; they have 2.5 million


def prepare_carvana(source, target=DATA):
    """Copy the challenge's pairs into the four folders under `target`, split by car.

    Args:
        source: a folder with train.zip and train_masks.zip, or with both unzipped.

    Every pair is decoded once and its sizes compared. Raises BadInput, with nothing changed in the
    four folders, where they exist, and for files that are missing or broken.
    """
    source, target = Path(source), Path(target)
    photos = list_source(source, "train", r"\.jpg")
    masks = list_source(source, "train_masks", r"_mask\.gif")
    if alone := sorted(photos.keys() ^ masks.keys()):
        raise BadInput.listing(
            f"{display_path(source)}: photos and masks do not pair: {AGAIN}", alone
        )
    pairs = [Pair(name, f"{name}.jpg", f"{name}_mask.gif") for name in sorted(photos)]
    train, val = split_by_car(pairs)
    sides = dict.fromkeys(train, "train") | dict.fromkeys(val, "val")
    aside = prepare_aside(target, " ".join(sorted(photos)))

    def copy(pair):
        photo = aside / f"{sides[pair]}_images" / pair.photo
        mask = aside / f"{sides[pair]}_masks" / pair.mask
        if not photo.exists():
            copy_pair(photos[pair.name], masks[pair.name], photo, mask)

    for _ in for_all(copy, pairs, "checking and copying"):
        pass
    if hasattr(os, "sync"):  # the photos reach the disk before their folders' new names
        os.sync()
    # Training photos last: a kill between these leaves nothing that train.py would start on.
    for folder in reversed(FOLDERS.values()):
        os.replace(aside / folder, target / folder)
    aside.rmdir()
    print(f"{display_path(target)}: {len(train)} pairs for training, {len(val)} for validation")


# The challenge's files ----------------------------------------------------------------------------


def list_source(source, folder, ending):
    """{photo's name: function that reads the file} of one zip file, or of its folder unzipped."""
    archive, unzipped = source / f"{folder}.zip", source / folder
    if archive.exists():
        files = list_zip(archive)
    elif unzipped.is_dir():
        files = {f"{folder}/{path.name}": path.read_bytes for path in unzipped.iterdir()}
    else:
        remedy = f"get the files from kaggle.com/c/{COMPETITION}/data, or add --download"
        raise BadInput(source, f"holds neither {archive.name} nor a folder {folder}", remedy)
    # Only what is named as a car's view: no other name of a stranger's zip becomes one on the disk.
    pattern = re.compile(rf"{folder}/([0-9a-f]{{12}}_(?:0[1-9]|1[0-6])){ending}")
    found = {pattern.fullmatch(name): read for name, read in files.items()}
    found = {match[1]: read for match, read in found.items() if match}
    if not found:
        raise BadInput(source, f"its {folder} holds no file of the challenge", AGAIN)
    return found


def list_zip(archive):
    """{member's name: function that reads it} of a zip file. Raises BadInput."""
    try:
        opened = zipfile.ZipFile(archive)
    except Exception as error:  # of a broken file zipfile raises this and that
        raise BadInput(archive, f"cannot be read ({error})", AGAIN) from None
    size = sum(info.file_size for info in opened.infolist())
    if size > MAX_GROWTH * archive.stat().st_size:
        raise BadInput(archive, f"would unpack to {size} bytes, as no photos do", AGAIN)
    return {info.filename: partial(opened.read, info) for info in opened.infolist()}


def prepare_aside(target, names):
    """Make the folder that the four are built in, or find it as a run left it. Raises BadInput."""
    # Named after what it is made from: what another source left there would not be the same split.
    aside = target / f".carvana-{stable_hash(names):016x}.partial"
    renamed = [folder for folder in FOLDERS.values() if (target / folder).exists()]
    for folder in renamed:
        if not aside.exists() or (aside / folder).exists():
            path, remedy = target / folder, "move it away, or name another --output-dir"
            raise BadInput(path, "exists already", remedy)
    for other in set(target.glob(".carvana-*.partial")) - {aside}:
        shutil.rmtree(other)
    for folder in renamed:  # by a run that was killed then
        os.replace(target / folder, aside / folder)
    for folder in FOLDERS.values():
        (aside / folder).mkdir(parents=True, exist_ok=True)
    return aside


def copy_pair(read_photo, read_mask, photo_path, mask_path):
    """Decode a pair, compare the sizes, write both files, the photo last. Raises BadInput."""
    contents, sizes = {}, {}
    for path, read in ((mask_path, read_mask), (photo_path, read_photo)):
        try:
            contents[path] = read()
            with Image.open(io.BytesIO(contents[path]), formats=("JPEG", "GIF")) as image:
                sizes[path] = image.size
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} is too large")
                image.draft(None, (1, 1))  # all of a JPEG is read, but little of it computed
                image.load()
        except Exception as error:  # a decoder fed with a broken file raises whatever it likes
            raise BadInput(path.name, f"cannot be read ({error})", AGAIN) from None
    if len(set(sizes.values())) == 2:
        raise BadInput(photo_path.name, f"its mask has another size: {sizes[mask_path]}", AGAIN)
    for path, content in contents.items():
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        os.replace(part, path)


def download(folder):
    """Fetch the two zip files with the official client. Raises BadInput where it cannot."""
    token = f"put a token into ~/.kaggle/kaggle.json and accept kaggle.com/c/{COMPETITION}/rules"
    if shutil.which("kaggle") is None:
        raise BadInput("kaggle", "the client is not installed", f"pip install kaggle, {token}")
    for name in ("train.zip", "train_masks.zip"):
        if zipfile.is_zipfile(Path(folder) / name):
            continue
        command = ["kaggle", "competitions", "download", "--force", "-c", COMPETITION, "-f", name]
        if subprocess.run([*command, "-p", str(folder)], check=False).returncode:
            raise BadInput(None, f"{' '.join(command)} failed", token)


def main(argv=None):
    """Do what the flags in argv ask for; returns the exit code."""
    parser = Parser(prog="prepare.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="draw the demo set into data/demo")
    carvana = commands.add_parser("carvana", help="unpack the challenge's photos and masks")
    carvana.add_argument("source", metavar="DIR", help="where train.zip and train_masks.zip are")
    carvana.add_argument("--download", action="store_true", help="fetch them into DIR first")
    for command, default in ((demo, DATA / "demo"), (carvana, DATA)):
        about = {"metavar": "DIR", "default": default, "help": "instead of data/"}
        command.add_argument("--output-dir", type=Path, **about)
    args = parser.parse_args(argv)
    check_output(args.output_dir)
    if args.command == "carvana":
        if args.download:
            download(args.source)
        prepare_carvana(args.source, args.output_dir)
    elif args.output_dir.exists():
        raise BadInput(args.output_dir, "exists already", "remove it to draw it again")
    else:
        make_demo(args.output_dir)
        print(f"{display_path(args.output_dir)}: photos and masks are drawn; now python train.py")
    return 0


if __name__ == "__main__":
    run_script(main)
