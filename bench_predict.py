"""Photos a second of predict.py: its parts alone and together, in one run.

    python bench_predict.py                             drawn photos of 1918x1280
    python bench_predict.py PHOTO_OR_FOLDER ...         yours
    python bench_predict.py --count 2000                how memory grows, over as many

The ways take turns and the table shows medians, in photos a second. "Reading and writing" is
predict.py with a network that answers at once, "network" the network on photos already read.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from bench import REPEATS, describe_machine, draw_photos, print_row
from checkpoints import load_checkpoint
from command_line import Parser, run_script, whole
from export import to_onnx
from files import find_photos
from predict import Clock, Task, predict_all, write_results
from predictor import Predictor, binary_mask, load_onnx, scale
from submission import Submission, encode
from utils import pick_device, set_up


def get_args_parser():
    parser = Parser(prog="bench_predict.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "photos", nargs="*", metavar="PHOTO", help="files and folders; without, drawn photos"
    )
    parser.add_argument(
        "--count",
        type=whole(16, 10**6),
        default=192,
        metavar="N",
        help="photos of each measurement; where there are fewer they come again (default: 192)",
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="see predict.py")
    parser.add_argument(
        "--batch-size", type=whole(1, 65536), default=16, help="photos at once (default: 16)"
    )
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: auto)")
    return parser


class AtOnce:
    """A Predictor whose network takes no time: it gives the same answers to any photos."""

    def __init__(self, predictor, answers):
        self.size, self.channels, self.read = predictor.size, predictor.channels, predictor.read
        self.answers = answers

    def logits(self, photos):
        return self.answers[: len(photos)]


def predict(photos, predictor, batch_size, folder, submission=None):
    """What predict.py does with photos: masks into a folder, or rows into a submission.

    Returns photos a second, resident memory in bytes after each, and the Clock.
    """
    tasks = [
        Task(photo, {} if submission else {"mask": folder / f"{number}_mask.png"}, bool(submission))
        for number, photo in enumerate(photos)
    ]
    write = lambda task, logits: write_results(task, logits, 0.5, None, submission)  # noqa: E731
    clock, memory, start = Clock(), [], time.perf_counter()
    for _, problem in predict_all(tasks, predictor, batch_size, write, clock):
        assert not problem, problem
        memory.append(resident_memory())
    return len(photos) / (time.perf_counter() - start), memory, clock


def run_network(answer, batch, count):
    """Photos a second of the network alone, on the same batch again and again."""
    answer(batch)
    start = time.perf_counter()
    for _ in range(count // len(batch)):
        answer(batch)
    return count // len(batch) * len(batch) / (time.perf_counter() - start)


def resident_memory():
    """Bytes that this process holds now; 0 where /proc does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 0


def encode_by_loop(mask):
    """What submission.encode does, a pixel at a time."""
    runs, previous = [], 0
    for position, pixel in enumerate(mask.ravel().tolist(), start=1):
        if pixel and not previous:
            runs += [position, 0]
        if pixel:
            runs[-1] += 1
        previous = pixel
    return " ".join(map(str, runs))


def compare_encoders(mask):
    """Milliseconds a mask of the vectorized encoder and of the loop."""
    times = {encode: [], encode_by_loop: []}
    for _ in range(REPEATS):
        for way, seconds in times.items():
            start = time.perf_counter()
            way(mask)
            seconds.append(time.perf_counter() - start)
    assert encode(mask) == encode_by_loop(mask)
    return [1000 * statistics.median(seconds) for seconds in times.values()]


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    device = pick_device(args.device)
    set_up(device)
    predictor = Predictor(args.checkpoint, device)
    print(f"{describe_machine(device)}; {predictor.filename}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        names = args.photos or [draw_photos(folder)]
        photos = (find_photos(names) * args.count)[: args.count]
        batch = np.stack([predictor.read(photo) for photo in photos[: args.batch_size]])
        at_once = AtOnce(predictor, predictor.answer(batch))
        checkpoint = load_checkpoint(predictor.filename)
        onnx_file = folder / "unet.onnx"
        onnx_file.write_bytes(to_onnx(checkpoint, predictor.filename).SerializeToString())
        onnx_answer = load_onnx(str(onnx_file), device, tta=False)[-1]

        clocks = []

        def both(predictor):
            rate, _, clock = predict(photos, predictor, args.batch_size, folder)
            clocks.append(clock)
            return rate

        ways = {
            "reading and writing": lambda: both(at_once),
            "network": lambda: run_network(predictor.answer, batch, args.count),
            "network by onnxruntime": lambda: run_network(onnx_answer, batch, args.count),
            "end to end": lambda: both(predictor),
        }
        rates = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, way in ways.items():
                rates[name].append(way())
        rates = {name: statistics.median(values) for name, values in rates.items()}
        for name, rate in rates.items():
            print_row(f"{name}, photos/s", rate)
        sides = rates["reading and writing"], rates["network"]
        print_row("end to end of the slower side, %", 100 * rates["end to end"] / min(sides))
        in_turn = 1 / sum(1 / rate for rate in sides)
        print_row("end to end of the two in turn, %", 100 * rates["end to end"] / in_turn)
        print(f"time of all threads: {clocks[-1].shares()}")

        with Submission(folder / "submission.csv", [], "bench") as submission:
            rate, memory, _ = predict(photos, predictor, args.batch_size, folder, submission)
        print_row("a submission, photos/s", rate)
        quarter = len(memory) // 4
        first, last = statistics.mean(memory[:quarter]), statistics.mean(memory[-quarter:])
        if first:
            print_row("its memory, last quarter over the first", last / first)
        mask = binary_mask(scale(at_once.answers[0], (1280, 1918)), 0.5)
        fast, slow = compare_encoders(mask)
        print_row("encoding a mask of 1918x1280, ms", fast)
        print_row("a loop over pixels takes so often that", slow / fast)
    return 0


if __name__ == "__main__":
    run_script(main)
