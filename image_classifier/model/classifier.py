"""The classifier that is trained, saved and served: a network with input scaling in front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from image_classifier.errors import ModelError
from image_classifier.model.head import find_head
from image_classifier.model.hooks import FollowsProgress, InitializesFromImages


class Classifier(nn.Module):
    """Uint8 images [N, 3, S, S] in, float32 logits [N, num_classes] out.

    The scaling, of values and of size, is part of the module, so that evaluation, prediction and serving cannot scale
    differently.

    Attributes:
        image_size: side in pixels of the images that the network is used on.
        num_classes: the network's outputs.
        is_body_frozen: whether the head alone is trained.
    """

    input_mean: Tensor  # [1, 3, 1, 1] float32, in units of a pixel's 0 to 255
    input_std: Tensor  # [1, 3, 1, 1] float32, likewise

    def __init__(
        self,
        network: nn.Module,
        input_mean: Sequence[float],
        input_std: Sequence[float],
        image_size: int = 32,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.image_size = image_size
        self.num_classes = num_classes
        self.is_body_frozen = False
        for name, values in (("input_mean", input_mean), ("input_std", input_std)):
            in_pixels = np.asarray(values, dtype=np.float32) * np.float32(255)
            self.register_buffer(name, torch.from_numpy(in_pixels).reshape(1, 3, 1, 1))

    def initialize_from(self, images: NDArray[np.uint8]) -> None:
        """Let a network that has weights to compute from training images do so; uint8 [N, 3, S, S]."""
        if isinstance(self.network, InitializesFromImages):
            self.network.initialize_from(images, self.input_mean.flatten(), self.input_std.flatten())

    @property
    def head(self) -> nn.Module:
        """The layer with a row of weights for each class.

        Raises:
            ModelError: the network has none that can be found.
        """
        return self.network.get_submodule(find_head(self.network, self.num_classes))

    def freeze_body(self) -> None:
        """Train the head alone from now on: all else keeps its weights and, always in evaluation mode, its statistics.

        Raises:
            ModelError: there is no head, or nothing in it to train.
        """
        head = set(self.head.parameters())
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in head)
        if not any(parameter.requires_grad for parameter in head):
            raise ModelError(
                "--freeze body leaves nothing to train, because the head has no trainable weight; set --freeze none"
            )
        self.is_body_frozen = True

    def train(self, mode: bool = True) -> Classifier:
        """Choose between training and evaluation, the latter always for a frozen body."""
        super().train(mode)
        if self.is_body_frozen:
            self.network.eval()
            self.head.train(mode)
        return self

    def begin_step(self, progress: float) -> None:
        """Let a network that trains parts of it for a part of the run only know how much is over, from 0 to 1."""
        if isinstance(self.network, FollowsProgress) and not self.is_body_frozen:
            self.network.begin_step(progress)

    def scale(self, images: Tensor, image_size: int) -> Tensor:
        """Scale uint8 images [N, 3, H, W] to what the network takes: float32 [N, 3, image_size, image_size]."""
        scaled = (images.contiguous(memory_format=torch.channels_last).float() - self.input_mean) / self.input_std
        if images.shape[-1] == image_size:
            return scaled
        return F.interpolate(scaled, size=(image_size, image_size), mode="bilinear", antialias=True)

    def forward(self, images: Tensor, image_size: int | None = None) -> Tensor:
        logits: Tensor = self.network(self.scale(images, image_size or self.image_size))
        return logits.float()
