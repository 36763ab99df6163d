"""Photos a second: this repository beside the classic recipe, on the same photos in one run.

    python tools/bench.py --data-dir DIR --photos 128 --features 16 32 64 128

The classic recipe decodes each photo at full size each epoch and trains in float32, in the default
memory layout, looking at the loss after each step. The two take turns; the table shows medians.
"""

import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor as Process
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import dataset  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from model import UNet  # noqa: E402
from support.cache import Cache  # noqa: E402
from support.command_line import run_script, whole  # noqa: E402
from support.pairs import cpu_count, find_pairs  # noqa: E402
from support.settings import get_args_parser, read_flags  # noqa: E402
from support.signals import StopRequest  # noqa: E402

SECONDS, REPEATS = 4, 3  # of a measurement, unless it is of one pass over all photos
ROWS = {
    "step": "training step on a constant batch",
    "train": "training end to end, later epochs",
    "evaluate": "evaluation end to end",
    "predict": "prediction end to end, shipped weights",
    "first pass": "data path, first pass, all cores",
    "later epochs": "data path, later epochs, one core",
}
exhaust = deque(maxlen=0).extend  # goes through batches and keeps none


class Timed:
    """Batches of a loader, epoch after epoch, for so many seconds; `count` photos were in them."""

    dataset, sampler, count = range(10**9), dataset.EpochSampler(1, 0), 0

    def __init__(self, loader, seconds):
        self.loader, self.seconds = loader, seconds

    def __len__(self):
        return len(self.dataset)  # an epoch without end

    def __iter__(self):
        self.count, end = 0, time.perf_counter() + self.seconds
        while True:
            for batch in self.loader:
                yield batch
                self.count += len(batch[0])
                if time.perf_counter() > end:
                    return


def ours(settings, transform, size, device, pairs, folder):
    """(data set, {row: what is done with its batches}) as train.py, test.py and predict.py do."""
    decoded = Cache(pairs, size, 3, folder, folder)
    decoded.build()
    photos = dataset.CarvanaDataset(None, None, transform, size, pairs=pairs, cache=decoded)
    run, predictor = train.Run(settings, device, folder), predict.Predictor(utils.SHIPPED, device)
    files = [pair.photo for pair in pairs]
    write = partial(predict.draw, paths={"mask": folder / "mask.png"}, threshold=0.5)

    def first_pass(_):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            Cache(pairs, size, 3, folder, place).build()

    def fit(loader):
        run.progress = train.Progress(len(loader.dataset))
        train.train_one_epoch(run, loader, StopRequest())

    return photos, {
        "train": fit,
        "evaluate": lambda loader: utils.score_loader(loader, run.model, device),
        "predict": lambda _: exhaust(predict.predict_all(predictor, files, 16, write, [])),
        "first pass": first_pass,
    }


class ClassicDataset(dataset.CarvanaDataset):
    """The data set of the tutorials: each photo is decoded at full size each time."""

    def __getitem__(self, key):
        pair = self.pairs[key[1]]
        image = np.array(Image.open(pair.photo).convert("RGB"))
        mask = np.array(Image.open(pair.mask).convert("L"), dtype=np.float32)
        mask[mask == 255.0] = 1.0
        result = self.transform(image=image, mask=mask)
        return result["image"], result["mask"].unsqueeze(0)


def classic(settings, transform, size, device, pairs, folder):
    """The same as the tutorials do."""
    model = UNet(features=settings.features).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)

    def fit(loader):
        for images, masks in loader:
            images, masks = images.to(device), masks.to(device)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    @torch.no_grad()
    def evaluate(loader):
        correct = 0
        model.eval()
        for images, masks in loader:
            predicted = torch.sigmoid(model(images.to(device))) > 0.5
            correct += (predicted == masks.to(device)).sum()
        correct.item()

    return ClassicDataset(None, None, transform, pairs=pairs), {"train": fit, "evaluate": evaluate}


@lru_cache(1)  # for all measurements of a row, so that workers live on
def get_ready(way, row, seconds, settings, pairs, folder):
    """(what is done for a row of the table, its batches)"""
    device, size = utils.pick_device(settings.device), (settings.image_height, settings.image_width)
    kind = dataset.get_eval_transform if row == "evaluate" else dataset.get_train_transform
    photos, works = way(settings, kind(*size), size, device, pairs, folder)
    workers = min(8, cpu_count()) if device.type == "cuda" and row != "later epochs" else 0
    torch.set_num_threads(1 if row == "later epochs" else torch.get_num_threads())
    cv2.setNumThreads(torch.get_num_threads())
    sampler = dataset.EpochSampler(len(pairs), 0)
    loader = dataset.make_loader(photos, settings.batch_size, workers, True, sampler)
    if row == "step":
        loader = [[part.to(device) for part in next(iter(loader))]]
    return works.get("train" if row == "step" else row, exhaust), Timed(loader, seconds)


def rate(way, row, seconds, settings, pairs, folder):
    """Photos a second; called in the process of `way`."""
    work, loader = get_ready(way, row, seconds, settings, pairs, folder)
    start = time.perf_counter()
    work(loader)
    return (loader.count or len(pairs)) / (time.perf_counter() - start)


def main(argv=None):
    """Measure as the flags in argv say; returns the exit code."""
    parser = get_args_parser(train.Settings, "bench.py")
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--photos", type=whole(1, 10**6), metavar="N", help="the first so many")
    given = read_flags(parser, sys.argv[1:] if argv is None else argv)
    given = train.RECIPES[given.get("recipe", train.RECIPE)] | given
    count, settings = given.pop("photos", None), train.Settings(**given | {"save_every": 0})
    pairs = find_pairs(train.ROOT / settings.train_img_dir, train.ROOT / settings.train_mask_dir)
    print(f"{'photos a second':40}{'ours':>10}{'classic':>10}{'ratio':>10}")
    process = partial(Process, 1, mp_context=get_context("spawn"))  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder, process() as one, process() as two:
        args = SECONDS, settings, tuple(pairs[:count]), Path(folder)
        for row, title in ROWS.items():
            ways = {ours: one, classic: two} if row != "predict" else {ours: one}
            turns = [ways.items()] * (REPEATS + 1)  # the first warms up
            rates = [[p.submit(rate, w, row, *args).result() for w, p in turn] for turn in turns]
            numbers = [median(some) for some in zip(*rates[1:], strict=True)]
            numbers += [numbers[0] / number for number in numbers[1:]]
            print(f"{title:40}" + "".join(f"{number:10.4g}" for number in numbers), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
