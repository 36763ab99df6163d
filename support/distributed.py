"""What is different under torchrun; in a single process each of these does nothing."""

import contextlib
import datetime
import os
import sys

import torch
from torch import distributed as dist

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun says


def rank():
    """This process's number; 0 is the one that prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device):
    """Join the processes that torchrun started, if it did; yields this process's device: with CUDA
    each has a GPU of its own."""
    if not all(name in os.environ for name in LAUNCHED):
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by a script of several trainings
        yield device
        return
    # The others wait while the first one decodes all photos, which may take its time.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
    stdout = sys.stdout
    try:
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        yield device
    finally:
        sys.stdout = stdout
        dist.destroy_process_group()


@contextlib.contextmanager
def first_before_others():
    """The first process goes through the block alone; the others after it has."""
    if rank() > 0:
        try:
            dist.barrier()
        except RuntimeError:  # the first process has ended, and said why
            sys.exit(1)
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier()


def reduce(numbers, device, how="SUM"):
    """The sums, or with "MAX" the maxima, of each of a list of numbers over all processes."""
    if not dist.is_initialized():
        return [float(number) for number in numbers]
    place = device if device.type == "cuda" else "cpu"
    tensor = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=place)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
    return tensor.tolist()


def move_to_first(number, device):
    """The sum of a number over all processes in the first of them, and 0 in the others."""
    whole = reduce([number], device)[0]
    return whole if rank() == 0 else 0.0


def own_part(images, masks, count):
    """This process's part of a batch of `count` photos: (images, masks, how many of them count).

    All processes must take part in each step, so an epoch's last batch is filled up with photos
    that come again (see dataset.EpochSampler): left out here, but for one where nothing is left.
    """
    own = len(range(rank(), count, world_size()))
    return images[: max(own, 1)], masks[: max(own, 1)], own


def share_buffers(model):
    """Give all processes the first one's BatchNorm statistics, which each gathered by itself."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
