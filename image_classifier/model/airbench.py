"""The network of airbench, the speed record for training on CIFAR-10, in several widths."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from image_classifier.model.initialization import compute_deviation, compute_patch_moments, decompose

KERNEL_SIZE = 2
NUM_WHITENED = 2 * 3 * KERNEL_SIZE**2
EIGENVALUE_FLOOR = 5e-4  # Jordan's; keeps patches that hardly vary from being blown up
PART_WITH_BIAS = 3 / 8  # Jordan's: 3 of 8 epochs


class Airbench(nn.Module):
    """Whitened patches, then three groups of two convolutions (Jordan: 94% on CIFAR-10 in 3.29 Seconds, 2024).

    Takes images [N, 3, H, W] of any size from 16 pixels on: the last pooling is over all that is left. Their right and
    lower edges are repeated once, which the published network does not do: so features keep sides of 32, 16, 8 and 4
    pixels where it loses a row and a column each time. The filters of the first convolution are set by
    `initialize_from` and not trained; its bias is, in the beginning: after that no gradient has to be brought down to
    the largest features.
    """

    def __init__(self, num_classes: int, widths: tuple[int, int, int] = (64, 256, 256)) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, NUM_WHITENED, KERNEL_SIZE, padding="same", padding_mode="replicate")
        self.whiten.weight.requires_grad_(False)
        self.group1 = ConvGroup(NUM_WHITENED, widths[0])
        self.group2 = ConvGroup(widths[0], widths[1])
        self.group3 = ConvGroup(widths[1], widths[2])
        self.head = nn.Linear(widths[2], num_classes, bias=False)

    @torch.no_grad()
    def arrange_weights(self) -> None:
        """Make of weights that were drawn those that training begins with: the first filters of each convolution pass
        their channel through, and the head's have a standard deviation of 1."""
        for group in (self.group1, self.group2, self.group3):
            for convolution in (group.conv1, group.conv2):
                nn.init.dirac_(convolution.weight[: convolution.in_channels])
        deviation = np.float32(compute_deviation(self.head.weight))
        self.head.weight.copy_(torch.from_numpy(self.head.weight.numpy() / deviation))

    @torch.no_grad()
    def initialize_from(self, images: NDArray[np.uint8], mean: Tensor, std: Tensor) -> None:
        """Set the first convolution so that it whitens the 2x2 patches of images [N, 3, H, W] that are scaled with
        these [3].

        Its filters are the eigenvectors of the patches' covariance over the square root of their eigenvalues, and
        their negatives, so that a rectifier after them loses nothing.
        """
        sums, num_patches = compute_patch_moments(images, KERNEL_SIZE)
        means, stds = (values.double().repeat_interleave(KERNEL_SIZE**2).tolist() for values in (mean, std))
        size = len(means)
        of_products, of_values = (sums / num_patches).tolist(), (sums[-1] / num_patches).tolist()
        covariance = [
            [
                (of_products[i][j] - means[i] * of_values[j] - means[j] * of_values[i] + means[i] * means[j])
                / (stds[i] * stds[j])
                for j in range(size)
            ]
            for i in range(size)
        ]
        eigenvalues, eigenvectors = decompose(covariance)
        rows = [
            [number / math.sqrt(value + EIGENVALUE_FLOOR) for number in vector]
            for value, vector in zip(eigenvalues, eigenvectors, strict=True)
        ]
        filters = torch.tensor(rows, dtype=torch.float64).float().reshape(-1, 3, KERNEL_SIZE, KERNEL_SIZE)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def begin_step(self, progress: float) -> None:
        """Stop training the first convolution's bias when that part of the run, from 0 to 1, is over."""
        assert self.whiten.bias is not None
        self.whiten.bias.requires_grad_(progress < PART_WITH_BIAS)

    def forward(self, images: Tensor) -> Tensor:
        features = F.gelu(self.whiten(images))  # [N, 24, H, W]
        features = self.group3(self.group2(self.group1(features)))  # [N, widths[2], H / 8, W / 8]
        pooled = features.amax(dim=(2, 3))
        logits: Tensor = self.head(pooled) / pooled.shape[1]
        return logits


class ConvGroup(nn.Module):
    """Convolution, pooling by 2, norm, GELU, and again without pooling; pooling first leaves less to normalise."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = build_convolution(in_channels, out_channels)
        self.norm1 = build_norm(out_channels)
        self.conv2 = build_convolution(out_channels, out_channels)
        self.norm2 = build_norm(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        features = F.gelu(self.norm1(F.max_pool2d(self.conv1(features), 2)))
        return F.gelu(self.norm2(self.conv2(features)))


def build_convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Build a 3x3 convolution."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


def build_norm(num_channels: int) -> nn.BatchNorm2d:
    """Build a batch norm without scale, whose statistics follow the newest batches closely."""
    norm = nn.BatchNorm2d(num_channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
