"""Conformance tests for optimizers: the checks at the start of a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from image_classifier import conformance
from image_classifier.errors import ImageClassifierError
from image_classifier.settings import TrainingSettings


def check_optimizer(build: Callable[..., torch.optim.Optimizer], settings: TrainingSettings | None = None) -> None:
    """Check that an optimizer follows the schedule, and can be resumed and verified.

    Args:
        build: what `--optimizer` would name: `build(parameters, settings)`.
        settings: those that it gets; by default those of recipe `fast`.

    Raises:
        AssertionError: the optimizer fails; the message says in what.
    """
    try:
        conformance.check_optimizer(build, settings or TrainingSettings(model="resnet", optimizer="optimizer:build"))
    except ImageClassifierError as error:
        raise AssertionError(str(error)) from error
