"""Repeated steps: the bits of steps that were computed with autograd, or no repetition at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from image_classifier.choices import Precision
from image_classifier.model.catalog import build_classifier
from image_classifier.plugins import NETWORKS
from image_classifier.training.engine import Eager, build_engine
from image_classifier.training.replay import Recorder
from image_classifier.training.shards import Shard
from tests.tiny import make_training

FOREIGN = torch.ones(10)
SETTINGS = make_training(device="cpu", engine="eager", learning_rate=0.01, label_smoothing=0.1, batch_size=8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", NETWORKS)
def test_repeated_steps_have_the_same_bits(model: str, precision: Precision) -> None:
    classifier = build_classifier(model, 10, input_mean=(0.5,) * 3, input_std=(0.2,) * 3, seed=0).train()
    eager = Eager([classifier], replace(SETTINGS, model=model, precision=precision))
    parameters, buffers = list(classifier.parameters()), list(classifier.buffers())
    generator = torch.Generator().manual_seed(0)
    first, second = (
        Shard(
            torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(0, 10, (8,), generator=generator),
            32 if model == "lenet" else 24,
            0.5,
        )
        for _ in "12"
    )
    with Recorder([first.images, first.labels, *parameters, *buffers]) as recorder:
        loss, num_correct, gradients = eager.compute(0, first)
    replay = recorder.build_replay([loss, num_correct, *gradients])
    assert replay is not None, recorder.obstacle
    before = [buffer.clone() for buffer in buffers]
    found = []
    for compute in (
        lambda: eager.compute(0, second),
        lambda: replay(second.images, second.labels, *parameters, *buffers),
    ):
        loss, num_correct, *others = compute()
        with torch.no_grad():
            values = [loss, num_correct, *(others[0] if isinstance(others[0], list) else others), *buffers]
        found.append([value.clone() for value in values if value is not None])
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize(("model", "smoothing", "count"), [("lenet", 0.0, 64), *((name, 0.1, 8) for name in NETWORKS)])
def test_kernels_give_what_torch_gives_and_the_same_bits_each_time(model: str, smoothing: float, count: int) -> None:
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
    tolerance = 1e-2 if model in ("resnet18", "resnet18_imagenet", "wide_resnet_16_4") else 5e-3  # as far from doubles
    for one, other in zip(given["eager"], given["compiled"], strict=True):
        # A sum in another order puts values near 0 on the other side of a ReLU.
        assert float((one - other).float().norm()) <= tolerance * float(one.float().norm())
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


class Moody(nn.Module):
    """Does something else from its second call on, as only Python knows."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        self.head = nn.Linear(3072, 10)

    def forward(self, images: Tensor, size: int) -> Tensor:
        self.num_calls += 1
        logits: Tensor = self.head(images.flatten(1).float() / 255)
        return logits if self.num_calls == 1 else -logits


@pytest.mark.parametrize("batch_size", [8, 100])
def test_a_network_that_python_changes_is_not_repeated_wrongly(
    batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(SETTINGS, precision="fp32", engine="compiled", batch_size=batch_size)
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(batch_size) % 10
    classifier = Moody()
    compute_gradients = build_engine(classifier, settings)
    losses = [compute_gradients(images, labels, 32)[0] for _ in range(4)]
    with torch.no_grad():
        logits = classifier.head(images.flatten(1).float() / 255)
    for loss, expected in zip(losses, (logits, -logits, -logits, -logits), strict=True):
        wanted = nn.functional.cross_entropy(expected, labels, label_smoothing=0.1)
        assert torch.allclose(loss, wanted, rtol=1e-4)
    assert any("runs different operations at each step" in message for message in caplog.messages)


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
