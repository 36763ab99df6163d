"""Every error message that a user can meet: what is wrong, where, and what to do about it.

CASES lists them, each with a way to meet it; a new message is a line more there. The test after it
finds messages in the sources that no case meets.

A case runs in a folder of its own, which holds (see `furnish`):

    data/train_images, data/train_masks    three pairs, 72x48; PHOTO and MASK are the first
    challenge/train, challenge/train_masks the same, as data/prepare.py takes them; as zip files too
    car.jpg                                a photo
    net.pth.tar                            a classic checkpoint
    run/my_checkpoint.pth.tar              what train.py leaves after an epoch
    empty/                                 nothing
"""

import ast
import contextlib
import functools
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, save_bright_network, write_pairs
from PIL import Image

import app
import bench
import bench_predict
import check_data
import export
import files
import predict
import test as evaluation
import train
from checkpoints import CHECKPOINT, load_checkpoint
from data import prepare
from dataset import CarvanaDataset, make_loader
from model import UNet
from predictor import Predictor
from run import COLUMNS
from submission import Submission

PHOTO = "data/train_images/000000000000_01.jpg"
MASK = "data/train_masks/000000000000_01_mask.gif"
NET, LATEST = "net.pth.tar", f"run/{CHECKPOINT}"
SHARED = torch.zeros(8, 4, 3, 3)
FOLDERS = "--image-dir data/train_images --mask-dir data/train_masks"


SCRIPTS = {  # each with the flags that a case need not name
    "train.py": (train.main, f"--data-dir data --output-dir run --epochs 1 {' '.join(SMALL)}"),
    "test.py": (evaluation.main, f"--checkpoint {NET} --output-dir . --device cpu"),
    "predict.py": (predict.main, f"--checkpoint {NET} --device cpu"),
    "export.py": (export.main, f"--checkpoint {NET}"),
    "app.py": (app.main, f"--checkpoint {NET}"),
    "check_data.py": (check_data.main, "--sheet sheet.png"),
    "bench.py": (bench.main, "--device cpu"),
    "bench_predict.py": (bench_predict.main, "--device cpu"),
    "prepare.py": (prepare.main, ""),
}


class Case(NamedTuple):
    """A message, and a way to meet it.

    title: when it comes.
    run: a command such as "test.py --tta", or a function that raises.
    parts: the message's, "where | what | do", as they are to be read in it.
    before: a function that spoils the folder first.
    listing: there are several lines, one a file, below a headline.
    patch: {"module.NAME": value}, such as limits that are to be small.
    hidden: a package that is not to be there.
    needs: a package without which the case cannot be met.
    env: environment variables.
    limit: (resource.RLIMIT_..., value) as the system is to hold this process to.
    code: the exit code.
    stdout: it comes there, in a report.
    start: what it begins with, where that is neither "error: " nor the script's name.
    """

    title: str
    run: object
    parts: str
    before: object = None
    listing: bool = False
    patch: dict = {}
    hidden: str = ""
    needs: str = ""
    env: dict = {}
    limit: tuple = ()
    code: int = 2
    stdout: bool = False
    start: str = ""


# What spoils a folder -----------------------------------------------------------------------------


later = functools.partial


def write(path, content=b""):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def cut(path, count=300):
    """A file without its last bytes."""
    write(path, Path(path).read_bytes()[:-count])


def save(path, image):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def remove(*paths):
    for path in paths:
        os.unlink(path)


def empty_masks():
    for path in Path("data/train_masks").iterdir():
        Image.new("L", (72, 48)).save(path)


