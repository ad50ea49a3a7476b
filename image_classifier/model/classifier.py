"""What is trained, saved and served: a network with the scaling of its inputs in front."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Uint8 images [N, 3, 32, 32] in, float32 logits [N, num_classes] out.

    The scaling is part of the module, so that evaluation, prediction and serving cannot scale differently.
    """

    input_mean: Tensor  # [1, 3, 1, 1] float32, in units of a pixel's 0 to 255
    input_std: Tensor  # [1, 3, 1, 1] float32, likewise

    def __init__(self, network: nn.Module, input_mean: Sequence[float], input_std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        for name, values in (("input_mean", input_mean), ("input_std", input_std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).mul(255).reshape(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        scaled = (images.contiguous(memory_format=torch.channels_last).float() - self.input_mean) / self.input_std
        logits: Tensor = self.network(scaled)
        return logits.float()
