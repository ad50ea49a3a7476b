"""How a step's gradients are computed: operation by operation, or compiled into one graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from image_classifier.config import TrainingSettings
from image_classifier.training.replay import Recorder, Replay

ComputeGradients = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Leaves gradients in the parameters; images [B, 3, 32, 32] uint8, labels [B] int64 and the side in pixels to scale to,
to the mean loss float32 [] and the number of images classified rightly int64 []."""

SMALL_BATCH = 64
"""Images of a step, up to which its operations are repeated without autograd. More, and autograd's work is lost in the
arithmetic's, while writing the operations down takes the memory of all that they give."""


def build_engine(classifier: nn.Module, settings: TrainingSettings) -> ComputeGradients:
    """Build what computes the gradients of a batch, with the settings' resolved engine and precision.

    An eager one computes operation by operation; where a step is small, the operations of the first one are repeated.
    A compiled one has forward and backward pass in one graph. Autograd knows nothing of either: at four images a step,
    its own work is a good part of a step. An epoch's smaller last batch is not compiled; it would be a
    compilation of its own. What was compiled is kept in the user's cache, where the next run finds it.
    """

    def compute_loss(parameters: dict[str, Tensor], images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = functional_call(classifier, parameters, (images, size)) if parameters else classifier(images, size)
        loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        return loss, (logits.detach().argmax(dim=1) == labels).sum()

    trained = {name: parameter for name, parameter in classifier.named_parameters() if parameter.requires_grad}

    def compute_eagerly(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        for parameter in trained.values():
            parameter.grad = None
        loss, num_correct = compute_loss({}, images, labels, size)
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
        return loss.detach(), num_correct

    if settings.engine != "compiled":
        is_small = settings.device == "cpu" and settings.batch_size <= SMALL_BATCH
        return Repeater(compute_eagerly, classifier) if is_small else compute_eagerly

    compiled = torch.compile(grad_and_value(compute_loss, has_aux=True), fullgraph=True, dynamic=False)
    values = {name: parameter.detach() for name, parameter in trained.items()}

    def compute_compiled(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        if len(labels) < settings.batch_size:
            return compute_eagerly(images, labels, size)
        gradients, (loss, num_correct) = compiled(values, images, labels, size)
        for name, parameter in trained.items():
            parameter.grad = gradients[name]
        return loss, num_correct

    return compute_compiled


class Repeater:
    """Computes gradients as `compute` does, to the bits, after its first time without autograd.

    Args:
        compute: is the same operations whenever the images have the same shape and are scaled to the same size.

    Attributes:
        replays: what repeats the operations, by number of images and size; None where they cannot be.
    """

    def __init__(self, compute: ComputeGradients, classifier: nn.Module) -> None:
        self._compute = compute
        self._trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        self._state = [*classifier.parameters(), *classifier.buffers()]
        self.replays: dict[tuple[int, int], Replay | None] = {}

    def __call__(self, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        shape = len(labels), size
        if shape not in self.replays:
            return self._record(shape, images, labels, size)
        replay = self.replays[shape]
        if replay is None:
            return self._compute(images, labels, size)
        with torch.no_grad():
            loss, num_correct, *gradients = replay(images, labels, *self._state)
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient
        assert loss is not None and num_correct is not None
        return loss, num_correct

    def _record(self, shape: tuple[int, int], images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        with Recorder([images, labels, *self._state]) as recorder:
            loss, num_correct = self._compute(images, labels, size)
        gradients = [parameter.grad for parameter in self._trained]
        self.replays[shape] = recorder.build_replay([loss, num_correct, *gradients])
        return loss, num_correct
