"""The suite for networks: a good one passes, and each bad one fails with its reason."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classifier.testing.networks import check_network


class Good(nn.Module):
    """A convolution, a norm, dropout, a head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def compute(self, images: Tensor) -> Tensor:
        return F.dropout(F.relu(self.norm(self.conv(images))).mean(dim=(2, 3)), 0.2, self.training)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.compute(images))
        return logits


class Remembering(Good):
    """Its answers depend on how often it was asked."""

    num_calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(images) * self.num_calls


class RememberingInSteps(Good):
    """Its gradients depend on how often it was trained."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.counts = [0]

    def forward(self, images: Tensor) -> Tensor:
        self.counts[0] += self.training
        return super().forward(images) * (1 + self.counts[0])


class OfTheBatch(Good):
    """An image's answer depends on the others in its batch."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images - images.mean(dim=0))


class OtherDraws(Good):
    """Draws from Python's generator in training."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * (random.random() if self.training else 1.0))


class DrawsInEvaluation(Good):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + torch.rand_like(images))


class OtherShape(Good):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, 1:]


class NoTensor(Good):
    def forward(self, images: Tensor) -> Tensor:
        return (super().forward(images),)  # type: ignore[return-value]  # which is what is tried


class NotFinite(Good):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0


class Unused(Good):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.unused = nn.Linear(2, 2)


class Unsaved(Good):
    """Changes a buffer that no checkpoint has."""

    count: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("count", torch.zeros(1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return super().forward(images)


class ChangedByEvaluation(Good):
    count: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.count += 1
        return super().forward(images)


class OneSize(Good):
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == 32, "this network takes images of 32 pixels"
        return super().forward(images)


class NotExported(Good):
    """Does what ONNX has no operators for."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            images = images + 0 * torch.linalg.eigvalsh(images[:, 0] @ images[:, 0].mT)[:, :1, None, None]
        return super().forward(images)


class DrawnByTheClock(Good):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        nn.init.constant_(self.head.bias, time.perf_counter() % 1)  # as much as a float can tell apart


def fail(num_classes: int) -> nn.Module:
    raise ValueError(f"not for {num_classes} classes")


BAD: dict[str, tuple[Callable[..., object], int, str]] = {
    "remembers": (Remembering, 32, "other answers to the same images: it remembers something"),
    "remembers in steps": (RememberingInSteps, 32, "other gradients in the same step: it remembers something"),
    "other draws": (OtherDraws, 32, "other gradients .* draws numbers from another generator than torch's"),
    "draws in evaluation": (DrawsInEvaluation, 32, "or draws numbers in evaluation"),
    "of the batch": (OfTheBatch, 32, "logits that depend on the other images"),
    "other shape": (OtherShape, 32, r"gives float32 \[4, 9\] for images of 32 pixels instead of logits \[4, 10\]"),
    "no tensor": (NoTensor, 32, r"gives tuple instead of a tensor of logits \[4, 10\]"),
    "not finite": (NotFinite, 32, "logits that are not finite"),
    "unused": (Unused, 32, "parameters that take no part in its answers"),
    "unsaved": (Unsaved, 32, "changes count, a buffer that no checkpoint holds"),
    "changed by evaluation": (ChangedByEvaluation, 32, "changes its buffers in evaluation"),
    "one size": (OneSize, 24, "fails on 4 images of 24 pixels: AssertionError: this network takes images of 32"),
    "not exported": (NotExported, 32, "cannot be exported to opset 20"),
    "drawn by the clock": (DrawnByTheClock, 32, "other weights each time that it is built"),
    "fails": (fail, 32, "cannot be built for 10 classes and images of 32 pixels: ValueError: not for 10 classes"),
    "no network": (lambda num_classes: 7, 32, "returns int; it must return an nn.Module"),
}


def test_a_good_network_passes() -> None:
    check_network(Good)
    check_network(Good, image_size=24, num_classes=2)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_network_fails_with_its_reason(name: str) -> None:
    build, image_size, reason = BAD[name]
    with pytest.raises(AssertionError, match=f"^the network .*{reason}"):
        check_network(build, image_size=image_size)  # type: ignore[arg-type]  # some give no network
