"""Common residual networks for comparison: ResNet-18 and wide residual networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet18(nn.Module):
    """ResNet-18 (He et al.: Deep Residual Learning, 2015), with torchvision's names of layers, so that its weights fit.

    Takes images [N, 3, H, W] of any size from 16 pixels on.

    Args:
        has_imagenet_stem: begins as for images of 224 pixels, with a convolution 7x7 and a pooling that leave a quarter
            of each side; otherwise with a convolution 3x3 that leaves the size, as is usual for CIFAR.
    """

    def __init__(self, num_classes: int, *, has_imagenet_stem: bool = False) -> None:
        super().__init__()
        self.has_imagenet_stem = has_imagenet_stem
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False) if has_imagenet_stem else build_conv(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512))
        self.fc = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn1(self.conv1(images)))
        if self.has_imagenet_stem:
            features = F.max_pool2d(features, 3, stride=2, padding=1)
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))  # [N, 512, H / 8, W / 8], or / 32
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two convolutions with norms, added to the input; where the shape changes, that goes through a convolution 1x1."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = build_conv(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = build_conv(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride > 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, features: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(features)))))
        return F.relu(residual + (features if self.downsample is None else self.downsample(features)))


class WideResNet(nn.Module):
    """A wide residual network (Zagoruyko, Komodakis: Wide Residual Networks, 2016): norms and ReLU before convolutions.

    Takes images [N, 3, H, W] of any size from 16 pixels on. By default WRN-16-4: 2.7 million parameters.

    Args:
        num_blocks: blocks in each of the three groups; the depth is six of them and four.
        width: factor by which it is wider than a plain one.
    """

    def __init__(self, num_classes: int, *, num_blocks: int = 2, width: int = 4) -> None:
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.stem = build_conv(3, widths[0])
        self.blocks = nn.Sequential()
        for group, (in_channels, out_channels) in enumerate(zip(widths, widths[1:], strict=False)):
            for number in range(num_blocks):
                stride = 2 if group > 0 and number == 0 else 1
                self.blocks.append(WideBlock(in_channels if number == 0 else out_channels, out_channels, stride))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.blocks(self.stem(images))))  # [N, 64 * width, H / 4, W / 4]
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class WideBlock(nn.Module):
    """Norm, ReLU and convolution, twice, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = build_conv(in_channels, out_channels, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = build_conv(out_channels, out_channels)
        changes_shape = stride > 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if changes_shape else None

    def forward(self, features: Tensor) -> Tensor:
        activated = F.relu(self.norm1(features))
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        return residual + (features if self.shortcut is None else self.shortcut(activated))


def build_conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a convolution 3x3."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
