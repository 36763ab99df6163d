"""The recipe of the tutorials, for bench.py to compare with; nothing else uses it.

Each photo is decoded at full size each epoch; training is in float32, in the default memory layout,
with a look at the loss after each step.
"""

from collections import deque

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dataset import get_train_transform
from files import cpu_count
from model import UNet


class ClassicDataset(Dataset):
    def __init__(self, pairs, transform):
        self.pairs, self.transform = pairs, transform

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image = np.array(Image.open(self.pairs[index].photo).convert("RGB"))
        mask = np.array(Image.open(self.pairs[index].mask).convert("L"), dtype=np.float32)
        mask[mask == 255.0] = 1.0
        result = self.transform(image=image, mask=mask)
        return result["image"], result["mask"].unsqueeze(0)


class Classic:
    """The methods that bench.py measures; bench.Ours has the same."""

    def __init__(self, settings, pairs, device):
        torch.manual_seed(settings.seed)
        self.settings, self.pairs, self.device = settings, pairs, device
        self.model = UNet(features=settings.features).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        self.loss_function = nn.BCEWithLogitsLoss()

    def loader(self, count, workers, transform):
        return DataLoader(
            ClassicDataset(self.pairs[:count], transform),
            batch_size=self.settings.batch_size,
            shuffle=True,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def first_pass(self, count):
        size = self.settings.image_height, self.settings.image_width
        exhaust(self.loader(count, cpu_count(), get_train_transform(*size)))

    def train(self, loader):
        self.model.train()
        for images, masks in loader:
            images, masks = images.to(self.device), masks.to(self.device)
            loss = self.loss_function(self.model(images), masks)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()

    def evaluate(self, loader):
        correct = dice = 0
        self.model.eval()
        with torch.no_grad():
            for images, masks in loader:
                images, masks = images.to(self.device), masks.to(self.device)
                predicted = (torch.sigmoid(self.model(images)) > 0.5).float()
                correct += (predicted == masks).sum()
                dice += (2 * (predicted * masks).sum()) / ((predicted + masks).sum() + 1e-8)
        return correct.item(), dice.item()


def exhaust(loader):
    deque(loader, maxlen=0)
