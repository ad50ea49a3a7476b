"""The optimizer against its formula, and the schedule against its picture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from image_classifier.config import TrainingSettings
from image_classifier.training.optimizer import build_optimizer, compute_learning_rate


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_that_of_sgd_with_decay_on_weights_only(nesterov: bool) -> None:
    layer = nn.Linear(3, 2)
    settings = TrainingSettings(learning_rate=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    optimizer = build_optimizer(layer, settings)
    expected = {name: parameter.detach().double().clone() for name, parameter in layer.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in expected.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double() + (0.01 * expected[name] if name == "weight" else 0)
            velocity[name] = 0.9 * velocity[name] + gradient
            expected[name] = expected[name] - 0.1 * (gradient + 0.9 * velocity[name] if nesterov else velocity[name])
        optimizer.step()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(parameter.double(), expected[name], atol=1e-6)


def test_a_constant_schedule_is_constant() -> None:
    settings = TrainingSettings(schedule="constant", learning_rate=0.5)
    assert {compute_learning_rate(settings, step, 100) for step in range(100)} == {0.5}


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.25, 0.9])
def test_a_triangular_schedule_rises_once_falls_once_and_stays_positive(num_steps: int, warmup_fraction: float) -> None:
    settings = TrainingSettings(schedule="triangular", learning_rate=0.5, warmup_fraction=warmup_fraction)
    rates = [compute_learning_rate(settings, step, num_steps) for step in range(num_steps)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < min(rates) and max(rates) <= 0.5
    assert peak == pytest.approx(warmup_fraction * num_steps, abs=1)
