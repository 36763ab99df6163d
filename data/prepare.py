"""Fill data/: with the challenge's photos, or with a demo set that is drawn.

    python data/prepare.py demo                      cars drawn into data/demo, a few seconds
    python data/prepare.py carvana DIR_WITH_ZIPS     from train.zip and train_masks.zip
    python data/prepare.py carvana DIR --download    fetch the two with the kaggle client first

Both end in train_images, train_masks, val_images and val_masks. Everything is built aside and
renamed when it is whole; a run that was stopped or killed goes on where it was. Exit codes: 0 done,
2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
from command_line import Parser, run_script  # noqa: E402
from data.draw_demo import make_demo  # noqa: E402
from dataset import car_id, split_by_car  # noqa: E402
from files import BadInput, Pair, check_scans, for_all_pairs, shown  # noqa: E402

DATA = Path(__file__).resolve().parent
COMPETITION = "carvana-image-masking-challenge"
MAX_MEMBER_BYTES = 50_000_000  # of one file in a zip; the largest photo has 0.2 million
MAX_GROWTH = 20  # bytes unpacked for each byte of the zip; photos and masks hardly shrink
MAX_PIXELS = 25_000_000  # of one photo; they have 2.5 million
FORMATS = ("JPEG", "GIF")
FOLDERS = ("train_images", "train_masks", "val_images", "val_masks")
NAME = "[0-9a-f]{12}_(?:0[1-9]|1[0-6])"  # car and view


# The challenge's files ----------------------------------------------------------------------------


def prepare_carvana(source, target=DATA):
    """Copy the challenge's pairs into the four folders under `target`, split by car.

    Args:
        source: a folder with train.zip and train_masks.zip, or with both unzipped.

    Every pair is decoded once and its sizes compared. Raises BadInput, with nothing changed in the
    four folders, for anything that is not the challenge's.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise BadInput(f"{shown(source)}: no such folder: name the one that holds train.zip")
    photos = list_source(source, "train", rf"({NAME})\.jpg")
    masks = list_source(source, "train_masks", rf"({NAME})_mask\.gif")
    alone = [f"train/{n}.jpg" for n in photos.keys() - masks.keys()]
    alone += [f"train_masks/{n}_mask.gif" for n in masks.keys() - photos.keys()]
    if alone:
        what = f"{shown(source)}: photos and masks do not pair: download it again"
        raise BadInput.listing(what, sorted(alone))

    cars = {car_id(name) for name in photos}
    if len(cars) < 2:
        raise BadInput(
            f"{shown(source)}: {len(cars)} cars, and the split needs two: get the whole files"
        )
    pairs = [Pair(name, f"{name}.jpg", f"{name}_mask.gif") for name in sorted(photos)]
    train, val = split_by_car(pairs)
    sides = dict.fromkeys(train, "train") | dict.fromkeys(val, "val")
    # Named after what it is made from: what another source left there would not be the same split.
    digest = hashlib.blake2b(" ".join(sorted(photos)).encode(), digest_size=8).hexdigest()
    aside = target / f".carvana-{digest}.partial"
    for other in set(target.glob(".carvana-*.partial")) - {aside}:
        shutil.rmtree(other)
    for folder in FOLDERS:
        if (target / folder).exists() and (not aside.exists() or (aside / folder).exists()):
            path = target / folder
            raise BadInput(
                f"{shown(path)}: exists already: move it away, or name another --output-dir"
            )
    # Where each folder is now: in its place, if a run was killed while it renamed them.
    places = {f: target / f if (target / f).exists() else aside / f for f in FOLDERS}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)

    def copy(pair):
        photo = places[f"{sides[pair]}_images"] / pair.photo
        mask = places[f"{sides[pair]}_masks"] / pair.mask
        if not all(path.exists() and path.stat().st_size for path in (photo, mask)):
            copy_pair(photos[pair.name], masks[pair.name], photo, mask)

    for _ in for_all_pairs(copy, pairs, "checking and copying"):
        pass

    if hasattr(os, "sync"):  # the photos reach the disk before their folders' new names
        os.sync()
    # Training photos last: a kill between these leaves nothing that train.py would start on.
    for folder in reversed(FOLDERS):
        os.replace(places[folder], target / folder)
    aside.rmdir()
    print(f"{shown(target)}: {len(train)} pairs for training, {len(val)} for validation")


def list_source(source, folder, pattern):
    """{name: function that reads the file} of one zip file, or of the same folder unzipped."""
    archive = source / f"{folder}.zip"
    if archive.exists():
        try:
            return list_zip(archive, folder, pattern)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise BadInput(
                f"{shown(archive)}: cannot be read ({error}): download it again"
            ) from None
    if (source / folder).is_dir():
        paths = [p for p in (source / folder).iterdir() if not p.name.startswith(".")]
        return {member_name(p.name, pattern, shown(source / folder)): p.read_bytes for p in paths}
    raise BadInput(
        f"{shown(source)}: holds neither {archive.name} nor a folder {folder}: get the files from "
        f"kaggle.com/c/{COMPETITION}/data, or add --download"
    )


