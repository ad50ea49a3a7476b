"""Faults for `bisect` to find: each makes a run that has a certain name another, from outside the package.

A fault that lasts comes again when the run is trained again, as with a processor that computes otherwise. A transient
one does not, as with a bit that was flipped in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from image_classifier import bisection, experiment, preparation
from image_classifier.data.augment import compute_order
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.tracking.state import TrainingState
from image_classifier.training.loop import Step
from image_classifier.training.optimizer import compute_schedule

Fault = Callable[[pytest.MonkeyPatch], None]


def flip_bit(tensor: Tensor, position: int, bit: int) -> None:
    """Flip a bit of a float32, by its position in row-major order."""
    flat = tensor.detach().clone().contiguous().reshape(-1)
    flat.view(torch.int32)[position] ^= 1 << bit
    tensor.detach().copy_(flat.reshape(tensor.shape))


def after_step(number: int, change: Callable[[TrainingState], None]) -> Fault:
    """Change the state after a step, before its digest."""

    def install(patch: pytest.MonkeyPatch) -> None:
        record_step = TrainingState.record_step

        def recorded(self: TrainingState, step: Step) -> None:
            record_step(self, step)
            if step.number == number:
                change(self)

        patch.setattr(TrainingState, "record_step", recorded)

    return install


def flip_weight(number: int, name: str, position: int, bit: int) -> Fault:
    """Flip a bit of a weight after a step."""
    return after_step(number, lambda state: flip_bit(state.classifier.get_parameter(name), position, bit))


def flip_momentum(number: int, name: str, position: int, bit: int) -> Fault:
    """Flip a bit of what the optimizer keeps for a weight after a step."""

    def change(state: TrainingState) -> None:
        flip_bit(state.optimizer.state[state.classifier.get_parameter(name)]["momentum_buffer"], position, bit)

    return after_step(number, change)


def swap_images(epoch: int, first: int, second: int) -> Fault:
    """Swap two places in the order of an epoch."""

    def install(patch: pytest.MonkeyPatch) -> None:
        def ordered(seed: int, number: int, num_images: int) -> Any:
            order = compute_order(seed, number, num_images)
            if number == epoch:
                order[[first, second]] = order[[second, first]]
            return order

        patch.setattr("image_classifier.data.loader.compute_order", ordered)

    return install


def change_rate(number: int) -> Fault:
    """Take one step at another learning rate."""

    def install(patch: pytest.MonkeyPatch) -> None:
        def scheduled(settings: TrainingSettings, step: int, num_steps: int) -> float:
            return compute_schedule(settings, step, num_steps) * (1.5 if step == number - 1 else 1)

        patch.setattr("image_classifier.training.loop.compute_schedule", scheduled)

    return install


def change_start(name: str) -> Fault:
    """Begin with a tensor whose values are each the next larger float32."""

    def install(patch: pytest.MonkeyPatch) -> None:
        build = preparation.build_initial_classifier

        def built(*arguments: Any) -> Any:
            classifier = build(*arguments)
            parameter = classifier.get_parameter(name).detach()
            parameter.copy_(torch.from_numpy(np.nextafter(parameter.numpy(), np.float32(np.inf))))
            return classifier

        patch.setattr(experiment, "build_initial_classifier", built)

    return install


@contextmanager
def lasting(run_name: str, fault: Fault) -> Iterator[None]:
    """Let each training of the run of this name have the fault, by `experiment.run` and by `bisect`."""
    train = experiment.run

    def run(settings: RunSettings, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if settings.run_name == run_name:
                fault(patch)
            return train(settings, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "run", run)
        patch.setattr(bisection, "run", run)
        yield


@contextmanager
def transient(fault: Fault) -> Iterator[None]:
    """Let what is trained meanwhile have the fault."""
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        yield
