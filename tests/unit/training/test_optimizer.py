"""The optimizers against their formulas, and the schedule against its picture."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from image_classifier.model.catalog import build_classifier
from image_classifier.training.optimizer import (
    BIAS_LEARNING_RATE,
    HEAD_LEARNING_RATE,
    Muon,
    build_optimizer,
    compute_schedule,
    orthogonalize,
)
from tests.conftest import PROJECT, run_program
from tests.tiny import make_training


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_that_of_sgd_with_decay_on_weights_only(nesterov: bool) -> None:
    layer = nn.Linear(3, 2)
    settings = make_training(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    optimizer = build_optimizer(layer, settings)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.1]
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


@pytest.mark.parametrize("shape", [(24, 216), (64, 27), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_made_nearly_orthogonal(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    vectors, values, others = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix.to(dtype)).double()
    assert result.shape == shape
    left = vectors.double().T @ result @ others.double().T  # the singular vectors stay
    assert (left - torch.diag(left.diagonal())).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)
    large = left.diagonal()[values > 0.2 * values.max()]
    assert 0.5 < large.min() and large.max() < 1.3


def test_muon_steps_along_the_orthogonalized_nesterov_gradient_of_filters_of_fixed_norm() -> None:
    convolution = nn.Conv2d(3, 8, 3)
    settings = make_training(
        model="airbench", optimizer="muon", learning_rate=0.1, momentum=0.6, batch_size=10, weight_decay=0.01
    )
    optimizer = build_optimizer(convolution, settings)
    assert isinstance(optimizer, Muon)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] / 2
    assert convolution.bias is not None
    weight, bias = convolution.weight.detach().clone(), convolution.bias.detach().clone()
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in convolution.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradient = convolution.weight.grad
        bias_gradient = convolution.bias.grad
        assert gradient is not None and bias_gradient is not None
        weight_momentum = 0.6 * weight_momentum + gradient
        update = orthogonalize((gradient + 0.6 * weight_momentum).flatten(1)).reshape(weight.shape)
        weight = weight * 8**0.5 / weight.norm() - 0.05 * update
        lr = BIAS_LEARNING_RATE * 10  # the loss is a mean over ten images
        decayed = bias_gradient + 0.01 / lr * bias
        bias_momentum = 0.85 * bias_momentum + decayed
        bias = bias - lr / 2 * (decayed + 0.85 * bias_momentum)
        optimizer.step()
    assert torch.allclose(convolution.weight, weight, atol=1e-5)
    assert torch.allclose(convolution.bias, bias, atol=1e-5)


def test_muon_treats_a_linear_head_as_sgd_does() -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(layer, make_training(model="airbench", optimizer="muon", batch_size=10))
    groups = [group for group in optimizer.param_groups if group["params"]]
    assert [(group["initial_lr"], group["orthogonalize"]) for group in groups] == [(10 * HEAD_LEARNING_RATE, False)]


def test_what_is_not_trained_is_not_optimized() -> None:
    layer = nn.Conv2d(3, 2, 2)
    layer.weight.requires_grad_(False)
    optimizers: tuple[str, ...] = ("sgd", "muon")
    for optimizer in optimizers:
        settings = make_training(model="airbench", optimizer=optimizer)
        groups = build_optimizer(layer, settings).param_groups
        assert [parameter.shape for group in groups for parameter in group["params"]] == [(2,)]


def test_body_and_head_have_rates_of_their_own_and_weight_decay_spares_vectors() -> None:
    classifier = build_classifier("resnet", 4, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=0)
    settings = make_training(learning_rate=0.1, body_learning_rate=0.01, weight_decay=0.5)
    rates = {
        id(parameter): (group["initial_lr"], group["weight_decay"])
        for group in build_optimizer(classifier, settings).param_groups
        for parameter in group["params"]
    }
    head = set(classifier.head.parameters())
    for name, parameter in classifier.named_parameters():
        expected = (0.1 if parameter in head else 0.01, 0.5 if parameter.ndim > 1 else 0.0)
        assert rates[id(parameter)] == expected, name


def test_a_rate_of_the_body_that_is_the_heads_changes_no_bit() -> None:
    results = []
    for rate in (None, 0.1):
        classifier = build_classifier("resnet", 4, input_mean=(0.5,) * 3, input_std=(0.5,) * 3, seed=0)
        optimizer = build_optimizer(classifier, make_training(learning_rate=0.1, body_learning_rate=rate))
        for _ in range(2):
            classifier(torch.arange(3 * 3 * 32 * 32).reshape(3, 3, 32, 32).to(torch.uint8)).sum().backward()
            optimizer.step()
        results.append(classifier.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


STEP = """
import sys
import torch
from torch import nn
from image_classifier.settings import TrainingSettings
from image_classifier.training.optimizer import build_optimizer
layer = nn.Conv2d(3, 2, 2)
optimizer = build_optimizer(layer, TrainingSettings(optimizer=sys.argv[1]))
layer(torch.ones(1, 3, 2, 2)).sum().backward()
before = layer.weight.detach().clone()
optimizer.param_groups[0]["lr"] = 0.1
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
assert not torch.equal(layer.weight, before) and layer.weight.requires_grad and layer.weight.grad is None
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_step_does_not_wait_for_the_compiler_to_be_imported(optimizer: str) -> None:
    assert run_program(sys.executable, "-W", "error", "-c", STEP, optimizer, cwd=PROJECT) == "False\n"


def test_a_constant_schedule_is_constant() -> None:
    settings = make_training(schedule="constant", warmup_fraction=0)
    assert {compute_schedule(settings, step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.25, 0.9])
def test_a_triangular_schedule_rises_once_falls_once_and_stays_positive(num_steps: int, warmup_fraction: float) -> None:
    settings = make_training(schedule="triangular", warmup_fraction=warmup_fraction)
    rates = [compute_schedule(settings, step, num_steps) for step in range(num_steps)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < min(rates) and max(rates) <= 1
    assert peak == pytest.approx(warmup_fraction * num_steps, abs=1)
