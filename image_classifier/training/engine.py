"""How a step's gradients are computed: operation by operation, or compiled into one graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from image_classifier.config import TrainingSettings

ComputeGradients = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Leaves gradients in the parameters; images [B, 3, 32, 32] uint8, labels [B] int64 and the side in pixels to scale to,
to the mean loss float32 [] and the number of images classified rightly int64 []."""


def build_engine(classifier: nn.Module, settings: TrainingSettings) -> ComputeGradients:
    """Build what computes the gradients of a batch, with the settings' resolved engine and precision.

    A compiled one has forward and backward pass in one graph, which autograd knows nothing of: at four images a step,
    autograd's own work takes longer than the arithmetic. An epoch's smaller last batch is computed eagerly; it would be
    a compilation of its own. What was compiled is kept in the user's cache, where the next run finds it.
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
        return compute_eagerly

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
