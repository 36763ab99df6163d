"""Photos a second: this repository beside the classic recipe, on the same photos in one run.

    python bench.py                                 drawn photos of 1918x1280, as many as Carvana's
    python bench.py --data-dir DIR --photos 128     those in DIR/train_images and DIR/train_masks
    python bench.py --device cuda --features 16 32 64 128 --batch-size 64

The classic recipe decodes each photo at full size each epoch and trains in float32, in the default
memory layout, looking at the loss after each step. Each way has a process of its own and the two
take turns; the table shows medians, bench.json beside this file the same and all the single times.
"""

import contextlib
import itertools
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import cv2
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import settings as train_settings
import train
from classic import Classic, exhaust
from command_line import Parser, run_script, whole
from data.draw_demo import draw_car
from dataset import (
    CarvanaDataset,
    EpochSampler,
    build_cache,
    get_eval_transform,
    get_train_transform,
    make_loader,
)
from files import BadInput, Pair, cpu_count, find_pairs, write_aside
from model import UNet
from run import Run
from utils import amp_dtype, pick_device, score_loader

ROOT = Path(__file__).resolve().parent
SECONDS, REPEATS = 4, 3  # a measurement goes on for so long (at least a batch), so often
ROWS = {
    "first pass": "data path, first pass, all cores",
    "later epochs": "data path, later epochs, one core",
    "step": "training step on a constant batch",
    "train": "training end to end, later epochs",
    "evaluate": "evaluation end to end",
}


# This repository's way; classic.py has the other, with the same methods ---------------------------


class Ours:
    """What train.py does, by its own functions."""

    def __init__(self, settings, pairs, device):
        self.settings, self.pairs, self.device = settings, pairs, device
        self.run = Run(settings, device)
        self.size = settings.image_height, settings.image_width
        self.cache = build_cache(pairs, self.size, 3, "kept", settings.cache_dir)

    def loader(self, count, workers, transform):
        pairs = self.pairs[:count]
        dataset = CarvanaDataset(None, None, transform, self.size, pairs=pairs, cache=self.cache)
        sampler = EpochSampler(count, self.settings.seed)
        return make_loader(dataset, self.settings.batch_size, workers, True, sampler)

    def first_pass(self, count):
        with tempfile.TemporaryDirectory(dir=self.settings.cache_dir) as folder:
            build_cache(self.pairs[:count], self.size, 3, "made", folder)

    def train(self, loader):
        self.run.part = None  # each call is an epoch of its own
        train.train_one_epoch(self.run, loader, self.device)

    def evaluate(self, loader):
        score_loader(loader, self.run.model, self.device)


# In the process of each way -----------------------------------------------------------------------

way = work = None
threads = torch.get_num_threads()


class OneBatch:
    """A loader that gives one batch so many times."""

    def __init__(self, batch, times):
        self.batch, self.times, self.batch_size = batch, times, len(batch[0])
        self.dataset = range(times * self.batch_size)
        self.sampler = EpochSampler(len(self.dataset), seed=0)

    def __len__(self):
        return self.times

    def __iter__(self):
        return itertools.repeat(self.batch, self.times)


def start(kind, *args):
    global way
    multiprocessing.set_start_method(None, force=True)  # for workers, as in a process of its own
    way = kind(*args)


