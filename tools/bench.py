"""Photos per second and peak memory: this repository beside the classic recipe, in one run.

    python tools/bench.py --data-dir DIR --photos 128 --features 16 32 64 128
    python tools/bench.py --data-dir DIR --device cuda

The classic recipe decodes each photo at full size each epoch and trains in float32, in the default
memory layout, looking at the loss after each step. Each of the two has a process of its own; they
take turns, and the table shows medians.
"""

import contextlib
import io
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script
import support.startup  # noqa: E402, F401

# isort: split

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import predict  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from dataset import (
    CarvanaDataset,
    EpochSampler,
    get_eval_transform,
    get_train_transform,
)  # noqa: E402  # noqa: E402
from model import UNet  # noqa: E402
from support.cache import Cache  # noqa: E402
from support.command_line import Parser, arguments, run_script, whole_number  # noqa: E402
from support.flags import check  # noqa: E402
from support.loading import default_workers, make_loader  # noqa: E402
from support.pairs import find_pairs  # noqa: E402
from support.run import EpochProgress  # noqa: E402
from support.settings import read_flags  # noqa: E402
from support.signals import StopRequest  # noqa: E402

TURNS = 3  # measured, after one that warms up


class Ours:
    """What this repository does. Each method goes once through all photos."""

    def __init__(self, settings, pairs, folder):
        self.settings = settings
        self.pairs = pairs
        self.folder = folder
        self.device = utils.pick_device(settings.device)
        self.augmented = get_train_transform(*settings.size, augment=settings.augment)
        self.plain = get_eval_transform(*settings.size)
        self.run = train.make_run(settings, self.device)

    def dataset(self, transform):
        cache = Cache(self.pairs, self.settings.size, 3, self.folder, self.folder)
        cache.build()
        size = self.settings.size
        return CarvanaDataset(None, None, transform, size, pairs=self.pairs, cache=cache)

    def loader(self, transform):
        n_workers = default_workers(self.device)
        order = EpochSampler(len(self.pairs), seed=0)
        photos = self.dataset(transform)
        return make_loader(photos, self.settings.batch_size, n_workers, True, order)

    def train(self):
        self.run.progress = EpochProgress(len(self.pairs))
        train.train_one_epoch(self.run, self.loader(self.augmented), StopRequest())

    def evaluate(self):
        utils.score_loader(self.loader(self.plain), self.run.model, self.device)

    def predict(self):
        photos = [pair.photo for pair in self.pairs]
        flags = ["--checkpoint", utils.SHIPPED, "--output", self.folder / "masks", "--overwrite"]
        with contextlib.redirect_stdout(io.StringIO()):
            predict.main([*photos, *flags, "--device", self.settings.device])


class ClassicDataset(CarvanaDataset):
    """The data set of the tutorials: each photo is decoded at full size each time."""

    def __getitem__(self, key):
        pair = self.pairs[key[1]]
        image = np.array(Image.open(pair.photo).convert("RGB"))
        mask = np.array(Image.open(pair.mask).convert("L"), dtype=np.float32)
        mask[mask == 255.0] = 1.0
        result = self.transform(image=image, mask=mask)
        return result["image"], result["mask"].unsqueeze(0)


class Classic(Ours):
    """What the tutorials do."""

    def __init__(self, settings, pairs, folder):
        super().__init__(settings, pairs, folder)
        self.model = UNet(features=settings.features).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)

    def dataset(self, transform):
        return ClassicDataset(None, None, transform, pairs=self.pairs)

    def train(self):
        self.model.train()
        for images, masks in self.loader(self.augmented):
            images, masks = images.to(self.device), masks.to(self.device)
            logits = self.model(images)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()

    @torch.no_grad()
    def evaluate(self):
        self.model.eval()
        correct = 0
        for images, masks in self.loader(self.plain):
            predicted = torch.sigmoid(self.model(images.to(self.device))) > 0.5
            correct += (predicted == masks.to(self.device)).sum().item()


ROWS = {  # {method: title}
    "train": "training",
    "evaluate": "evaluation",
    "predict": "prediction to files, pretrained weights",
}


def get_ready(kind, *args):
    """Start a process of its own for one of the two ways."""
    global way
    way = kind(*args)


def measure(row):
    """(photos a second, peak memory in GiB) of a row's work, in a process that is ready."""
    started = time.perf_counter()
    getattr(way, row)()
    if way.device.type == "cuda":
        torch.cuda.synchronize()
    return len(way.pairs) / (time.perf_counter() - started), peak_memory(way.device)


def peak_memory(device):
    """The most memory that this process has used so far, on a GPU if it uses one, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def print_row(row, processes):
    """Measure a row in each of the processes in turn, and print a line of the table."""
    turns = [[p.submit(measure, row).result() for p in processes] for _ in range(TURNS + 1)]
    line = f"{ROWS[row]:42}"
    medians = []
    for results in zip(*turns[1:], strict=True):  # without the turn that warms up
        medians.append(median(rate for rate, _ in results))
        line += f"{medians[-1]:12.4g}{max(peak for _, peak in results):8.2f}"
    if len(medians) > 1:
        line += f"{medians[0] / medians[1]:10.2f}"
    print(line, flush=True)


def main(argv=None):
    """Measure as the flags in argv say; returns the exit code."""
    about = f"{__doc__.splitlines()[0]} All other flags are train.py's."
    parser = Parser(prog="bench.py", description=about, allow_abbrev=False)
    parser.add_argument("--photos", type=whole_number(1, 10**6), metavar="N", help="the first N")
    words = arguments(argv)
    args, flags = parser.parse_known_args(words)
    from_flags = read_flags(train.Settings, flags, prog="bench.py")
    recipe = train.RECIPES[check(train.Settings, from_flags).recipe]
    settings = check(train.Settings, recipe | from_flags | {"save_every": 0})
    folders = (settings.train_img_dir, settings.train_mask_dir)
    pairs = find_pairs(*(train.ROOT / folder for folder in folders), settings.mask_suffix)

    print(f"{'':42}{'ours':>12}{'GiB':>8}{'classic':>12}{'GiB':>8}{'ratio':>10}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = []
        for kind in (Ours, Classic):
            args_of_kind = (kind, settings, pairs[: args.photos], folder)
            process = ProcessPoolExecutor(1, get_context("spawn"), get_ready, args_of_kind)
            processes.append(stack.enter_context(process))
        for row in ROWS:
            print_row(row, processes[:1] if row == "predict" else processes)
    return 0


if __name__ == "__main__":
    run_script(main)
