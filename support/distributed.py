"""What is different under torchrun; in a single process each of these does nothing."""

import contextlib
import datetime
import os
import sys

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # variables that torchrun sets
DECODING = datetime.timedelta(hours=6)  # the others wait while the first process decodes all photos


def rank():
    """This process's number; process 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device):
    """Join the processes that torchrun started, if it did; yields this process's device.

    With CUDA each process has a GPU of its own. Only the first process prints.
    """
    if not all(name in os.environ for name in LAUNCHED):
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by a script of several trainings
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=DECODING)
    stdout = sys.stdout
    try:
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        yield device
    finally:
        sys.stdout = stdout
        dist.destroy_process_group()


def in_parallel(model, device):
    """The model as training calls it: wrapped in DDP if several processes train together."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


@contextlib.contextmanager
def first_before_others():
    """The first process runs the block alone; the others run it afterwards."""
    if rank() > 0:
        try:
            dist.barrier()
        except RuntimeError:  # the first process has ended, and said why
            sys.exit(1)
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier()


def reduce(numbers, device, how="SUM"):
    """The sums, or with "MAX" the maxima, of a tensor of numbers over all processes.

    Returns a tensor of the same shape on the CPU, float64.
    """
    if torch.is_tensor(numbers):
        numbers = numbers.cpu()  # MPS has no float64
    tensor = torch.as_tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        tensor = tensor.to(device if device.type == "cuda" else "cpu", copy=True)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
    return tensor.cpu()


def sum_on_first(number, device):
    """The sum of a number over all processes, for the first of them, and 0 for the others."""
    total = reduce(number, device).item()
    return total if rank() == 0 else 0.0


def drop_repeats(images, masks, photos_in_batch):
    """This process's share of a batch that all processes hold together, without repeated photos.

    All processes must take part in each step, so an epoch's last batch is filled up with photos
    that come again (see dataset.EpochSampler). They are dropped here; if all are repeats, one is
    kept, since BatchNorm needs one.

    Returns (images, masks, n_real): the photos, and how many of them count.
    """
    n_real = len(range(rank(), photos_in_batch, world_size()))
    kept = max(n_real, 1)
    return images[:kept], masks[:kept], n_real


def share_buffers(model):
    """Give all processes the first one's BatchNorm statistics; each gathered its own."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
