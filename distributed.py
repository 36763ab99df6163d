"""What is different under torchrun: who this process is, waiting for the others, gathering.

In a single process each of these does nothing, so that callers need not ask.
"""

import contextlib
import datetime
import os
import sys

import torch
from torch import distributed as dist


def rank():
    """This process's number; 0 is the one that prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def hide_progress():
    """For tqdm's `disable`: bars only in the first process, and only on a terminal (None)."""
    return None if rank() == 0 else True


@contextlib.contextmanager
def process_group(device):
    """Join the processes that torchrun started, if it did; yields this process's device.

    With CUDA each process has a GPU of its own and they speak nccl, else gloo.
    """
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The others wait while the first one decodes all photos, which may take its time.
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6)
    )
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


def sum_over_processes(tensor):
    """Add up a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest(number, device):
    """The largest of all processes' whole numbers."""
    if not dist.is_initialized():
        return number
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def gather(tensor):
    """All processes' tensors (n,), one after the other: (n * processes,)."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def without_repeats(images, masks, length, batch_size):
    """The last batch of `length` photos, without those that only fill it up.

    All processes must take part in each step, so a few photos come again where an epoch does not
    come out even (see dataset.EpochSampler). Returns (images, masks, own photos, share): of the own
    photos there may be none, and the mean over processes of each one's mean loss times its share is
    the mean loss over the step's photos.
    """
    count = (length - 1) % (batch_size * world_size()) + 1  # in this step, over all processes
    own = len(range(rank(), count, world_size()))
    kept = max(own, 1)
    return images[:kept], masks[:kept], own, own * world_size() / count


def share_buffers(model):
    """Give all processes the first one's BatchNorm statistics, which each gathered by itself."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def interleave(scores):
    """From each process's scores of every n-th image, {name: (part,)}, those of all in order."""
    if not dist.is_initialized():
        return scores
    parts = [None] * world_size()
    dist.all_gather_object(parts, scores)
    whole = {}
    for name in scores:
        column = torch.empty(sum(len(part[name]) for part in parts), dtype=torch.float64)
        for first, part in enumerate(parts):
            column[first :: len(parts)] = part[name]
        whole[name] = column
    return whole
