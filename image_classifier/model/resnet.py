"""A small residual network."""

from __future__ import annotations

from torch import Tensor, nn

LOGIT_SCALE = 0.125  # Page's; without it the first losses are three times those of guessing


class ConvBlock(nn.Module):
    """Convolution 3x3, pooling by 2 where wanted, batch norm, ReLU; pooling first leaves less to normalise."""

    def __init__(self, in_channels: int, out_channels: int, *, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.norm(self.pool(self.conv(features))))
        return activated


class ResidualBlock(nn.Module):
    """The input added to what two convolutions make of it (He et al.: Deep Residual Learning, 2015)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels)
        self.second = ConvBlock(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        residual: Tensor = self.second(self.first(features))
        return features + residual


class ResNet(nn.Module):
    """Nine layers in the arrangement of Page's ResNet-9 (How to Train Your ResNet, 2018), a quarter as wide."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = ConvBlock(3, width)
        self.stage1 = nn.Sequential(ConvBlock(width, 2 * width, pool=True), ResidualBlock(2 * width))
        self.stage2 = ConvBlock(2 * width, 4 * width, pool=True)
        self.stage3 = nn.Sequential(ConvBlock(4 * width, 8 * width, pool=True), ResidualBlock(8 * width))
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))  # [N, 8 * width, H / 8, W / 8]
        logits: Tensor = self.head(features.amax(dim=(2, 3)))
        return logits * LOGIT_SCALE