def get_ready(measure, count, workers):
    """Make all that is needed to measure `count` photos."""
    global work
    if measure == "first pass":
        work = lambda: way.first_pass(count)  # noqa: E731
        return
    one_core = measure == "later epochs"
    torch.set_num_threads(1 if one_core else threads)
    cv2.setNumThreads(1 if one_core else threads)
    make_transform = get_eval_transform if measure == "evaluate" else get_train_transform
    transform = make_transform(way.settings.image_height, way.settings.image_width)
    if measure == "step":
        size = way.settings.batch_size
        batch = [part.to(way.device) for part in next(iter(way.loader(size, 0, transform)))]
        loader = OneBatch(batch, count // size)
    else:
        loader = way.loader(count, 0 if one_core else workers, transform)
    method = {"step": way.train, "train": way.train, "evaluate": way.evaluate}.get(measure, exhaust)
    work = lambda: method(loader)  # noqa: E731


def seconds_of_work():
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matmul_rate():
    """FLOP/s of a large product of matrices in the precision that training computes in."""
    size = 8192 if way.device.type == "cuda" else 3072
    matrix = torch.randn(size, size, device=way.device, dtype=amp_dtype(way.device))
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def peak_memory():
    """GiB of main memory, and of the device's, that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    cuda = way.device.type == "cuda"
    return {"host": host, "device": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}


# In the script's own process ----------------------------------------------------------------------


def compare(measure, ways, photos, batch_size, workers):
    """{way: photos/s, one a repeat}; the ways take turns."""
    counts, rates = {}, {name: [] for name in ways}
    for name, process in ways.items():
        counts[name] = batch_size
        process.submit(get_ready, measure, batch_size, workers).result()
        seconds = process.submit(seconds_of_work).result()
        if seconds < SECONDS:
            seconds = process.submit(seconds_of_work).result()  # the very first time tells little
            batches = min(photos, int(SECONDS / seconds * batch_size)) // batch_size
            counts[name] = max(1, batches) * batch_size
            process.submit(get_ready, measure, counts[name], workers).result()
            process.submit(seconds_of_work).result()
    for _ in range(REPEATS):
        for name, process in ways.items():
            rates[name].append(counts[name] / process.submit(seconds_of_work).result())
    return rates


def scaling(ours, photos):
    """The time that a photo takes in an epoch without the network: of all over a tenth of them."""
    ratios = []
    for _ in range(REPEATS):
        seconds = []
        for count in (max(1, photos // 10), photos):
            ours.submit(get_ready, "later epochs", count, 0).result()
            seconds.append(ours.submit(seconds_of_work).result() / count)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def step_memory(process, batch_size):
    """What peak_memory gives after two steps; in a process that has done nothing else."""
    process.submit(get_ready, "step", 2 * batch_size, 0).result()
    process.submit(seconds_of_work).result()
    return process.submit(peak_memory).result()


def flops_a_photo(settings):
    """Floating-point operations of a forward and a backward pass, counted by torch."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = UNet(features=settings.features)
        model(torch.empty(1, 3, settings.image_height, settings.image_width)).sum().backward()
    return counter.get_total_flops()


def draw_photos(folder):
    """Draw 64 pairs of the challenge's size and formats; returns the folder of the photos."""
    print("drawing photos of 1918x1280 ...", flush=True)
    for car in range(4):
        draw_car((car, folder))
    for path in folder.glob("*/*"):
        with Image.open(path) as image:
            image.resize((1918, 1280)).save(path, quality=88)
    return folder / "train_images"


def find_photos(data_dir, count, folder):
    """`count` pairs: those in data_dir, or drawn ones of the challenge's size and formats.

    Where there are fewer, they come again under other names, in `folder`.
    """
    if data_dir is None:
        draw_photos(folder)
        data_dir = folder
    pairs = find_pairs(data_dir / "train_images", data_dir / "train_masks")
    for number in range(len(pairs), count):
        pair = pairs[number % len(pairs)]
        links = [folder / f"{number}_{Path(path).name}" for path in (pair.photo, pair.mask)]
        links[0].symlink_to(Path(pair.photo).resolve())
        links[1].symlink_to(Path(pair.mask).resolve())
        pairs.append(Pair(links[0].stem, str(links[0]), str(links[1])))
    return pairs[:count]


def describe_machine(device):
    """The device by name, with the versions that matter."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(": ")[1] if models else name
    precision = str(amp_dtype(device) or torch.float32).removeprefix("torch.")
    return f"{name}, {cpu_count()} CPU cores, {precision}, PyTorch {torch.__version__}"


def get_args_parser():
    defaults = train_settings.get_args_parser(vars(train)).parse_args([])
    parser = Parser(prog="bench.py", description=__doc__.splitlines()[0])
    size = {"type": whole(1, 16384), "metavar": "N"}

    def flag(name, help, **kwargs):
        default = getattr(defaults, name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        help += f" (default: {shown})"
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=help, **kwargs)

    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="photos; without, drawn ones")
    parser.add_argument(
        "--photos",
        type=whole(1, 10**6),
        default=5088,
        metavar="N",
        help="how many; where there are fewer they come again (default: 5088, as Carvana has)",
    )
    flag("device", "cuda, mps or cpu")
    flag("features", "channels of each level", nargs="+", **size)
    flag("image_height", "of the photos that the network sees", **size)
    flag("image_width", "likewise", **size)
    flag("batch_size", "photos a step", **size)
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(
        argv, train_settings.get_args_parser(vars(train)).parse_args([])
    )
    device = pick_device(args.device)
    train.check_size(args)
    if args.photos < args.batch_size:
        raise BadInput(f"--photos {args.photos}: less than a batch of {args.batch_size}: name more")
    workers = train.pick_workers(args, device)
    machine = describe_machine(device)
    print(f"{machine}, {workers} workers", flush=True)
    rates, memory = {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        args.cache_dir = folder
        pairs = find_photos(args.data_dir, args.photos, Path(folder))
        print_row("photos/s", "ours", "classic", "ratio")

        def new_process(kind):
            process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            process.submit(start, kind, args, pairs, device).result()
            return process

        kinds = {"ours": Ours, "classic": Classic}
        ways = {name: stack.enter_context(new_process(kind)) for name, kind in kinds.items()}
        for measure, title in ROWS.items():
            rates[measure] = compare(measure, ways, args.photos, args.batch_size, workers)
            print_row(title, *map(statistics.median, rates[measure].values()))
        matmul = ways["ours"].submit(matmul_rate).result()
        against_a_tenth = scaling(ways["ours"], args.photos)
        for name, kind in kinds.items():
            with new_process(kind) as process:
                memory[name] = step_memory(process, args.batch_size)

    flops = flops_a_photo(args)
    step, end = ({k: statistics.median(v) for k, v in rates[m].items()} for m in ("step", "train"))
    print_row("end to end of the bare step, %", *(100 * end[way] / step[way] for way in step))
    print_row("time a photo, all over a tenth of them", against_a_tenth)
    print_row("step, GFLOP/s", *(flops * step[way] / 1e9 for way in step))
    print_row("step of the matmul rate, %", *(100 * flops * step[way] / matmul for way in step))
    for kind in ("host", "device"):
        if memory["ours"][kind] is not None:
            print_row(f"step, peak GiB of the {kind}", *(memory[way][kind] for way in step))
    results = {
        "machine": machine,
        "workers": workers,
        "settings": {
            name: getattr(args, name)
            for name in ("photos", "features", "image_height", "image_width", "batch_size")
        },
        "photos_per_second": rates,
        "seconds_a_photo_of_all_over_a_tenth": against_a_tenth,
        "flops_a_photo": flops,
        "matmul_flops_per_second": matmul,
        "step_peak_gib": memory,
    }
    with write_aside(ROOT / "bench.json") as file:
        file.write(json.dumps(results, indent=1).encode())
    return 0


def print_row(title, ours, classic="", ratio=""):
    if isinstance(classic, float):
        ratio = ours / classic
    cells = (f"{cell:.4g}" if isinstance(cell, float) else cell for cell in (ours, classic, ratio))
    print(f"{title:<40}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


if __name__ == "__main__":
    run_script(main)
