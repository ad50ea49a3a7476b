"""A network and an optimizer for `image_classifier`, as a package of one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from image_classifier.settings import TrainingSettings


class PatchNetwork(nn.Module):
    """Patches of images, mixed along space and channels (after Trockman, Kolter: Patches Are All You Need?, 2022)."""

    def __init__(self, num_classes: int, width: int = 32, patch_size: int = 4) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, width, patch_size, patch_size), nn.GELU(), nn.BatchNorm2d(width))
        self.space = nn.Sequential(
            nn.Conv2d(width, width, 5, groups=width, padding=2), nn.GELU(), nn.BatchNorm2d(width)
        )
        self.channels = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S], normalised, to logits [B, num_classes]
        features = self.patches(images)
        features = self.channels(features + self.space(features))
        logits: Tensor = self.head(self.dropout(features.mean(dim=(2, 3))))
        return logits


def build(num_classes: int, image_size: int) -> nn.Module:
    """Build the network for images of 16 pixels and more."""
    if image_size % 4:
        raise ValueError(f"image_size takes a multiple of 4, got: {image_size}")
    return PatchNetwork(num_classes)


def build_adamw(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Build AdamW with the learning rate and the weight decay of the settings."""
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
