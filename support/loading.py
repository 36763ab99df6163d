"""From items to batches: by PyTorch's DataLoader, or from a GPU's memory where all fit there."""

import math

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, default_collate

from support.errors import BadInput
from support.images import IGNORED
from support.signals import init_worker

SHARE = 0.25  # of a GPU's free memory that photos may take; the rest is the network's


def to_channels(mask, labels):
    """Masks (..., H, W), as read_mask gives them, as one channel a class: (..., K, H, W), float32,
    0 and 1, between them where a single class was shrunk, -1 in all channels where IGNORED."""
    mask = torch.as_tensor(mask).unsqueeze(-3)
    if labels.is_soft_mask:
        return mask / torch.full((), 255.0, device=mask.device)  # CUDA rounds otherwise by a number
    classes = torch.arange(1, labels.classes + 1, device=mask.device).view(-1, 1, 1)
    return (mask == classes).float().masked_fill_(mask == IGNORED, -1)


class PhotoLoader(DataLoader):
    """A DataLoader that raises a worker's BadInput as it is: PyTorch would keep its text alone."""

    def __iter__(self):
        for batch in super().__iter__():
            if isinstance(batch, BadInput):
                raise batch
            yield batch

    def close(self):
        """End the workers: where an exception keeps their queues alive, PyTorch would wait."""
        if self._iterator is not None:  # PyTorch has no public name for it
            self._iterator._shutdown_workers()
            for worker in self._iterator._workers:
                worker.kill()


def make_loader(dataset, batch_size, num_workers=0, pin_memory=False, sampler=None):
    """A loader whose workers live on from epoch to epoch and leave signals to the script."""
    return PhotoLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=init_worker,
        collate_fn=collate,
        generator=torch.Generator(),  # so that starting workers leaves the main process's RNG alone
    )


def collate(items):
    """A batch of items, or the BadInput that stands for them."""
    return items if isinstance(items, BadInput) else default_collate(items)


def copy_to(device, *caches):
    """{cache: its pixels on the device, (number of photos, bytes of each), uint8}, or {} where the
    device is no GPU, or has too little memory free for that."""
    needed = sum(math.prod(cache.shape) for cache in set(caches))
    if device.type != "cuda" or needed > SHARE * torch.cuda.mem_get_info(device)[0]:
        return {}
    maps = {cache: np.load(cache.path, mmap_mode="c") for cache in set(caches)}
    return {cache: torch.from_numpy(pixels).to(device) for cache, pixels in maps.items()}


class DeviceLoader:
    """Batches as make_loader gives them, bit for bit, made on a device from all photos there.

    Args:
        dataset: a CarvanaDataset with a cache of one size for all photos.
        pixels: what copy_to gave for that cache.
        flip: a transform, of NumPy's arrays, that mirrors a photo or leaves it; None leaves all.
    """

    def __init__(self, dataset, batch_size, sampler, pixels, flip=None):
        self.dataset, self.batch_size, self.sampler = dataset, batch_size, sampler
        self.pixels, self.flip = pixels, flip

    def __len__(self):
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self):
        dataset, (height, width) = self.dataset, self.dataset.size
        sizes = [height * width * dataset.channels, height * width]
        for keys in BatchSampler(self.sampler, self.batch_size, drop_last=False):
            starts = [dataset.cache.places[dataset.pair_of(key).photo][0] for key in keys]
            facts = torch.tensor([starts, [self.is_mirrored(key) for key in keys]])
            starts, mirrored = facts.to(self.pixels.device, non_blocking=True)
            photos, masks = self.pixels[starts // sum(sizes)].split(sizes, dim=1)
            # Multiplied, not divided: albumentations' Normalize rounds so.
            images = photos.view(-1, height, width, dataset.channels).movedim(-1, 1) * (1 / 255)
            masks = to_channels(masks.view(-1, height, width), dataset.labels)
            mirrored = mirrored.bool().view(-1, 1, 1, 1)
            yield tuple(torch.where(mirrored, part.flip(-1), part) for part in (images, masks))

    def is_mirrored(self, key):
        """Whether the transform would mirror this photo, tried on one of two pixels."""
        if self.flip is None:
            return False
        self.flip.set_random_state(*self.dataset.random_state(key))
        return bool(self.flip(image=np.array([[0, 1]], np.uint8))["image"][0, 0])

    def close(self):
        """There is nothing to end."""
