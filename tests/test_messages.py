"""Bad input: one line that says where, what is wrong and what to do; exit code 2; nothing is lost.

Each case harms a folder of its own, which is the working directory and holds

    data/train_images, data/train_masks    five cars, two photos each; PHOTO and MASK are the first
    run/my_checkpoint.pth.tar              NET, of a finished run
    car.jpg                                a photo
"""

import ast
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image

import predict
import test as evaluation
import train
from data import prepare
from dataset import get_loaders
from predict import Predictor
from support.errors import BadInput, display_path
from support.images import read_photo
from support.masks import read_mask
from support.pairs import find_pairs
from tools import check_data
from utils import load_checkpoint

PHOTOS, MASKS, NET = "data/train_images", "data/train_masks", "run/my_checkpoint.pth.tar"
PHOTO, MASK = f"{PHOTOS}/000000000000_01.jpg", f"{MASKS}/000000000000_01_mask.gif"
PAIRS, PHOTO_2 = f"{PHOTOS} {MASKS}", PHOTO.replace("_01", "_02")


@pytest.fixture(autouse=True)
def place(trained, tmp_path, monkeypatch):
    shutil.copytree(trained.parent, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as in our scripts
    shutil.copy(PHOTO, "car.jpg")


@pytest.fixture
def meet(call):
    """Call what is in MEETS: meet(name, *arguments) -> (exit code, stdout, stderr)."""
    return lambda name, *more: call(MEETS[name][0], *MEETS[name][1].split(), *more)


# What harms files ---------------------------------------------------------------------------------


def write(path, content=b""):
    Path(path).write_bytes(content)


def cut(*paths):
    for path in paths:
        write(path, Path(path).read_bytes()[:-300])


def save(path, *shape):
    """Save a picture of random pixels."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).save(path)


def swap():
    for before, after in ((PHOTOS, "moved"), (MASKS, PHOTOS), ("moved", MASKS)):
        os.rename(before, after)


def remove_but(name, folder):
    for path in Path(folder).rglob("*.*g*"):
        if name not in path.name:
            path.unlink()


def empty_masks():
    for path in Path(MASKS).iterdir():
        Image.new("L", (72, 48)).save(path)


def change(entries):
    """Give a checkpoint other entries."""
    torch.save(torch.load(NET, weights_only=True) | entries, NET)


# What meets it ------------------------------------------------------------------------------------

MEETS = {  # scripts and functions, each with the arguments that a case need not name
    "read_photo": (lambda argv: read_photo(*argv), "car.jpg"),
    "read_mask": (lambda argv: read_mask(*argv), "a.png"),
    "find_pairs": (lambda argv: find_pairs(*argv), PAIRS),
    "get_loaders": (lambda argv: get_loaders(*argv, None, None, 2, size=(16, 24)), PAIRS),
    "load": (lambda argv: load_checkpoint(*argv), NET),
    "Predictor": (lambda argv: Predictor(*argv), NET),
    "train.py": (train.main, f"--data-dir data --output-dir new --no-cache {' '.join(SMALL)}"),
    "test.py": (evaluation.main, f"--checkpoint {NET} --output-dir new --device cpu"),
    "predict.py": (predict.main, f"--checkpoint {NET} --output new --device cpu"),
    "check_data.py": (check_data.main, PAIRS),
    "prepare.py": (prepare.main, "carvana"),
}

# What is told -------------------------------------------------------------------------------------

RESUME = "train.py --output-dir run --load-model --epochs 3"
NO_MASK = "so it is not a mask of background and object | save it in black and white (or are the"
NO_STATE = (
    f"{NET} | not a checkpoint of tensors and plain values with a state_dict, or cut off | use"
)
NO_UNET = f"{NET} | not a checkpoint of this U-Net ( | name another file"
NO_RUN = f"{NET} | its optimizer or history cannot be resumed ( | leave --load-model out to"
UNPAIRED = f"photos in {PHOTOS} and masks in {MASKS} do not pair"
UNUSABLE = "files that cannot be used"
CUT = "cannot be read as an image (image file is truncated | copy it again, or remove it"
EMPTY = "the file is empty (0 bytes) | copy it again, or remove it"
HELP = "| --help lists the flags"
HUGE = b"P6 100000 100000 255\n"  # the header of a picture

# What meets the harm; how the three parts of the message begin, where | what is wrong | what to do,
# or a headline and such a line for each of several files; what does the harm, and its arguments.
CASES = [
    ("read_photo", f"car.jpg | {EMPTY}", write, "car.jpg"),
    ("read_photo", f"car.jpg | {CUT}", cut, "car.jpg"),
    ("read_photo", "car.jpg | cannot be read as an image (not | copy", write, "car.jpg", b"text"),
    ("read_photo", "car.jpg | no such file | check the path", os.remove, "car.jpg"),
    ("read_photo", "car.jpg | 100000x100000 is more | scale it down", write, "car.jpg", HUGE),
    ("read_mask", f"a.png | has colours, {NO_MASK}", save, "a.png", 9, 9, 3),
    ("read_mask", f"a.png | has shades of grey in most places, {NO_MASK}", save, "a.png", 9, 9),
    # Folders
    ("find_pairs", f"{PHOTOS} | no such folder | check the path, or see", shutil.rmtree, PHOTOS),
    ("find_pairs", f"{PHOTOS} | holds no images | put them there, or", remove_but, "?", PHOTOS),
    ("find_pairs", f"{PHOTOS} | holds masks, and {MASKS} photos | swap the two folders", swap),
    ("get_loaders", f"{PHOTO} | the only car or ph | add photos", remove_but, "0000_0", "data"),
    (
        "get_loaders",
        f"{MASKS} | no mask has a pixel of an object | save them with 255",
        empty_masks,
    ),
    (
        "train.py",
        f"{UNPAIRED} (2):\n{PHOTO} | no mask in {MASKS} | add it, or remove the photo\n"
        f"{MASKS}/x.gif | no photo | add it, or remove the mask",
        *(os.rename, MASK, f"{MASKS}/x.gif"),
    ),
    (
        "train.py",
        f"{UNPAIRED} (1):\n{PHOTO} | beside {PHOTO[:-3]}png, {MASK} | one photo and one mask were",
        *(save, f"{PHOTO[:-3]}png", 48, 72),
    ),
    ("train.py", f"{UNUSABLE} (1):\n{PHOTO} | 72x48, but its mask | make one", save, MASK, 10, 20),
    ("train.py", f"{UNUSABLE} (2):\n{PHOTO} | {CUT}\n{PHOTO_2} | {CUT}", cut, PHOTO, PHOTO_2),
    ("train.py --cache", f"{UNUSABLE} (1):\n{MASK} | {EMPTY}", write, MASK),
    # Checkpoints
    ("load", f"{NET} | no checkpoint to read (No such file | name another", os.remove, NET),
    ("test.py --checkpoint run", "run | no checkpoint to read (Is a directory) | name another"),
    ("test.py", NO_STATE, write, NET, b"a text"),
    ("Predictor", NO_STATE, cut, NET),
    ("load", NO_UNET, change, {"threshold": "text"}),
    (RESUME, NO_STATE, cut, NET),
    (f"{RESUME} --features 8", "--features | the checkpoint's network has (4, 8) | leave it out"),
    (RESUME, NO_RUN, change, {"history": [{}]}),
    (RESUME, NO_RUN, change, {"part": {"step": 1}}),
    (RESUME, NO_RUN, change, {"progress": {"n_photos": 2, "photos_done": 3, "batches_done": 1}}),
    # Scripts
    ("train.py --epochs 0", f"--num-epochs 0 | should be greater than 0 {HELP}"),
    ("train.py --crop 1.5", f"--crop 1.5 | should be a valid integer {HELP}"),
    (
        "train.py --lr nan",
        f"--learning-rate nan | should be a finite number {HELP}",
    ),
    ("train.py --group [(", f"--group [( | should be a regular expression with a (group) {HELP}"),
    ("train.py --group a", f"--group a | should be a regular expression with a (group) {HELP}"),
    ("train.py --loss mse", f"--loss mse | should be 'bce' or 'bce-dice' {HELP}"),
    ("predict.py", f"predict.py | the following arguments are required: PHOTO {HELP}"),
    ("train.py --data-dir nowhere", "nowhere/train_images | no such folder | check the path"),
    ("train.py --device meta", "--device meta | cannot be used (it is not | try --device cpu"),
    ("train.py --device nonsense", "--device nonsense | cannot be used ( | try --device cpu"),
    ("train.py --device cuda:99", "--device cuda:99 | cannot be used ( | try --device cpu"),
    ("train.py --output-dir car.jpg/a", "car.jpg/a | cannot be written | name another --output-d"),
    ("train.py --cache --cache-dir car.jpg", "car.jpg/train_im | cannot be written | free some"),
    (
        "train.py --image-height 7",
        "--image-height, --image-width, --crop | 2 levels of | name larger",
    ),
    ("train.py --gamma 3 --scheduler none", "--gamma | belongs to --scheduler | leave"),
    ("test.py --image-dir a", "--image-dir and --mask-dir | belong together | name both"),
    ("test.py --csv car.jpg/a.csv", "car.jpg | cannot be written | name another --csv"),
    ("predict.py a *.gif", "a, *.gif | no such photo or folder | check the path"),
    ("predict.py run", "run | holds no images | put them there"),
    ("predict.py car.jpg --background a.jpg", "a.jpg | no such file | check the path"),
    ("predict.py car.jpg --output car.jpg/a", "car.jpg/a/car_mask.png | cannot be written | free"),
    ("predict.py car.jpg --threshold 1", f"predict.py | argument --threshold: 1 is not a n {HELP}"),
    (f"predict.py {PHOTOS} --output {PHOTOS}", f"{PHOTOS} | holds the photos | name another"),
    ("check_data.py --sheet car.jpg/a.png", "car.jpg | cannot be written | name another --sheet"),
    (f"check_data.py --sheet {MASKS}/a", f"{MASKS}/a | lies among the photos | name another"),
    ("check_data.py --val-img-dir a", "--val-img-dir and --val-mask-dir | belong toge | name both"),
    ("prepare.py", f"prepare.py carvana | the following arguments are required: DIR {HELP}"),
    ("prepare.py a --output-dir car.jpg/a", "car.jpg/a | cannot be written | name another --outp"),
    ("prepare.py a", "a | holds neither train.zip nor a folder train | get the files from"),
    ("prepare.py .", "train.zip | cannot be read ( | download", write, "train.zip", b"a text"),
]


def files():
    """{path: content} of all files."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1].split(" | ")[1][:60])
def test_a_message_says_where_what_is_wrong_and_what_to_do(case, call):
    command, told, *harm = case
    if harm:
        harm[0](*harm[1:])
    before, (name, *flags) = files(), command.split()
    main, usual = MEETS[name]
    with pytest.raises(BadInput) as caught:
        main([*usual.split(), *flags])
    assert files() == before, "nothing is written or lost"
    problem = caught.value
    assert call(raising(problem)) == (2, "", f"error: {problem}\n")
    for line, parts in zip(str(problem).splitlines(), told.split("\n"), strict=True):
        places = [line.index(part) for part in parts.split(" | ")]
        assert places == sorted(places)
    if "\n" not in told:
        where, what, do = told.split(" | ")
        assert display_path(problem.path).startswith(where)
        assert problem.reason.startswith(what) and problem.remedy.startswith(do)


def raising(problem):
    def main(argv):
        raise problem

    return main


@pytest.mark.parametrize(
    "problem, told",
    [
        (MemoryError(), "out of memory: try, in this order, a smaller --batch-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), "a data worker was killed"),
        (OSError(28, "No space left", "a\nb"), "a\\nb: No space left: check that it exists"),
    ],
)
def test_what_the_system_refuses_is_told_in_a_line_too(call, problem, told):
    code, _, err = call(raising(problem))
    assert code == 2 and err.startswith(f"error: {told}") and err.count("\n") == 1


NAMES = ["new\nline", "quo'te\"s", "äöü 照片 🚗", "--epochs", "red \x1b[31m", "100% {0} [a]*?"]
NAMES += [os.fsdecode(b"broken \xff")]


def test_any_name_that_the_system_allows_is_taken_and_shown_on_one_line(meet):
    for number, name in enumerate(NAMES):
        view = f"{number // 2:012x}_{number % 2 + 1:02d}"
        os.rename(f"{PHOTOS}/{view}.jpg", f"{PHOTOS}/{name}.jpg")
        os.rename(f"{MASKS}/{view}_mask.gif", f"{MASKS}/{name}_mask.gif")
    shutil.move("data", "my \n photos")

    def run(*command):
        code, *texts = meet(*command)
        assert not any(odd in text for odd in ("\x1b", "new\nline", "my \n") for text in texts)
        return code, "".join(texts)

    folders = [Path("my \n photos", name).resolve() for name in ("train_images", "train_masks")]
    train_it = ("train.py", "--epochs", 1, "--data-dir", "my \n photos")
    assert run(*train_it)[0] == 0
    code, text = run("test.py", "--image-dir", folders[0], "--mask-dir", folders[1])
    assert code == 0 and "照片" in text and "new\\nline" in text
    assert run("predict.py", folders[0], "--cutout")[0] == 0
    assert len(list(Path().glob("new/*_cutout.png"))) == 10
    write(folders[0] / "new\nline.jpg")
    code, text = run(*train_it)
    assert code == 2 and "new\\nline.jpg: the file is empty" in text and text.count("\n") == 2


def test_all_messages_in_the_sources_have_their_parts():
    """A reason always; a place and a remedy, unless they are in another's message passed on."""
    folders, found = [ROOT, ROOT / "support", ROOT / "tools", ROOT / "data"], 0
    for path in (path for folder in folders for path in folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "BadInput":
                given = [ast.unparse(argument) not in ("None", "''") for argument in node.args]
                where, reason, remedy = [*given, False][:3]
                assert reason and (remedy or not where), f"{path.name}:{node.lineno}"
                found += 1
    assert found > 40