def list_zip(archive, folder, pattern):
    """list_source of a zip file. Raises BadInput for members that have no business there."""
    opened, where = zipfile.ZipFile(archive), shown(archive)
    infos, members = opened.infolist(), {}
    total, size = sum(info.file_size for info in infos), archive.stat().st_size
    if total > MAX_GROWTH * size:
        raise BadInput(
            f"{where}: would unpack {size} bytes to {total}: nothing was unpacked; "
            "download it again"
        )
    for info in infos:
        if info.filename.endswith("/"):  # is_dir() fails where there is no name
            continue
        usual = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1 or not usual:
            raise BadInput(
                f"{where}: {info.filename!r} is a link, encrypted or packed in an odd way: "
                "nothing was unpacked; download it again"
            )
        if not info.filename.startswith(f"{folder}/"):
            raise BadInput(
                f"{where}: {info.filename!r} is not in {folder}/, so it is not the challenge's "
                "file: nothing was unpacked; download it again"
            )
        if info.file_size > MAX_MEMBER_BYTES:
            raise BadInput(
                f"{where}: {info.filename!r} has {info.file_size} bytes: nothing was unpacked; "
                "download it again"
            )
        name = member_name(info.filename.removeprefix(f"{folder}/"), pattern, where)
        if name in members:
            raise BadInput(
                f"{where}: {info.filename!r} is in it twice: nothing was unpacked; "
                "download it again"
            )
        members[name] = lambda info=info: read_member(opened, info)
    return members


def read_member(archive, info):
    """A member's bytes; not more than it has declared, whatever it unpacks to."""
    with archive.open(info) as file:
        return file.read(info.file_size + 1)


def member_name(file_name, pattern, where):
    """A photo's name from its file's. Raises BadInput for all that is not a plain file name."""
    found = re.fullmatch(pattern, file_name)
    if not found:
        raise BadInput(
            f"{where}: {file_name!r} is no file of the challenge: nothing was unpacked; remove it, "
            "or download the file again"
        )
    return found[1]


def copy_pair(read_photo, read_mask, photo_path, mask_path):
    """Decode a pair, compare the sizes, write both files, the photo last. Raises BadInput."""
    contents, sizes = [], []
    for read, path in ((read_photo, photo_path), (read_mask, mask_path)):
        try:
            contents.append(read())
            with Image.open(io.BytesIO(contents[-1]), formats=FORMATS) as image:
                sizes.append(image.size)
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} is too large")
                check_scans(path, image)
                image.draft(None, (1, 1))  # all of a JPEG is read, but little of it computed
                image.load()
        except Exception as error:  # a decoder fed with a broken file raises whatever it likes
            raise BadInput(f"{path.name}: cannot be read ({error}): download it again") from None
    if sizes[0] != sizes[1]:
        raise BadInput(f"{photo_path.name}: {sizes[0]}, but its mask {sizes[1]}: download it again")
    for path, content in ((mask_path, contents[1]), (photo_path, contents[0])):
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        os.replace(part, path)


def download(folder):
    """Fetch the two zip files with the official client. Raises BadInput where it cannot."""
    if shutil.which("kaggle") is None:
        raise BadInput(
            "the kaggle client is not installed: pip install kaggle, put your API token into "
            f"~/.kaggle/kaggle.json and accept the rules on kaggle.com/c/{COMPETITION}/rules"
        )
    for name in ("train.zip", "train_masks.zip"):
        if zipfile.is_zipfile(Path(folder) / name):
            continue
        command = ["kaggle", "competitions", "download", "--force", "-c", COMPETITION, "-f", name]
        done = subprocess.run([*command, "-p", str(folder)], check=False)
        if done.returncode:
            raise BadInput(
                f"{' '.join(command)} failed: is your API token in ~/.kaggle/kaggle.json, and are "
                f"the rules accepted on kaggle.com/c/{COMPETITION}/rules?"
            )


# The command line ---------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(prog="prepare.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="draw the demo set into data/demo")
    carvana = commands.add_parser("carvana", help="unpack the challenge's photos and masks")
    carvana.add_argument("source", metavar="DIR", help="where train.zip and train_masks.zip are")
    carvana.add_argument("--download", action="store_true", help="fetch them into DIR first")
    for command, default in ((demo, DATA / "demo"), (carvana, DATA)):
        command.add_argument(
            "--output-dir", metavar="DIR", default=default, type=Path, help="instead of data/"
        )
    args = parser.parse_args(argv)
    try:
        if args.command == "demo":
            if args.output_dir.exists():
                raise BadInput(
                    f"{shown(args.output_dir)}: exists already: remove it to draw it again"
                )
            make_demo(args.output_dir)
            print(f"{shown(args.output_dir)}: photos and masks are drawn; now python train.py")
        else:
            if args.download:
                download(args.source)
            prepare_carvana(args.source, args.output_dir)
    except OSError as problem:
        path, reason = problem.filename or args.output_dir, problem.strerror or problem
        raise BadInput(
            f"{shown(path)}: {reason}: free some space, or name another --output-dir"
        ) from None
    except KeyboardInterrupt:
        if args.command == "carvana":
            print("the same command goes on from here", file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    run_script(main)
