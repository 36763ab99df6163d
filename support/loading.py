"""From items to batches: a DataLoader whose workers start clean, report bad files and end."""

import multiprocessing

import torch
from torch.utils.data import DataLoader, default_collate

from support.errors import BadInput
from support.masks import IGNORED
from support.pairs import cpu_count
from support.signals import clean_start_method, init_worker

SLOW_IMPORTS = ["torch", "albumentations"]  # imported once, for all workers


def to_channels(mask, labels):
    """A mask, (H, W), as read_mask gives it, with one channel per class: (K, H, W), float32.

    Values are 0 and 1; between them where a single class was shrunk; -1 in all channels where a
    pixel is IGNORED.
    """
    mask = torch.as_tensor(mask).unsqueeze(-3)
    if labels.is_soft_mask:
        return mask / 255
    classes = torch.arange(1, labels.classes + 1).view(-1, 1, 1)
    return (mask == classes).float().masked_fill_(mask == IGNORED, -1)


class PhotoLoader(DataLoader):
    """A DataLoader that raises a worker's BadInput as it is; PyTorch would keep only its text."""

    def __iter__(self):
        for batch in super().__iter__():
            if isinstance(batch, BadInput):
                raise batch
            yield batch

    def close(self):
        """End the workers. PyTorch would wait where an exception keeps their queues alive."""
        if self._iterator is not None:  # PyTorch has no public name for it
            self._iterator._shutdown_workers()
            for worker in self._iterator._workers:
                worker.kill()


def default_workers(device):
    """How many workers to load data for a device: none on a CPU, which is busy as it is."""
    return min(8, cpu_count()) if device.type == "cuda" else 0


def make_loader(dataset, batch_size, num_workers=0, pin_memory=False, sampler=None):
    """A loader whose workers live on from epoch to epoch and leave signals to the script."""
    context = None
    if num_workers:
        context = multiprocessing.get_context(clean_start_method())
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(SLOW_IMPORTS)
    return PhotoLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        multiprocessing_context=context,
        worker_init_fn=init_worker,
        collate_fn=collate,
        generator=torch.Generator(),  # so that starting workers leaves the main process's RNG alone
    )


def collate(items):
    """A batch of items, or the BadInput that stands for them."""
    return items if isinstance(items, BadInput) else default_collate(items)