def colourful(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def three_colours():
    image = Image.fromarray(np.array([[0, 1, 2, 2]], np.uint8), "P")
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    image.save("mask.png")


def checkpoint(path=NET, **changes):
    """A checkpoint with some of its entries others."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


def weights(without=None, **changes):
    """NET with some of its tensors others; `__` stands for a dot in their names."""
    state = torch.load(NET, weights_only=True)
    state["state_dict"] |= {name.replace("__", "."): value for name, value in changes.items()}
    state["state_dict"].pop(without, None)
    torch.save(state, NET)


def optimizer_of_another_network():
    state = torch.load(LATEST, weights_only=True)["optimizer"]
    state["state"][0]["exp_avg"] = torch.zeros(7, 7)
    checkpoint(LATEST, optimizer=state)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def compress(path):
    """The same as a zip file that is compressed."""
    with zipfile.ZipFile(path) as plain:
        members = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def declare_much(path):
    """The last member's size, in the zip file's own directory, as 2 GiB."""
    content = Path(path).read_bytes()
    place = content.rindex(b"PK\1\2") + 24
    write(path, content[:place] + (2**31).to_bytes(4, "little") + content[place + 4 :])


def with_scans(path):
    """A JPEG that says of itself that it has two hundred scans."""
    content = Path(path).read_bytes()
    scans = b"\xff\xda" * 200
    note = b"\xff\xfe" + (len(scans) + 2).to_bytes(2, "big") + scans
    write(path, content[:2] + note + content[2:])


def add_to_zip(member, path="challenge/train.zip"):
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that come twice
        archive.writestr(member, b"content")


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def unzipped(function, *args):
    """`challenge` as folders, and they spoiled."""
    remove("challenge/train.zip", "challenge/train_masks.zip")
    function(*args)


def one_car_of_the_challenge():
    remove(*(path for path in Path("challenge").glob("*/*") if "00_01" not in path.name))


def kaggle_client_that_fails():
    write("bin/kaggle", b"#!/bin/sh\nexit 1\n")
    os.chmod("bin/kaggle", 0o755)


# What raises --------------------------------------------------------------------------------------


def read_photo():
    files.read_photo("car.jpg")


def read_mask():
    files.read_mask("mask.png")


def load():
    load_checkpoint(NET)


def load_by_a_worker():
    dataset = CarvanaDataset("data/train_images", "data/train_masks", size=(16, 24))
    cut(PHOTO)
    loader = make_loader(dataset, batch_size=1, num_workers=1)
    try:
        next(iter(loader))
    finally:
        loader._iterator._shutdown_workers()  # the traceback would keep them alive


def missing_cache():
    np.load("cache.npy", mmap_mode="r")


def killed_worker():
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def write_mask():
    with files.write_aside("car.jpg/mask.png"):
        pass


def submit():
    return Submission("s.csv", ["a.jpg", "b.jpg"], "as made")


def submit_a_large_mask():
    with submit() as submission:
        submission.add("a.jpg", colourful(100, 100) > 127)


def submit_twice():
    with submit():
        submit()


def too_little_room(path):
    return SimpleNamespace(free=1000)


NO_FILES, SMALL_FILES = ("RLIMIT_NOFILE", 0), ("RLIMIT_FSIZE", 9000)  # of which there is no more
RESUME = "train.py --load-model --epochs 2"
AFRESH = "leave --load-model out to start afresh"
AGAIN, ANOTHER = "copy it again, or remove it", "name another file"
IN_BLACK_AND_WHITE = "save it in black and white (or are the folders of photos and masks swapped?)"
HELP, EDIT = "(--help lists the flags)", "edit the constant"
DOWNLOAD = "download it again"
PAIRS = "data/train_images data/train_masks"
CARVANA = "prepare.py carvana challenge --output-dir new"


def wrong_flag(command, where, what):
    return Case(f"a wrong flag: {command}", command, f"{where} | {what} | {HELP}")


def wrong_constant(name, value, what):
    title = f"a wrong constant: {name} = {value!r}"
    return Case(
        title, "train.py", f"{name} = {value!r} | {what} | {EDIT}", patch={f"train.{name}": value}
    )


def wrong_checkpoint(what, before):
    return Case(f"a checkpoint: {what}", load, f"{NET} | {what} | {ANOTHER}", before)


def wrong_member(what, before):
    title, do = f"a zip file with a member that {what}", f"nothing was unpacked; {DOWNLOAD}"
    return Case(title, CARVANA, f"challenge/train.zip | {what} | {do}", before)


def finding(what, where, before, do="mend them as they say: train.py refuses to start until then"):
    command = f"check_data.py {PAIRS}"
    return Case(f"checking data: {what}", command, f"{where} | {what} | {do}", before, stdout=True)


def wrong_run(what, before):
    return Case(
        f"a run that cannot be resumed: {what}", RESUME, f"{LATEST} | {what} | {AFRESH}", before
    )


PART = {"step": 1, "seen": 1, "order": [42, 3], "loss_sum": torch.zeros(1), "seconds": 1.0}

CASES = [
    # Photos
    Case(
        "an empty file",
        read_photo,
        f"car.jpg | the file is empty | {AGAIN}",
        later(write, "car.jpg"),
    ),
    Case(
        "a photo that is cut off",
        read_photo,
        f"car.jpg | cannot be read as an image (image file is truncated | {AGAIN}",
        later(cut, "car.jpg"),
    ),
    Case(
        "a text called a photo",
        read_photo,
        f"car.jpg | cannot be read as an image (not an image) | {AGAIN}",
        later(write, "car.jpg", b"a text"),
    ),
    Case(
        "a photo of too many scans",
        read_photo,
        "car.jpg | has 201 scans | save it anew, or remove it",
        later(with_scans, "car.jpg"),
    ),
    Case(
        "a photo of too many pixels",
        read_photo,
        "car.jpg | 72x48 is more than 0 megapixels | scale it down, or remove it",
        patch={"files.MAX_PIXELS": 1000},
    ),
    Case(
        "a photo that is not there",
        read_photo,
        "car.jpg | no such file | check the path",
        later(remove, "car.jpg"),
    ),
    Case(
        "a photo of floating-point pixels",
        lambda: files.read_photo("car.tif"),
        "car.tif | floating-point pixels | save it with 8 bits a channel",
        later(save, "car.tif", np.zeros((4, 4), np.float32)),
    ),
    # Masks
    Case(
        "a mask of three colours",
        read_mask,
        f"mask.png | has a palette of 3 colours, so it is no mask | {IN_BLACK_AND_WHITE}",
        three_colours,
    ),
    Case(
        "a photo as a mask",
        read_mask,
        f"mask.png | has colours, so it is no mask | {IN_BLACK_AND_WHITE}",
        later(save, "mask.png", colourful(8, 8, 3)),
    ),
    Case(
        "a grey photo as a mask",
        read_mask,
        f"mask.png | has shades of grey in most places, so it is no mask | {IN_BLACK_AND_WHITE}",
        later(save, "mask.png", np.arange(100, 164, dtype=np.uint8).reshape(8, 8)),
    ),
    Case(
        "a mask of floating-point pixels",
        lambda: files.read_mask("mask.tif"),
        f"mask.tif | has pixels of kind F, so it is no mask | {IN_BLACK_AND_WHITE}",
        later(save, "mask.tif", np.zeros((4, 4), np.float32)),
    ),
    # Folders of pairs
    Case(
        "a folder that is not there",
        "train.py --data-dir nowhere",
        "nowhere/train_images | no such folder | check the path, or see README on the data",
    ),
    Case(
        "a folder without images",
        "train.py --train-img-dir empty --train-mask-dir data/train_masks",
        "empty | holds no images | put them there, or name another folder",
    ),
    Case(
        "a folder that cannot be read",
        lambda: files.find_pairs("data/train_images", "data/train_masks"),
        "data/train_images | cannot be read (Too many open files) | allow it",
        limit=NO_FILES,
    ),
    Case(
        "folders that are swapped",
        "train.py --train-img-dir data/train_masks --train-mask-dir data/train_images",
        "data/train_masks | holds masks, and data/train_images photos | swap the two folders",
    ),
    Case(
        "a photo without a mask",
        "train.py",
        f"{PHOTO} | no mask in data/train_masks | add it, or remove the photo",
        later(remove, MASK),
        listing=True,
    ),
    Case(
        "a mask without a photo",
        "train.py",
        f"{MASK} | no photo | add it, or remove the mask",
        later(remove, PHOTO),
        listing=True,
    ),
    Case(
        "two masks for a photo",
        "train.py",
        f"{MASK} | one photo and one mask were expected | remove the others",
        later(save, MASK.replace("gif", "png"), np.zeros((48, 72), np.uint8)),
        listing=True,
    ),
    Case(
        "a mask of another size than its photo",
        "train.py",
        f"{PHOTO} | 72x48, but its mask {MASK} is 20x10"
        " | make one of them again, or remove both",
        later(save, MASK, np.zeros((10, 20), np.uint8)),
        listing=True,
    ),
    Case(
        "photos that only decoding shows to be bad",
        "train.py",
        f"{PHOTO} | cannot be read as an image (image file is truncated | {AGAIN}",
        later(cut, PHOTO),
        listing=True,
    ),
    Case(
        "masks that are all empty",
        "train.py",
        "data/train_masks | no mask has a pixel of an object"
        " | save them anew, 0 for the background and 255 for the object",
        empty_masks,
    ),
    Case(
        "one photo, for training and for validation",
        "train.py --train-img-dir one --train-mask-dir data/train_masks",
        "one/000000000000_01.jpg | the only car or photo there is, and validation needs another"
        " | add photos, or a folder of validation photos",
        lambda: (
            write("one/000000000000_01.jpg", Path(PHOTO).read_bytes()),
            remove(*sorted(map(str, Path("data/train_masks").iterdir()))[1:]),
        ),
    ),
    Case(
        "a photo that breaks while a worker loads it",
        load_by_a_worker,
        f"{PHOTO} | cannot be read as an image (image file is truncated | {AGAIN}",
    ),
    # Writing
    Case(
        "a folder of results that cannot be made",
        "train.py --output-dir car.jpg/run",
        "car.jpg/run | cannot be written | name another --output-dir",
    ),
    Case(
        "a file that cannot be written",
        write_mask,
        "car.jpg/mask.png | cannot be written ( | free some space or choose another folder",
    ),
    Case(
        "a cache that cannot be written",
        "train.py --cache-dir car.jpg/cache",
        "car.jpg/cache | cannot be written ("
        " | free some space, or use --cache-dir or --no-cache",
    ),
    Case(
        "a cache for which there is no room",
        "train.py --cache-dir cache",
        "cache/train_images- | needs 0.00 GiB, and only 0.00 are free"
        " | free some space, or use --cache-dir or --no-cache",
        patch={"shutil.disk_usage": too_little_room},
    ),
    # train.py: flags
    wrong_flag("train.py --nonsense", "--nonsense", "unrecognized arguments"),
    wrong_flag("train.py --epochs 0", "--epochs", "0 is no whole number from 1 to 1000000"),
    wrong_flag("train.py --lr 0", "--lr", "0 is no number above 0"),
    wrong_flag("train.py --ema 1", "--ema", "1 is no number from 0 to below 1"),
    wrong_flag("train.py --clip-grad -1", "--clip-grad", "-1 is no number from 0 on"),
    wrong_flag(
        "train.py --threshold 2", "--threshold", '2 is no number between 0 and 1, nor "auto"'
    ),
    wrong_flag("train.py --loss mse", "--loss", "invalid choice: 'mse'"),
    Case(
        "photos without masks on the command line",
        "train.py --train-img-dir data/train_images",
        "--train-img-dir and --train-mask-dir | belong together | name both",
    ),
    Case(
        "a flag of another scheduler",
        "train.py --step-size 3 --scheduler cosine",
        "--step-size | belongs to --scheduler step, not cosine | leave one out",
    ),
    Case(
        "a size too small for the network",
        "train.py --image-height 7",
        "--image-height 7 --image-width 48 | the 2 levels of --features halve a photo as often"
        " | both must be at least 8",
    ),
    Case(
        "a size too large for any checkpoint",
        "train.py --image-height 16384 --image-width 16384",
        "--image-height 16384 --image-width 16384 | more than 16777216 pixels"
        " | name smaller ones",
    ),
    Case(
        "a device that is none",
        "train.py --device meta",
        "--device meta | cannot be used here (it is none of cuda, mps and cpu)"
        " | try --device cpu",
    ),
    Case(
        "a flag for several GPUs",
        "train.py --sync-batchnorm",
        "--sync-batchnorm | works on several GPUs only | leave it out",
    ),
    Case(
        "TensorBoard is not installed",
        "train.py --tensorboard",
        "--tensorboard | needs a package more | pip install tensorboard, or leave it out",
        hidden="torch.utils.tensorboard",
    ),
    Case(
        "a folder of TensorBoard's that cannot be made",
        "train.py --tensorboard car.jpg/events",
        "car.jpg/events | cannot be written | name another --tensorboard",
    ),
    Case(
        "weights to start from that are of another network",
        f"train.py --pretrained {NET}",
        "--features 4 8 | the checkpoint's network has 4"
        " | leave --pretrained out to start afresh",
    ),
    Case(
        "a checkpoint to go on with that is of another network",
        "train.py --load-model --in-channels 1",
        "--in-channels 1 | the checkpoint's network has 3"
        " | leave --load-model out to start afresh",
    ),
    # train.py: constants
    wrong_constant("BATCH_SIZE", 0, "0 is no whole number from 1 to 65536"),
    wrong_constant("BATCH_SIZE", None, "it needs a value"),
    wrong_constant("CACHE", "False", "False is neither True nor False"),
    wrong_constant("FEATURES", 64, "64 is no tuple"),
    wrong_constant("DEVICE", 3, "3 is of another type"),
    wrong_constant("IN_CHANNELS", 4, "4 is not among (1, 3)"),
    # train.py: a checkpoint to go on with
    wrong_run("its settings make no sense", later(checkpoint, LATEST, settings=[1])),
    wrong_run("(constants are 3)", later(checkpoint, LATEST, constants=3)),
    wrong_run("(ValueError: best_since is 9)", later(checkpoint, LATEST, best_since=9)),
    wrong_run(
        "(ValueError: its loss is tensor(0.))",
        later(checkpoint, LATEST, part=PART | {"loss_sum": torch.tensor(0.0)}),
    ),
    wrong_run("cannot be gone on with (TypeError", later(checkpoint, LATEST, optimizer=None)),
    wrong_run("(ValueError: exp_avg is [7, 7])", optimizer_of_another_network),
    wrong_run("row 1 of the history is {}", later(checkpoint, LATEST, history=[{}])),
    wrong_run(
        "(ValueError: row 1 of the history is {'accuracy': 5,",
        later(checkpoint, LATEST, history=[dict.fromkeys(COLUMNS, 5)]),
    ),
    wrong_run(
        "(ValueError: its epoch under way is {",
        later(
            checkpoint,
            LATEST,
            part={"step": 9, "seen": 1, "order": [42, 3], "loss_sum": torch.zeros(1)},
        ),
    ),
    # train.py: while it trains
    Case(
        "a loss that is no number",
        "train.py --lr 1e30 --batch-size 1",
        "epoch 1 | the loss is  | try --lr 1e+29; nothing was saved yet",
    ),
    Case(
        "a validation loss that is no number",
        "train.py --lr 1e30 --save-every 0",
        "epoch 1 | the validation loss is nan | try --lr 1e+29; nothing was saved yet",
    ),
    Case(
        "weights that are no numbers",
        "train.py --lr 1e39 --save-every 1",
        "epoch 1 | the weights are no longer numbers | try --lr 1e+38; nothing was saved yet",
    ),
    Case(
        "a checkpoint that the disk does not take",
        "train.py --no-cache",
        f"{LATEST} | cannot be written ("
        " | free some space or choose another folder; nothing was saved yet; to go on: python",
        limit=SMALL_FILES,
    ),
    Case(
        "no place for the demo set",
        later(train.main, []),
        "car.jpg/data/demo | cannot be drawn (Not a directory)"
        " | free some space, or name photos of your own with --data-dir",
        patch={"train.ROOT": Path("car.jpg"), "data.draw_demo.CARS": 1},
    ),
    # What any script may meet
    Case(
        "too little memory for a tensor",
        lambda: torch.empty(2**60),
        "--batch-size | out of memory | try, in this order, a smaller --batch-size",
    ),
    Case(
        "too little memory for an array",
        lambda: np.empty(2**58),
        "--batch-size | out of memory | try, in this order, a smaller --batch-size",
    ),
    Case(
        "a worker that was killed",
        killed_worker,
        "a process that loads data | was killed, as when memory is short | try --num-workers 0",
    ),
    Case(
        "a file that the system does not give",
        missing_cache,
        "cache.npy | No such file or directory | check that it is there",
    ),
    # Checkpoints
    Case(
        "a checkpoint that is not there",
        "predict.py car.jpg --checkpoint nowhere.pth",
        "nowhere.pth | no such checkpoint | train one with python train.py",
    ),
    Case(
        "a folder as a checkpoint",
        "predict.py car.jpg --checkpoint empty",
        "empty | cannot be read (Is a directory) | name a file",
    ),
    Case(
        "a checkpoint that is cut off",
        "train.py --load-model",
        f"{LATEST} | no checkpoint, or cut off | use another copy",
        later(cut, LATEST),
    ),
    Case(
        "a checkpoint that runs code",
        load,
        f"{NET} | could run code if it were loaded | get it from someone you trust",
        lambda: torch.save({"state_dict": RunsCode()}, NET),
    ),
    Case(
        "a checkpoint of an old PyTorch",
        load,
        f"{NET} | saved as before PyTorch 1.6 | load and save it again with a newer one",
        lambda: torch.save({}, NET, _use_new_zipfile_serialization=False),
    ),
    Case(
        "a checkpoint that was packed again",
        load,
        f"{NET} | is compressed, as torch.save leaves no file | use another copy",
        later(compress, NET),
    ),
    Case(
        "a checkpoint that declares more than it holds",
        load,
        f"{NET} | declares 21 | use another copy",
        later(declare_much, NET),
    ),
    Case(
        "a checkpoint with something before it",
        load,
        f"{NET} | begins with something else, where others look | use another copy",
        lambda: write(NET, b"before" + Path(NET).read_bytes()),
    ),
    Case(
        "a checkpoint that lets torch make much of little",
        load,
        f"{NET} | holds more than tensors and plain values | get it from someone you trust",
        later(checkpoint, more=bytearray(3)),
    ),
    Case(
        "a checkpoint that does not fit the model",
        lambda: load_checkpoint(NET, UNet(features=(8,))),
        f"{NET} | its weights do not fit the network:  | {ANOTHER}",
    ),
    wrong_checkpoint("no dict with a state_dict was found", lambda: torch.save([1, 2], NET)),
    wrong_checkpoint(
        "final_conv.weight were expected, weight found",
        later(checkpoint, state_dict={"weight": torch.ones(1)}),
    ),
    wrong_checkpoint(
        "from 1 or 3 channels to 1 were expected, from 7 to 1 found",
        later(weights, downs__0__conv__0__weight=torch.zeros(4, 7, 3, 3)),
    ),
    wrong_checkpoint(
        "up to 12 levels and 8192 channels were expected, 13 and 8 found",
        later(
            weights,
            **{f"downs__{level}__conv__0__weight": torch.zeros(8, 3, 0, 0) for level in range(13)},
        ),
    ),
    wrong_checkpoint("final_conv.bias is missing", later(weights, without="final_conv.bias")),
    wrong_checkpoint("extra is unexpected", later(weights, extra=torch.zeros(1))),
    wrong_checkpoint(
        "final_conv.bias: a tensor was expected, str found", later(weights, final_conv__bias="1")
    ),
    wrong_checkpoint(
        "final_conv.bias: [1] was expected, [9] found",
        later(weights, final_conv__bias=torch.zeros(9)),
    ),
    wrong_checkpoint(
        "final_conv.bias: torch.float32 was expected, torch.int64 (torch.strided) found",
        later(weights, final_conv__bias=torch.zeros(1, dtype=torch.int64)),
    ),
    wrong_checkpoint(
        "a tensor declares more than the file holds",
        later(weights, bottleneck__conv__0__weight=torch.zeros(1).expand(8, 4, 3, 3)),
    ),
    wrong_checkpoint(
        "its weights declare more than the file holds",
        later(
            weights,
            bottleneck__conv__0__weight=SHARED,
            ups__1__conv__0__weight=SHARED.view(4, 8, 3, 3),
        ),
    ),
    wrong_checkpoint(
        "final_conv.bias: numbers were expected, nan or inf found",
        later(weights, final_conv__bias=torch.tensor([torch.nan])),
    ),
    wrong_checkpoint(
        "image_size: two numbers up to 16384 were expected, 'ab' found",
        later(checkpoint, image_size="ab"),
    ),
    wrong_checkpoint(
        "image_size: at most 16777216 pixels were expected, 268435456 found",
        later(checkpoint, image_size=[16384, 16384]),
    ),
    wrong_checkpoint(
        "threshold: a number between 0 and 1 was expected, 0 found", later(checkpoint, threshold=0)
    ),
    wrong_checkpoint(
        "val_fraction: a number from 0 to 1 was expected, 'half' found",
        later(checkpoint, val_fraction="half"),
    ),
    wrong_checkpoint(
        "normalization: mean, std and max_pixel_value were expected",
        later(checkpoint, normalization={"mean": 0}),
    ),
    # test.py
    wrong_flag("test.py --batch-size 0", "--batch-size", "0 is no whole number from 1 to 65536"),
    Case(
        "photos without masks to score",
        "test.py --image-dir data/train_images",
        "--image-dir and --mask-dir | belong together | name both",
    ),
    Case(
        "a checkpoint that does not say which photos to score",
        "test.py",
        f"{NET} | does not say which photos it was trained on | name --image-dir and --mask-dir",
        later(checkpoint, settings={}),
    ),
    Case(
        "a table that cannot be written",
        f"test.py {FOLDERS} --csv car.jpg/scores.csv",
        "car.jpg | cannot be written | name another --csv",
    ),
    Case(
        "pictures that cannot be written",
        f"test.py {FOLDERS} --output-dir car.jpg",
        "car.jpg | cannot be written | name another --output-dir",
    ),
    # predict.py
    wrong_flag("predict.py", "PHOTO", "arguments are required"),
    wrong_flag("predict.py car.jpg --threshold 1", "--threshold", "1 is no number between 0 and 1"),
    wrong_flag(
        "predict.py car.jpg --background nowhere.jpg",
        "--background",
        "nowhere.jpg: no such file: check the path (and it is no colour)",
    ),
    Case(
        "a photo to predict that is not there",
        "predict.py nowhere.jpg",
        "nowhere.jpg | no such photo or folder | check the path",
    ),
    Case(
        "nothing but bad photos",
        "predict.py car.jpg",
        f"car.jpg | the file is empty | {AGAIN}",
        later(write, "car.jpg"),
        listing=True,
        start="photos that cannot be used (1):",
    ),
    Case(
        "a bad photo among good ones",
        "predict.py car.jpg data/train_images",
        f"car.jpg | the file is empty | {AGAIN}",
        later(write, "car.jpg"),
        listing=True,
        start="photos that cannot be used (1):",
        code=1,
    ),
    Case(
        "a name that leaves no room",
        f"predict.py {'x' * 250}.jpg",
        f"{'x' * 250}.jpg | no name is left for its results | give it a shorter one",
        lambda: os.rename("car.jpg", f"{'x' * 250}.jpg"),
    ),
    Case(
        "photos of one name",
        "predict.py car.jpg more/car.png",
        "car.jpg, more/car.png | photos of one name, which their results would have too"
        " | call for each folder apart, with an --output of its own",
        later(save, "more/car.png", colourful(8, 8, 3)),
        listing=True,
    ),
    Case(
        "results where the photos are",
        "predict.py data/train_images --output data/train_images",
        "data/train_images | holds the photos | name another folder with --output",
    ),
    Case(
        "a folder of predictions that cannot be made",
        "predict.py car.jpg --output car.jpg/out",
        "car.jpg/out | cannot be written | name another --output",
    ),
    Case(
        "pictures beside a submission",
        "predict.py car.jpg --submission s.csv --cutout",
        "--cutout | beside --submission | name a folder with --output",
    ),
    Case(
        "a submission that is no CSV file",
        "predict.py car.jpg --submission s.jpg",
        "s.jpg | no CSV file | name one that ends in .csv with --submission",
    ),
    Case(
        "a submission that cannot be written",
        "predict.py car.jpg --submission car.jpg/s.csv",
        "car.jpg/.s.csv. | cannot be written ( | free some space or choose another --submission",
    ),
    Case(
        "a submission for which there is no room",
        submit_a_large_mask,
        ".s.csv. | cannot be written ( | free some space or choose another --submission",
        limit=SMALL_FILES,
    ),
    Case(
        "a submission that cannot be read",
        submit,
        f"s.csv | cannot be read ( | {ANOTHER}",
        later(write, "s.csv"),
        limit=NO_FILES,
    ),
    Case(
        "a submission that lacks photos",
        submit,
        "s.csv | is there already, without 1 of these photos"
        " | add --overwrite, or name another file",
        later(write, "s.csv", b"img,rle_mask\na.jpg,1 1\n"),
    ),
    Case(
        "a submission that another process makes",
        submit_twice,
        "s.csv | another process is making it | wait for it",
        needs="fcntl",
    ),
    # ONNX
    wrong_flag("export.py --nonsense", "--nonsense", "unrecognized arguments"),
    Case(
        "a network by onnxruntime, which is not installed",
        "predict.py car.jpg --checkpoint net.onnx",
        "net.onnx | needs a package more | pip install onnxruntime",
        hidden="onnxruntime",
    ),
    Case(
        "an ONNX file that is not there",
        "predict.py car.jpg --checkpoint net.onnx",
        "net.onnx | no such file | make one with python export.py",
        needs="onnxruntime",
    ),
    Case(
        "a text called an ONNX file",
        "predict.py car.jpg --checkpoint net.onnx",
        "net.onnx | no file of export.py ( | make it again with python export.py",
        later(write, "net.onnx", b"a text"),
        needs="onnxruntime",
    ),
    Case(
        "an export without the package onnx",
        "export.py car.jpg",
        "export.py | needs a package more | pip install onnx",
        hidden="onnx",
    ),
    Case(
        "an export to a file of another kind",
        "export.py --output net.bin",
        "net.bin | no ONNX file | name one that ends in .onnx with --output",
    ),
    Case(
        "an export to a folder that cannot be made",
        "export.py --output car.jpg/out/net.onnx",
        "car.jpg/out | cannot be written | name another --output",
    ),
    Case(
        "an exported network that answers otherwise",
        lambda: export.check_answers([(np.zeros((4, 4)), np.ones((4, 4)))], 0.5, False),
        "the exported network | answers otherwise: on 1 photos probabilities differ by"
        " | train it anew",
    ),
    # app.py
    wrong_flag("app.py --nonsense", "--nonsense", "unrecognized arguments"),
    Case(
        "the page without its package",
        "app.py",
        "app.py | needs a package more | pip install gradio",
        hidden="gradio",
    ),
    Case(
        "a photo too large for the page",
        lambda: app.answer(Predictor(NET, "cpu"), "car.jpg"),
        "car.jpg | 72x48 is more than 0 megapixels | use predict.py",
        patch={"app.LARGEST": 1000},
    ),
    # bench.py and bench_predict.py
    wrong_flag("bench.py --photos 0", "--photos", "0 is no whole number from 1 to"),
    wrong_flag("bench_predict.py --count 1", "--count", "1 is no whole number from 16 to"),
    Case(
        "fewer photos to measure than a batch has",
        "bench.py --photos 3 --batch-size 4",
        "--photos 3 | less than a batch of 4 | name more",
    ),
    # check_data.py
    wrong_flag("check_data.py data/train_images", "MASKS", "arguments are required"),
    Case(
        "validation photos without masks to check",
        f"check_data.py {PAIRS} --val-img-dir data/train_images",
        "--val-img-dir and --val-mask-dir | belong together | name both",
    ),
    Case(
        "a contact sheet among the photos",
        "check_data.py data/train_images data/train_masks --sheet data/train_images/sheet.png",
        "--sheet data/train_images/sheet.png | is a folder, or among the photos"
        " | name another file",
    ),
    Case(
        "a contact sheet that cannot be written",
        f"check_data.py {PAIRS} --sheet car.jpg/sheet.png",
        "car.jpg | cannot be written | name another --sheet",
    ),
    finding("no mask in data/train_masks", PHOTO, later(remove, MASK)),
    finding(f"72x48, but its mask {MASK}", PHOTO, later(save, MASK, colourful(9, 9))),
    finding("the file is empty", PHOTO, later(write, PHOTO)),
    finding(
        "the only car or photo there is",
        PHOTO,
        lambda: remove(*(path for path in Path("data").glob("*/*") if "00_01" not in path.name)),
    ),
    finding("the mask shows nothing", PHOTO, empty_masks, "save them anew, 0 for the background"),
    # data/prepare.py
    wrong_flag("prepare.py", "command", "arguments are required"),
    wrong_flag("prepare.py carvana", "DIR", "arguments are required"),
    Case(
        "a demo set that exists",
        "prepare.py demo --output-dir data",
        "data | exists already | remove it to draw it again",
    ),
    Case(
        "a folder of zip files that is not there",
        "prepare.py carvana nowhere",
        "nowhere | no such folder | name the one that holds train.zip",
    ),
    Case(
        "a folder without zip files",
        "prepare.py carvana empty",
        "empty | holds neither train.zip nor a folder train | get the files from"
        " kaggle.com/c/carvana-image-masking-challenge/data, or add --download",
    ),
    Case(
        "a zip file that is cut off",
        CARVANA,
        f"challenge/train.zip | cannot be read ( | {DOWNLOAD}",
        later(cut, "challenge/train.zip"),
    ),
    Case(
        "a zip file that unpacks to too much",
        CARVANA,
        f"challenge/train.zip | would unpack  | nothing was unpacked; {DOWNLOAD}",
        patch={"data.prepare.MAX_GROWTH": 0},
    ),
    wrong_member(
        "is a link, encrypted or packed in an odd way",
        later(add_to_zip, link("train/0123456789ab_01.jpg")),
    ),
    wrong_member("is not in train/", later(add_to_zip, "../escaped.jpg")),
    wrong_member("is in it twice", later(add_to_zip, "train/000000000000_01.jpg")),
    Case(
        "a zip file with a member that is too large",
        CARVANA,
        f"challenge/train.zip | bytes | nothing was unpacked; {DOWNLOAD}",
        patch={"data.prepare.MAX_MEMBER_BYTES": 100},
    ),
    Case(
        "a zip file with a name that is not the challenge's",
        CARVANA,
        "challenge/train.zip | 'notes.txt' is no file of the challenge"
        " | nothing was unpacked; remove it, or download the file again",
        later(add_to_zip, "train/notes.txt"),
    ),
    Case(
        "the challenge's photos and masks that do not pair",
        CARVANA,
        f"train_masks/000000000000_01_mask.gif | photos and masks do not pair | {DOWNLOAD}",
        later(unzipped, remove, "challenge/train/000000000000_01.jpg"),
        listing=True,
    ),
    Case(
        "the challenge's photos of one car",
        CARVANA,
        "challenge | 1 cars, and the split needs two | get the whole files",
        later(unzipped, one_car_of_the_challenge),
    ),
    Case(
        "folders that hold photos already",
        "prepare.py carvana challenge --output-dir data",
        "data/train_images | exists already | move it away, or name another --output-dir",
    ),
    Case(
        "the challenge's photo that is cut off",
        CARVANA,
        f"000000000000_01.jpg | cannot be read ( | {DOWNLOAD}",
        later(unzipped, cut, "challenge/train/000000000000_01.jpg"),
        listing=True,
    ),
    Case(
        "the challenge's photo of too many pixels",
        CARVANA,
        f"000000000000_01.jpg | cannot be read (72x48 is too large) | {DOWNLOAD}",
        listing=True,
        patch={"data.prepare.MAX_PIXELS": 1000},
    ),
    Case(
        "the challenge's mask of another size",
        CARVANA,
        f"000000000000_01.jpg | (72, 48), but its mask (9, 9) | {DOWNLOAD}",
        later(unzipped, save, "challenge/train_masks/000000000000_01_mask.gif", colourful(9, 9)),
        listing=True,
    ),
    Case(
        "a folder for the challenge that cannot be made",
        "prepare.py carvana challenge --output-dir car.jpg/data",
        "car.jpg/data | Not a directory | free some space, or name another --output-dir",
    ),
    Case(
        "the kaggle client is not installed",
        "prepare.py carvana empty --download",
        "the kaggle client | is not installed"
        " | pip install kaggle, put your API token into ~/.kaggle/kaggle.json and accept the rules",
        env={"PATH": "empty"},
    ),
    Case(
        "the kaggle client fails",
        "prepare.py carvana empty --download",
        "kaggle competitions download | failed"
        " | is your API token in ~/.kaggle/kaggle.json, and are the rules accepted on",
        kaggle_client_that_fails,
        env={"PATH": "bin"},
    ),
]


# The tests ----------------------------------------------------------------------------------------


def furnish(folder):
    """Fill a folder with what cases find there."""
    write_pairs(folder / "data", cars=3, views=1)
    (folder / "empty").mkdir()
    (folder / "challenge").mkdir()
    for name, source in (("train", "train_images"), ("train_masks", "train_masks")):
        shutil.copytree(folder / "data" / source, folder / "challenge" / name)
        with zipfile.ZipFile(folder / "challenge" / f"{name}.zip", "w") as archive:
            for path in sorted((folder / "challenge" / name).iterdir()):
                archive.write(path, f"{name}/{path.name}")
    shutil.copy(folder / PHOTO, folder / "car.jpg")
    save_bright_network(folder / NET)
    own = "--data-dir", str(folder / "data"), "--output-dir", str(folder / "run")
    assert train.main([*own, *SMALL, "--epochs", "1"]) == 0
    shutil.rmtree(folder / "data" / ".cache")


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("messages") / "furnished"
    furnish(folder)
    return folder


@pytest.fixture
def place(furnished, tmp_path, monkeypatch):
    """A case's own folder, which is the working directory."""
    shutil.copytree(furnished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")


class Seen:
    """What the cases have met so far: their titles, lines of the sources, what was printed."""

    titles, lines, texts = set(), set(), []


@pytest.fixture
def noted(monkeypatch):
    """Note from where each BadInput is made."""

    def note(self, *args):
        Exception.__init__(self, *args)
        frame = sys._getframe(1)
        while frame:
            Seen.lines.add((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back

    monkeypatch.setattr(files.BadInput, "__init__", note)


@contextlib.contextmanager
def limited(name, most):
    """Hold this process to a limit of the system's."""
    resource = pytest.importorskip("resource", reason="the system has no such limits")
    kind = getattr(resource, name)
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_a_message_says_what_is_wrong_where_and_what_to_do(case, place, noted, monkeypatch, call):
    if case.needs:
        pytest.importorskip(case.needs)
    Seen.titles.add(case.title)
    for name, value in case.patch.items():
        monkeypatch.setattr(name, value)
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    if case.hidden:
        monkeypatch.setitem(sys.modules, case.hidden, None)
    if case.before:
        case.before()
    script, flags, main = "", [], lambda argv: case.run()
    if isinstance(case.run, str):
        script, *flags = shlex.split(case.run)
        main, usual = SCRIPTS[script]
        flags = [*usual.split(), *flags]
    with limited(*case.limit) if case.limit else contextlib.nullcontext():
        code, out, err = call(main, *flags)

    text = out if case.stdout else err
    Seen.texts.append(text)
    assert code == case.code and "Traceback" not in err, err
    parts = dict(zip(("where", "what", "do"), case.parts.split(" | "), strict=True))
    assert all(parts.values()), "a case names all three parts"
    for name, part in parts.items():
        assert part in text, f"{name}: {part!r} is not in {text!r}"
    assert text.index(parts["what"]) < text.rindex(parts["do"])
    if not case.stdout:
        starts = (
            (case.start,) if case.start else ("error: ", f"{script or 'error'}: ", f"{script} ")
        )
        assert text.startswith(starts), text
        _, *lines = text.splitlines()
        assert bool(lines) == case.listing and all(line.startswith("  ") for line in lines), text


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_script_that_is_stopped_says_so(call, number, code):
    assert call(lambda argv: signal.raise_signal(number)) == (code, "", "stopped\n")


def test_preparing_data_that_is_stopped_says_how_to_go_on(call, place, monkeypatch):
    monkeypatch.setattr("zipfile.ZipFile", lambda path: signal.raise_signal(signal.SIGINT))
    code, _, err = call(prepare.main, "carvana", "challenge", "--output-dir", "new")
    assert (code, err) == (130, "the same command goes on from here\nstopped\n")


# Are these all? -----------------------------------------------------------------------------------

MAKERS = {"BadInput", "listing", "no_mask", "unwritable"}  # calls of these make a BadInput
REASONS = {"unlike_a_unet", "wrong_tensor", "out_of_bounds", "message_of"}  # return parts of one
NOT_MET = {  # (file, function): why no case meets its messages
    ("submission.py", "decode"): "raised to callers in Python; no script decodes",
    ("hubconf.py", "unet_carvana"): "raised to callers in Python; torch.hub is no script",
}


class Site(NamedTuple):
    """A place in the sources where a message is made; `pattern` is "" where its lines are noted."""

    file: str
    function: str
    first: int
    last: int
    pattern: str = ""

    def __str__(self):
        return f"{self.file}:{self.first} in {self.function}: {self.pattern}"


def find_sites(path):
    """All Sites of a file of Python."""
    name, sites = path.relative_to(ROOT).as_posix(), []

    def add(node, function, *texts):
        for pattern in texts:
            sites.append(Site(name, function, node.lineno, node.end_lineno, pattern))

    def visit(node, function):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = node.name
        if isinstance(node, ast.Call) and name_of(node.func) in MAKERS:
            add(node, function, "")
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if name_of(node.exc.func) not in MAKERS:
                add(node, function, *patterns(node.exc.args))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "problems.append":
            add(node, function, *patterns(node.args))
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
            if name_of(target) in ("problem", "problems"):
                add(node, function, *patterns([node.value]))
        elif isinstance(node, ast.Return) and function in REASONS and node.value:
            add(node, function, *patterns([node.value]))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text()), "the module")
    return sites


def name_of(node):
    """The last part of a dotted name."""
    return getattr(node, "attr", getattr(node, "id", ""))


def patterns(nodes):
    """Regular expressions of the texts within these nodes, whatever is put into their braces."""
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = (
                re.escape(getattr(part, "value", "")) if isinstance(part, ast.Constant) else ".*"
                for part in node.values
            )
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and len(str(node.value).split()) > 2:
            yield ".*".join(map(re.escape, re.split(r"{\w+}", node.value)))
        else:
            yield from patterns(ast.iter_child_nodes(node))


def test_no_message_was_forgotten():
    missing = {case.title for case in CASES} - Seen.titles
    if missing:
        pytest.skip(f"{len(missing)} of the {len(CASES)} cases did not run")
    sites = [s for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py")) for s in find_sites(path)]
    printed = "".join(Seen.texts)

    def met(site):
        if site.pattern:
            return re.search(site.pattern, printed)
        lines = range(site.first, site.last + 1)
        return any((str(ROOT / site.file), line) in Seen.lines for line in lines)

    assert len(sites) > 100, "or find_sites finds nothing"
    unmet = [site for site in sites if not met(site)]
    forgotten = [str(site) for site in unmet if (site.file, site.function) not in NOT_MET]
    assert not forgotten, "no case of CASES meets:\n" + "\n".join(forgotten)
    assert {(site.file, site.function) for site in unmet} == set(NOT_MET), "one of NOT_MET is met"
