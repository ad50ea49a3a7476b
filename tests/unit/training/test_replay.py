"""Repeated steps: the bits of steps that were computed with autograd, or no repetition at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from image_classifier.config import ModelName, Precision, TrainingSettings
from image_classifier.model.catalog import NETWORKS, build_classifier
from image_classifier.training.engine import Repeater, build_engine
from image_classifier.training.optimizer import build_optimizer
from image_classifier.training.replay import Recorder
from tests.conftest import require_program

FOREIGN = torch.ones(10)
SETTINGS = TrainingSettings(device="cpu", engine="eager", learning_rate=0.01, label_smoothing=0.1, batch_size=8)


def train(settings: TrainingSettings, limit: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Take steps of two batch sizes and two image sizes; return what they gave and the state at their end."""
    monkeypatch.setattr("image_classifier.training.engine.SMALL_BATCH", limit)
    classifier = build_classifier(settings.model, 10, input_mean=(0.5,) * 3, input_std=(0.2,) * 3, seed=0).train()
    compute_gradients, optimizer = build_engine(classifier, settings), build_optimizer(classifier, settings)
    assert isinstance(compute_gradients, Repeater) == (limit > 0)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    generator = torch.Generator().manual_seed(0)
    given: list[Tensor] = []
    for number in range(12):
        count, size = (3 if number % 3 == 2 else 8), (32 if number < 6 or settings.model == "lenet" else 24)
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (count,), generator=generator)
        given += compute_gradients(images, labels, size)
        optimizer.step()
    if isinstance(compute_gradients, Repeater):
        assert len(compute_gradients.replays) == (2 if settings.model == "lenet" else 4)
        assert all(compute_gradients.replays.values()), "a step that was to be repeated was not"
    return [*given, *classifier.state_dict().values()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", NETWORKS)
def test_repeated_steps_have_the_same_bits(
    model: ModelName, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(
        SETTINGS, model=model, precision=precision, optimizer="muon" if model.startswith("airbench") else "sgd"
    )
    expected, found = (train(settings, limit, monkeypatch) for limit in (0, 64))
    assert len(expected) == len(found) > 20
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize(("model", "smoothing", "count"), [("lenet", 0.0, 64), *((name, 0.1, 8) for name in NETWORKS)])
def test_kernels_give_what_torch_gives_and_the_same_bits_each_time(
    model: ModelName, smoothing: float, count: int
) -> None:
    require_program("gcc")
    settings = replace(
        SETTINGS, model=model, precision="fp32", label_smoothing=smoothing, optimizer="sgd", batch_size=count
    )
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(count) % 10)
        for _ in "12"
    ]
    given: dict[str, list[Tensor]] = {}
    for name, engine in (("eager", "eager"), ("compiled", "compiled"), ("again", "compiled")):
        classifier = build_classifier(model, 10, input_mean=(0.5,) * 3, input_std=(0.2,) * 3, seed=0).train()
        compute_gradients = build_engine(classifier, replace(settings, engine=engine))  # type: ignore[arg-type]
        given[name] = []
        for images, labels in [*batches, *batches] if name != "again" else batches[1:]:
            given[name] += compute_gradients(images, labels, 32)
            given[name] += [p.grad.clone() for p in classifier.parameters() if p.grad is not None]
    for one, other in zip(given["eager"], given["compiled"], strict=True):
        assert float((one - other).float().norm()) <= 1e-3 * float(one.float().norm())
    half = len(given["again"])
    for index, one in enumerate(given["again"]):  # at first or repeated: nothing but time may differ
        assert torch.equal(one, given["compiled"][half + index]) and torch.equal(
            one, given["compiled"][3 * half + index]
        )


@pytest.mark.parametrize(
    ("network", "obstacle"),
    [
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10)), "is not the same each time"),
        (lambda images: images.flatten(1)[:, :10] * float(images.max()), "is not the same each time"),
        (lambda images: images.flatten(1)[:, :10] + FOREIGN, "a tensor came from somewhere else"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), ""),
        (lambda images: torch.cat([images.split(2)[0], images]).max(dim=0).values, ""),
    ],
    ids=["dropout", "a number that is read", "a tensor from outside", "none", "none, with lists"],
)
def test_what_is_not_the_same_each_time_is_not_repeated(network: Callable[[Tensor], Tensor], obstacle: str) -> None:
    state = [*network.parameters()] if isinstance(network, nn.Module) else []
    images = torch.rand(2, 3, 32, 32)
    with Recorder([images, *state]) as recorder:
        logits = network(images)
    replay = recorder.build_replay([logits])
    assert recorder.obstacle.endswith(obstacle) and (replay is None) == bool(obstacle)
    if replay is not None:
        others = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            (repeated,) = replay(others, *state)
        assert repeated is not None and torch.equal(repeated, network(others))


def test_a_step_that_cannot_be_repeated_is_computed_each_time() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10))
    calls = []

    def compute(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        calls.append(size)
        loss = network(images.float()).sum()
        loss.backward()
        return loss.detach(), labels.sum()

    repeater = Repeater(compute, network)
    for _ in range(3):
        repeater(torch.ones(2, 3, 32, 32), torch.ones(2), 32)
    assert calls == [32, 32, 32]


def test_writing_down_does_not_import_the_compiler() -> None:
    program = (
        "import sys, torch\nfrom image_classifier.training.replay import Recorder\nx = torch.ones(2)\n"
        "with Recorder([x]) as recorder:\n    y = x + 1\n"
        "assert recorder.build_replay([y])(x)[0].tolist() == [2, 2]\nassert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_gradient_that_is_a_parameter_or_another_gradient_is_a_copy_of_it() -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    scale = torch.tensor(2.0)
    with Recorder([scale, *parameters]) as recorder:
        loss = (parameters[0] + parameters[1]).sum() * scale + (parameters[2] * parameters[0]).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
    replay = recorder.build_replay([loss, *(parameter.grad for parameter in parameters)])
    assert replay is not None
    with torch.no_grad():
        results = [result for result in replay(torch.tensor(3.0), *parameters) if result is not None]
    assert [result.tolist() for result in results] == [21.0, [4.0] * 3, [3.0] * 3, [1.0] * 3]
    memories = [tensor.untyped_storage().data_ptr() for tensor in (*results, *parameters)]
    assert len(set(memories)) == len(memories)
