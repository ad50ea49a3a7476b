"""The optimizer and its schedule."""

from __future__ import annotations

import torch
from torch import nn

from image_classifier.config import TrainingSettings


def build_optimizer(classifier: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Build SGD over all parameters; weight decay spares biases and normalisation, which have one dimension."""
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        fused=True,
    )


def compute_learning_rate(settings: TrainingSettings, step: int, num_steps: int) -> float:
    """Compute the learning rate of a step, counted from 0."""
    if settings.schedule == "constant":
        return settings.learning_rate
    peak = settings.warmup_fraction * num_steps
    if step < peak:
        return settings.learning_rate * (step + 1) / (peak + 1)
    return settings.learning_rate * (num_steps - step) / max(num_steps - peak, 1)
