"""How a step's gradients are computed: by torch alone, or with kernels of our own where it is slow."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classifier.config import SMALL_BATCH, TrainingSettings
from image_classifier.training.kernels import Run, load_kernels
from image_classifier.training.large_steps import LargeSteps
from image_classifier.training.replay import Recorder, Replay

ComputeGradients = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Leaves gradients in the parameters; images [B, 3, 32, 32] uint8, labels [B] int64 and the side in pixels to scale to,
to the mean loss float32 [] and the number of images classified rightly int64 []."""


def build_engine(classifier: nn.Module, settings: TrainingSettings) -> ComputeGradients:
    """Build what computes the gradients of a batch, with the settings' resolved engine and precision.

    Where a step is small, its operations are written down at the first one and repeated without autograd, whose own
    work is a good part of such a step. Where it is large, autograd's work is lost in the arithmetic's, and writing the
    operations down takes the memory of all that they give. The compiled engine has kernels for some of either's.
    """

    def compute_gradients(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        for parameter in classifier.parameters():
            parameter.grad = None
        with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = classifier(images, size)
        loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        num_correct = (logits.detach().argmax(dim=1) == labels).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
        return loss.detach(), num_correct

    run = load_kernels() if settings.engine == "compiled" else None
    if settings.device == "cpu" and settings.batch_size <= SMALL_BATCH:
        return Repeater(compute_gradients, classifier, run)
    if run is None:
        return compute_gradients
    large_steps = LargeSteps(run, settings.num_threads)

    def compute_with_kernels(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        with large_steps:
            return compute_gradients(images, labels, size)

    return compute_with_kernels


class Repeater:
    """Computes gradients as `compute` does, after its first time without autograd; without kernels, to the bits.

    Args:
        compute: is the same operations whenever the images have the same shape and are scaled to the same size.
        run: what runs kernels, if there are to be any.

    Attributes:
        replays: what repeats the operations, by number of images, size and number of parameters that are trained;
            None where they cannot be.
    """

    def __init__(self, compute: ComputeGradients, classifier: nn.Module, run: Run | None = None) -> None:
        self._run = run
        self._compute = compute
        self._parameters = list(classifier.parameters())
        self._state = [*self._parameters, *classifier.buffers()]
        self.replays: dict[tuple[int, int, int], Replay | None] = {}

    def __call__(self, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        shape = len(labels), size, len(trained)
        if shape not in self.replays:
            return self._record(shape, images, labels, trained)
        replay = self.replays[shape]
        if replay is None:
            return self._compute(images, labels, size)
        with torch.no_grad():
            loss, num_correct, *gradients = replay(images, labels, *self._state)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        assert loss is not None and num_correct is not None
        if self._run is None:
            return loss, num_correct
        return loss.clone(), num_correct.clone()  # the next repetition writes to the same memory

    def _record(
        self, shape: tuple[int, int, int], images: Tensor, labels: Tensor, trained: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor]:
        with Recorder([images, labels, *self._state], self._state, self._run) as recorder:
            loss, num_correct = self._compute(images, labels, shape[1])
        gradients = [parameter.grad for parameter in trained]
        self.replays[shape] = recorder.build_replay([loss, num_correct, *gradients])
        return loss.clone(), num_correct.clone()  # likewise
