"""What a training prints: what is about to happen, each epoch, the result, how to resume.

`run` is a train.Run.
"""

import contextlib
import shlex
import sys
import time

import torch

from support import advice, plots
from support.command_line import message_of
from support.distributed import rank, world_size
from support.errors import BadInput, display_path, printable, short_path
from support.progress import ProgressBar


def announce(run, train_set, val_set, dtype, has_weights):
    """Print what is about to be trained, and advice.

    Args:
        train_set, val_set: the data sets.
        dtype: in which the network computes; None for float32.
        has_weights: whether the run starts from trained weights.
    """
    settings = run.settings
    for line in advice.at_start(settings, has_weights, train_set.pairs, val_set.pairs):
        print(line)
    what = f"Crops of {settings.crop} pixels" if settings.crop else "Photos"
    counts = f"{len(train_set)} for training, {len(val_set)} for validation"
    print(f"{what}: {counts}, from {printable(settings.train_img_dir)}")
    n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    precision = str(dtype or torch.float32).removeprefix("torch.")
    print(f"Network: {n_parameters:,} parameters, on {run.device} in {precision}")
    print(
        f"Epochs {run.epoch + 1} to {settings.num_epochs}: size {settings.size}, "
        f"features {settings.features}, batch_size {settings.batch_size}, loss {settings.loss}, "
        f"optimizer {settings.optimizer}, learning_rate {settings.learning_rate}, "
        f"scheduler {settings.scheduler}",
        flush=True,
    )


def epoch_bar(run, loader):
    """A progress bar around a loader of what is left of an epoch."""
    done = run.progress.batches_done
    title = f"epoch {run.epoch + 1}/{run.settings.num_epochs}"
    return ProgressBar(loader, title, done + len(loader), initial=done, unit="batch")


def postfix(loss, progress):
    """What a progress bar shows beside how far it is."""
    return f"loss {loss:.4f}, {progress.photos_per_second:.1f} photos/s"


def epoch(run):
    """Print a line about the epoch that has ended."""
    row = run.history[-1]
    print(
        f"epoch {run.epoch}/{run.settings.num_epochs}: loss {row['train_loss']:.4f}, "
        f"validation loss {row['val_loss']:.4f}, IoU {row['iou']:.4f}, "
        f"{row['photos_per_second']:.1f} photos/s, {row['seconds']:.0f} s",
        flush=True,
    )


def result(run, started, outputs, test_script):
    """Print the best score, the run's outputs, and how to evaluate it.

    started: time.perf_counter() when the script started.
    """
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    best = f"best Dice {run.best['dice']:.5f} after epoch {run.best['epoch']}"
    print(f"Done in {minutes} min {seconds} s: {best}")
    if run.best["dice"] <= run.constant_dice:
        print(advice.nothing_learned(run.settings, run.constant_dice))
    for name in outputs:
        print(f"  {display_path(run.output_dir / name)}")
    words = [short_path(test_script), "--output-dir", short_path(run.output_dir)]
    print(f"  evaluate: python {printable(shlex.join(words))}")


def restore_table(run):
    """Write a resumed run's table and curves, which a kill may have kept behind its checkpoint."""
    if rank() == 0 and run.history:
        plots.save_history(run.history, run.best, run.output_dir)


def nothing_left(run, latest):
    """Print that a run is finished; latest: its checkpoint."""
    done = f"{display_path(latest)} has been trained for {run.epoch} epochs: nothing is left to do"
    print(f"{done}; --load-model --epochs {2 * run.epoch} would train more")


def stopped(run, latest, how_to_resume):
    """Print, in the first process, up to where a run is saved after a signal."""
    if rank() == 0:
        place = f"batch {run.progress.batches_done} of epoch {run.epoch + 1}"
        print(f"Stopped; {display_path(latest)} holds the run up to {place}", file=sys.stderr)
        print(how_to_resume, file=sys.stderr)


def command_to_resume(words):
    """What to type to resume a run: a script and its flags, under torchrun if this process is."""
    if "--load-model" not in words:
        words = [*words, "--load-model"]
    program = f"torchrun --nproc_per_node={world_size()}" if world_size() > 1 else "python"
    return f"to resume: {program} {printable(shlex.join(words))}"


@contextlib.contextmanager
def problems_with(how_to_resume):
    """A block whose problems that the user can mend are raised as BadInput, with that advice."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (BadInput, MemoryError, OSError, RuntimeError) as problem:
        raise BadInput(None, f"{message_of(problem)}; {how_to_resume}") from None
