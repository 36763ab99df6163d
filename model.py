"""The network: a U-Net written from scratch.

After Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation" (https://arxiv.org/abs/1505.04597), with two changes that most later ones share:
convolutions are padded, so that the mask has the photo's size, and each is followed by BatchNorm.
`python model.py` prints each level's output and the parameter count.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each followed by BatchNorm and ReLU; height and width stay.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        # No bias in the convolutions: BatchNorm subtracts the mean and has a bias of its own.
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.conv(x)


class UNet(nn.Module):
    """Photo in, one logit a pixel out: a pixel belongs to the object where its logit is > 0.

    Args:
        in_channels: 3 for RGB photos, 1 for grey ones.
        out_channels: 1 for a binary mask.
        features: channels of each level on the way down; the bottleneck has twice the last.
        checkpoint_activations: True: training keeps only each level's input and computes the rest
            again on the way back, which takes less memory and more time.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H, W), for any H and W.
    """

    def __init__(
        self,
        in_channels=3,
        out_channels=1,
        features=(64, 128, 256, 512),
        checkpoint_activations=False,
    ):
        super().__init__()
        self.features = tuple(features)
        self.checkpoint_activations = checkpoint_activations
        # Ups before downs, as ever: optimizers' states in checkpoints count parameters in order.
        self.ups = nn.ModuleList()
        self.downs = nn.ModuleList()
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)

        channels = in_channels
        for feature in self.features:
            self.downs.append(DoubleConv(channels, feature))
            channels = feature
        self.bottleneck = DoubleConv(channels, channels * 2)

        # From the bottom up, each level's upsampling at 2i and its DoubleConv at 2i + 1.
        channels *= 2
        for feature in reversed(self.features):
            self.ups.append(nn.ConvTranspose2d(channels, feature, kernel_size=2, stride=2))
            self.ups.append(DoubleConv(feature * 2, feature))
            channels = feature

        self.final_conv = nn.Conv2d(channels, out_channels, kernel_size=1)

        if checkpoint_activations:  # BatchNorm then sees each batch twice: two smaller steps
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1 - math.sqrt(1 - module.momentum)

    def forward(self, x):
        height, width = x.shape[2:]
        least = 2 ** len(self.features)  # pixels below which nothing would reach the bottleneck
        x = pad_to(x, max(height, least), max(width, least))

        skips = []
        for down in self.downs:
            x = self.level(down, x)
            skips.append(x)
            x = self.pool(x)  # an odd last row or column is dropped here ...

        x = self.level(self.bottleneck, x)

        for upsample, double_conv in zip(self.ups[::2], self.ups[1::2], strict=True):
            skip = skips.pop()
            x = pad_to(upsample(x), *skip.shape[2:])  # ... and made up for here
            x = self.level(double_conv, torch.cat((skip, x), dim=1))

        return self.final_conv(x)[..., :height, :width]  # (N, out_channels, H, W), logits

    def level(self, double_conv, x):
        """double_conv(x), with or without keeping what lies between for the way back."""
        if self.checkpoint_activations and self.training:
            return checkpoint(double_conv, x, use_reentrant=False)
        return double_conv(x)


UNET = UNet  # the name in the well-known tutorials


def pad_to(x, height, width):
    """Add zeros at the right and the bottom, (N, C, H, W) -> (N, C, height, width).

    Called whether or not there is anything to add: an `if` on shapes would be frozen into an
    exported graph.
    """
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


if __name__ == "__main__":
    unet = UNet()
    for path, part in unet.named_modules():
        if isinstance(part, (DoubleConv, nn.ConvTranspose2d)) or part is unet.final_conv:
            part.register_forward_hook(lambda _, __, x, p=path: print(p, list(x.shape[1:])))
    unet(torch.zeros(1, 3, 160, 240))
    print(f"{sum(parameter.numel() for parameter in unet.parameters()):,} parameters")
