"""Shards: one batch, whatever computes its parts."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from image_classifier.model.catalog import build_classifier
from image_classifier.settings import TrainingSettings
from image_classifier.training.engine import build_engine
from image_classifier.training.ranks import Ranks
from image_classifier.training.shards import Engine, Shard, ShardResult, Shards, share_parameters
from image_classifier.training.threads import Threads
from image_classifier.training.tree import Node
from tests.tiny import make_training

SETTINGS = make_training(device="cpu", precision="fp32", engine="eager", model="airbench_small", batch_size=24)
IMAGES = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 10
TARGETS = torch.rand(24, 10, generator=torch.Generator().manual_seed(1))


def build(model: str = "airbench_small") -> nn.Module:
    return build_classifier(model, 10, input_mean=(0.5,) * 3, input_std=(0.2,) * 3, seed=0).train()


def compute(settings: TrainingSettings, threads: Threads, count: int, ranks: Ranks | None = None) -> list[Tensor]:
    """Compute the gradients of a batch; return the loss, hits, gradients and buffers."""
    classifier = copy.deepcopy(CLASSIFIER)
    targets = TARGETS[:count] if settings.has_targets else None
    engine = build_engine(classifier, settings, threads, ranks)
    loss, num_correct = engine(IMAGES[:count], LABELS[:count], 16, targets)
    gradients = [parameter.grad for parameter in classifier.parameters() if parameter.grad is not None]
    return [loss, num_correct, *gradients, *classifier.buffers()]


CLASSIFIER = build()  # whose weights threads cannot draw side by side


class Group:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.known: list[dict[Node, Any]] = [{} for _ in range(size)]


class ThreadRanks(Ranks):
    def __init__(self, group: Group, rank: int) -> None:
        super().__init__()
        self.rank, self.size, self._group = rank, group.size, group

    def exchange(self, mine: Any, nodes: Any, like: Any) -> dict[Node, Any]:
        self._group.known[self.rank] = dict(mine)
        self._group.barrier.wait(60)
        for values in mine.values():
            assert [value.shape for value in values] == [each.shape for each in like]
        assert [sorted(known) for known in self._group.known] == [sorted(each) for each in nodes]
        return {node: values for known in self._group.known for node, values in known.items()}


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize(
    ("shards", "count", "mixup"), [(1, 24, 0), (3, 24, 0), (5, 24, 0), (8, 24, 0), (8, 7, 0), (5, 24, 1), (8, 7, 1)]
)
def test_threads_and_ranks_change_no_bit(engine: Any, shards: int, count: int, mixup: float) -> None:
    settings = replace(SETTINGS, engine=engine, shards=shards, batch_size=24, mixup=mixup)
    expected = compute(settings, Threads(1), count)
    for num_threads in (2, 3, 8):
        for one, other in zip(expected, compute(settings, Threads(num_threads), count), strict=True):
            assert torch.equal(one, other)
    for size in (2, 3, 4, 9):
        group = Group(size)
        ranks = [ThreadRanks(group, rank) for rank in range(size)]
        found = list(Threads(size).map(partial(compute, settings, Threads(1), count), ranks))
        for values in found:
            for one, other in zip(expected, values, strict=True):
                assert torch.equal(one, other)


def test_gradients_and_loss_are_those_of_the_whole_batch_where_nothing_is_normalised() -> None:
    settings = replace(SETTINGS, model="lenet", optimizer="sgd")
    classifiers = []
    for shards in (1, 5):
        classifier = build("lenet")
        engine = build_engine(classifier, replace(settings, shards=shards), Threads(2))
        classifiers.append(([*engine(IMAGES, LABELS, 32)], list(classifier.parameters())))
    (whole, whole_parameters), (parts, parameters) = classifiers
    assert torch.allclose(whole[0], parts[0], rtol=1e-6) and torch.equal(whole[1], parts[1])
    for one, other in zip(whole_parameters, parameters, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-7)


class Counting(nn.Module):
    """Normalises, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=0.25)
        self.register_buffer("constant", torch.tensor([0.1, 0.7]))

    def forward(self, images: Tensor) -> Tensor:
        normalised: Tensor = self.norm(images)
        return normalised


class Plain(Engine):
    def __init__(self, replicas: list[nn.Module]) -> None:
        self._replicas = replicas

    def prepare(self, shards: Any, threads: Threads) -> None:
        pass

    def compute(self, replica: int, shard: Shard) -> ShardResult:
        loss = self._replicas[replica](shard.images).square().mean()
        parameters = list(self._replicas[replica].parameters())
        return loss.detach(), (shard.labels > 0).sum(), torch.autograd.grad(loss * shard.part, parameters)


def test_batch_norm_is_over_a_shard_and_its_statistics_are_averaged() -> None:
    classifier = nn.Sequential(Counting())
    replicas = [share_parameters(classifier) for _ in range(3)]
    shards = Shards(classifier, replicas, Plain(replicas), 9, Threads(2), Ranks())
    images = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))  # of 3, 3 and 2
    _, num_correct = shards(images, torch.ones(8), 32)
    parts = torch.split(images, 3)
    mean = sum(len(part) / 8 * part.mean(dim=0) for part in parts)
    variance = sum(len(part) / 8 * part.var(dim=0) for part in parts)
    state = classifier.state_dict()
    assert torch.allclose(state["0.norm.running_mean"], 0.25 * torch.as_tensor(mean), atol=1e-6)
    assert torch.allclose(state["0.norm.running_var"], 0.75 + 0.25 * torch.as_tensor(variance), atol=1e-6)
    assert state["0.norm.num_batches_tracked"] == 1 and num_correct == 8
    assert torch.equal(state["0.constant"], torch.tensor([0.1, 0.7]))  # which an average would have rounded
