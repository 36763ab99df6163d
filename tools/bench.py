"""Photos a second: this repository beside the classic recipe, on the same photos in one run.

    python tools/bench.py --data-dir DIR --photos 128 --features 16 32 64 128
    python tools/bench.py --data-dir DIR --beside    while other programs compute, on a CPU
    python tools/bench.py --data-dir DIR --profile   what takes the time

The classic recipe decodes each photo at full size each epoch and trains in float32, in the default
memory layout, looking at the loss after each step. With --beside it is ours as it is, and ours
whose threads spin and share no cores (see support/cpu.py). The two take turns; the table shows
medians.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor as Process
from functools import lru_cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import dataset  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from model import UNet  # noqa: E402
from support.cache import Cache  # noqa: E402
from support.command_line import run_script, whole_number  # noqa: E402
from support.cpu import INTERVAL  # noqa: E402
from support.loading import DeviceLoader, copy_to  # noqa: E402
from support.pairs import cpu_count, find_pairs  # noqa: E402
from support.settings import get_args_parser, read_flags  # noqa: E402
from support.signals import StopRequest  # noqa: E402

SECONDS, REPEATS = 4, 3  # of a measurement, unless it is of one pass over all photos
ROWS = {
    "step": "training step on a constant batch",
    "compiled": "the same, by torch.compile",
    "train": "training end to end, later epochs",
    "evaluate": "evaluation end to end",
    "predict": "prediction end to end, shipped weights",
    "first pass": "data path, first pass, all cores",
    "later epochs": "data path, later epochs, one core",
}
BESIDE = ("step", "evaluate", "predict")
COMPANY = ("alone", "beside busy threads", "beside another alike")  # threads: of half the cores
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

    def fit_compiled(loader):
        if run.trained_model is run.model:
            run.trained_model = torch.compile(run.model)
        fit(loader)

    return photos, {
        "train": fit,
        "compiled": fit_compiled,
        "evaluate": lambda loader: utils.score_loader(loader, run.model, device),
        "predict": lambda _: exhaust(predict.predict_all(predictor, files, 4, write, [])),
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
    kind = partial(dataset.get_train_transform, augment=settings.augment)
    kind = dataset.get_eval_transform if row == "evaluate" else kind
    photos, works = way(settings, kind(*size), size, device, pairs, folder)
    workers = min(8, cpu_count()) if device.type == "cuda" and row != "later epochs" else 0
    if row == "later epochs":  # the last one that this process is for
        torch.set_num_threads(1)
    cv2.setNumThreads(torch.get_num_threads())
    sampler = dataset.EpochSampler(len(pairs), 0)
    loader = dataset.make_loader(photos, settings.batch_size, workers, True, sampler)
    flip = settings.augment == "flip" and way is ours and row in ("train", "evaluate")
    for pixels in copy_to(device, photos.cache).values() if flip else ():
        mirror = dataset.A.Compose(dataset.AUGMENTATIONS["flip"]) if row == "train" else None
        loader = DeviceLoader(photos, settings.batch_size, sampler, pixels, mirror)
    if row in ("step", "compiled"):
        loader = [[part.to(device) for part in next(iter(loader))]]
    return works.get("train" if row == "step" else row, exhaust), Timed(loader, seconds)


def rate(way, row, seconds, settings, pairs, folder):
    """Photos a second; called in the process of `way`."""
    work, loader = get_ready(way, row, seconds, settings, pairs, folder)
    start = time.perf_counter()
    work(loader)
    return (loader.count or len(pairs)) / (time.perf_counter() - start)


def rate_in(process, *args):
    """rate(*args), in a process."""
    return process.submit(rate, *args).result()


def spin():
    """Keep tune_for_cpu from sharing cores; too late for OpenMP, which has read it already."""
    os.environ["OMP_WAIT_POLICY"] = "active"


def rate_beside(company, process, partner, *args):
    """Photos a second of ours in one process, while another one computes, or none."""
    time.sleep(3 * INTERVAL)  # until it is known that the last one has ended
    busy = [sys.executable, "-c", "while True: pass"]
    count = cpu_count() // 2 if company == "beside busy threads" else 0
    others = [subprocess.Popen(busy) for _ in range(count)]
    alike = partner.submit(rate, ours, *args) if company == "beside another alike" else None
    try:
        return rate_in(process, ours, *args)
    finally:
        for other in others:
            other.kill()
            other.wait()
        if alike:
            alike.result()


def matrix_rate(device, seconds):
    """Operations a second of products of large matrices, in the type that networks compute in."""
    matrix = torch.ones(4096, 4096, device=device, dtype=utils.amp_dtype(device))

    def time_of(count):
        start = time.perf_counter()
        for _ in range(count):
            product = matrix @ matrix
        product[0, 0].item()  # waits for a GPU
        return time.perf_counter() - start

    time_of(1)  # warms up
    count = max(1, round(2 * seconds / time_of(2)))
    return 2 * 4096**3 * count / time_of(count)


def print_profile(row, seconds, settings, pairs, folder):
    """How much a row of ours computes beside products of matrices, and what takes its time."""
    device, args = utils.pick_device(settings.device), (seconds, settings, pairs, folder)
    work, loader = get_ready(ours, row, *args)
    work(loader)
    loader.seconds = 0  # one batch
    with FlopCounterMode(display=False) as counter:
        work(loader)
    operations = counter.get_total_flops() / (loader.count or len(pairs))
    loader.seconds = seconds
    computed, most = operations * rate(ours, row, *args), matrix_rate(device, seconds)
    share = f"{computed / 1e9:.4g} GFLOP/s, {computed / most:.2f} of what products of matrices have"
    print(f"{ROWS[row]}: {operations / 1e9:.4g} GFLOP a photo, {share}")
    loader.seconds = 0
    with torch.profiler.profile() as profiler:
        work(loader)
    where = "cpu" if device.type == "cpu" else "device"
    print(profiler.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=12))


def print_row(title, *jobs):
    """A line of the table: the median of what each job gives, and the ratio of the first to it."""
    rates = [[job() for job in jobs] for _ in range(REPEATS + 1)]  # the first turn warms up
    numbers = [median(some) for some in zip(*rates[1:], strict=True)]
    numbers += [numbers[0] / number for number in numbers[1:]]
    print(f"{title:60}" + "".join(f"{number:10.4g}" for number in numbers), flush=True)


def main(argv=None):
    """Measure as the flags in argv say; returns the exit code."""
    parser = get_args_parser(train.Settings, "bench.py")
    parser.description = __doc__.splitlines()[0]
    parser.add_argument(
        "--photos", type=whole_number(1, 10**6), metavar="N", help="the first so many"
    )
    parser.add_argument("--beside", action="store_true", help="other programs' work, on a CPU")
    parser.add_argument("--profile", action="store_true", help="what takes the time")
    given = read_flags(parser, sys.argv[1:] if argv is None else argv)
    given = train.RECIPES[given.get("recipe", train.RECIPE)] | given
    count, beside = given.pop("photos", None), given.pop("beside", False)
    profiled = given.pop("profile", False)
    if beside:
        given["device"] = "cpu"
    settings = train.Settings(**given | {"save_every": 0})
    pairs = find_pairs(train.ROOT / settings.train_img_dir, train.ROOT / settings.train_mask_dir)
    pairs = tuple(pairs[:count])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args = SECONDS, settings, pairs, folder
        if profiled:
            for row in ("step", "predict"):
                print_profile(row, *args)
            return 0

        def process(initializer=None):
            """One that is started anew: threads do not survive a fork."""
            context = get_context("spawn")
            return stack.enter_context(Process(1, context, initializer))

        titles = ("ours", "spinning" if beside else "classic", "ratio")
        print(f"{'photos a second':60}" + "".join(f"{title:>10}" for title in titles))
        if beside:
            args = 2 * SECONDS, settings, pairs[:16], folder
            both = [(process(setup), process(setup)) for setup in (None, spin)]
            for row, company in product(BESIDE, COMPANY):
                jobs = [partial(rate_beside, company, *pair, row, *args) for pair in both]
                print_row(f"{ROWS[row].partition(',')[0]}, {company}", *jobs)
            return 0
        ways = {ours: process(), classic: process()}
        for row, title in ROWS.items():
            if row == "compiled" and utils.pick_device(settings.device, tune=False).type == "cpu":
                continue  # where it takes a minute and brings nothing
            some = [ours] if row in ("compiled", "predict") else ways
            print_row(title, *(partial(rate_in, ways[way], way, row, *args) for way in some))
    return 0


if __name__ == "__main__":
    run_script(main)
