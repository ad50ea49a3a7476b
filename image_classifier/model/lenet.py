"""LeNet as in PyTorch's CIFAR-10 tutorial: 62,006 parameters for 10 classes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """Two convolutions and three linear layers (after LeCun et al., 1998) for images [N, 3, 32, 32]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)  # [N, 6, 14, 14]
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)  # [N, 16, 5, 5]
        features = F.relu(self.fc1(features.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(features)))
        return logits
