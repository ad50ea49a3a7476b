"""The network of airbench, which holds the records of training CIFAR-10 fast, in several widths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_SIZE = 2
NUM_WHITENED = 2 * 3 * KERNEL_SIZE**2
NUM_UNFOLDED = 250
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
        if not self.head.weight.is_meta:  # that device has shapes alone, and to compute there imports torch's compiler
            with torch.no_grad():
                self.head.weight /= self.head.weight.std()

    def initialize_from(self, images: Tensor) -> None:
        """Set the first convolution so that it whitens the 2x2 patches of scaled images [N, 3, H, W].

        Its filters are the eigenvectors of the patches' covariance over the square root of their eigenvalues, and
        their negatives, so that a rectifier after them loses nothing.
        """
        moments = torch.zeros(NUM_WHITENED // 2, NUM_WHITENED // 2, device=images.device)
        num_patches = 0
        for part in torch.split(images, NUM_UNFOLDED):  # all at once would be 0.2 GB of patches, twice
            patches = F.unfold(part, KERNEL_SIZE).transpose(0, 1).flatten(1)
            moments += patches @ patches.T
            num_patches += patches.shape[1]
        eigenvalues, eigenvectors = torch.linalg.eigh(moments / num_patches)
        filters = (eigenvectors / (eigenvalues + EIGENVALUE_FLOOR).sqrt()).T.reshape(-1, 3, KERNEL_SIZE, KERNEL_SIZE)
        with torch.no_grad():
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
    """Build a 3x3 convolution whose first filters pass their channel through, as far as there are channels."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight.data[:in_channels])
    return convolution


def build_norm(num_channels: int) -> nn.BatchNorm2d:
    """Build a batch norm without scale, whose statistics follow the newest batches closely."""
    norm = nn.BatchNorm2d(num_channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
