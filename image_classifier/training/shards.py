"""Shards: the parts of a batch that a step computes.

A batch is cut into a fixed number of parts. Each is computed by itself, by one thread, and what the parts give is added
in one binary tree over their numbers. So neither the number of threads or processes nor their speed can change a bit.

Batch norm is over each shard alone, which needs no exchange within a step (ghost batch norm; Hoffer, Hubara, Soudry:
Train longer, generalize better, 2017).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from image_classifier.training.ranks import Ranks
from image_classifier.training.threads import Threads
from image_classifier.training.tree import compute_node, find_nodes, find_root

ShardResult = tuple[Tensor, Tensor, Sequence[Tensor | None]]
"""The mean loss float32 [], the number of images classified rightly int64 [], and the shard's part of the gradient of
each parameter; None for one that is not trained."""


@dataclass(frozen=True)
class Shard:
    """A part of a batch.

    Attributes:
        images: uint8 [B, 3, S, S].
        labels: int64 [B].
        size: side in pixels that the images are scaled to.
        part: of the whole batch.
        targets: what each image is trained towards, float32 [B, C]; None for its label alone.
        step: of the run, counted from 1; with number, the shard's in its batch, it decides what is drawn.
    """

    images: Tensor
    labels: Tensor
    size: int
    part: float
    targets: Tensor | None = None
    step: int = 0
    number: int = 0


class Engine(Protocol):
    """Computes shards, each with a copy of the network that has parameters in common with the others."""

    def prepare(self, shards: Sequence[Shard], threads: Threads) -> None:
        """Compute what the shards of a step have in common."""

    def compute(self, replica: int, shard: Shard) -> ShardResult:
        """Compute a shard with the copy of this number; several threads do so at a time, each with another copy."""
        ...


class Shards:
    """Computes the gradients of a batch, shard by shard.

    Args:
        classifier: what is trained.
        replicas: of it, which share its parameters and have buffers of their own; as many as a batch of `batch_size`
            images has shards, a smaller one has fewer of the same size.
        ranks: the processes that compute a part of the shards each.
    """

    def __init__(
        self,
        classifier: nn.Module,
        replicas: Sequence[nn.Module],
        engine: Engine,
        batch_size: int,
        threads: Threads,
        ranks: Ranks,
    ) -> None:
        self._parameters = list(classifier.parameters())
        self._buffers = _sort(list_buffers(classifier))
        self._own_buffers = [[_flatten(each) for each in _sort(list_buffers(replica))] for replica in replicas]
        self._engine = engine
        self._shard_size = -(-batch_size // len(replicas))
        self._threads = threads
        self._ranks = ranks

    def __call__(
        self, images: Tensor, labels: Tensor, size: int, targets: Tensor | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Leave the gradients in the parameters; return the mean loss float32 [] and the number of images classified
        rightly int64 [].

        Args:
            images: uint8 [B, 3, S, S].
            labels: int64 [B].
            size: side in pixels to scale to.
            targets: float32 [B, C], instead of the labels.
            step: of the run, counted from 1.
        """
        starts = range(0, len(images), self._shard_size)
        parts = [slice(start, start + self._shard_size) for start in starts]
        shards = [
            Shard(
                images[part],
                labels[part],
                size,
                len(labels[part]) / len(labels),
                None if targets is None else targets[part],
                step,
                number,
            )
            for number, part in enumerate(parts)
        ]
        ends = [rank * len(shards) // self._ranks.size for rank in range(self._ranks.size + 1)]
        mine = shards[ends[self._ranks.rank] : ends[self._ranks.rank + 1]]
        buffers = [torch.cat([each.reshape(-1) for each in several]) for several in self._buffers]
        self._engine.prepare(mine, self._threads)
        values = list(self._threads.map(lambda number: self._compute(number, mine[number], buffers), range(len(mine))))
        loss, num_correct, *others = self._add(values, ends, buffers)
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        for parameter in self._parameters:
            parameter.grad = None
        for parameter, gradient in zip(trained, others, strict=False):
            parameter.grad = gradient
        for several, before, change in zip(self._buffers, buffers, others[len(trained) :], strict=True):
            with self._threads.arithmetic():
                after = before + change if before.is_floating_point() else change
            for buffer, part in zip(several, torch.split(after, [each.numel() for each in several]), strict=True):
                buffer.copy_(part.view_as(buffer))
        return loss, num_correct

    def _compute(self, number: int, shard: Shard, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Compute what is added up over shards: loss, hits, gradients, and how the buffers change."""
        mine = self._own_buffers[number]
        for buffer, own in zip(buffers, mine, strict=True):
            own.copy_(buffer)
        loss, num_correct, gradients = self._engine.compute(number, shard)
        changes = []
        if mine or shard.part < 1:
            with self._threads.arithmetic():
                changes = [
                    (own - buffer) * shard.part if own.is_floating_point() else own.clone()
                    for buffer, own in zip(buffers, mine, strict=True)
                ]
                loss = loss * shard.part if shard.part < 1 else loss
        return [loss, num_correct, *(each for each in gradients if each is not None), *changes]

    def _add(
        self, values: Sequence[Sequence[Tensor]], ends: Sequence[int], buffers: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Add each number over all shards of all ranks.

        Args:
            values: of this rank's shards.
            ends: the first shard of each rank, and their number.
        """
        num_shards, rank = ends[-1], self._ranks.rank
        if num_shards == self._ranks.size == 1:
            return values[0]
        nodes = [find_nodes(begin, end, num_shards) for begin, end in pairwise(ends)]
        like = [torch.empty(()), torch.empty((), dtype=torch.int64)]
        like += [parameter.detach() for parameter in self._parameters if parameter.requires_grad]
        adds = [torch.add] * len(like) + [torch.add if buffer.is_floating_point() else take_first for buffer in buffers]
        like += buffers

        def add_mine(position: int) -> list[Tensor]:
            known = {(0, ends[rank] + number): each[position] for number, each in enumerate(values)}
            with self._threads.arithmetic():
                return [compute_node(node, known, num_shards, adds[position]) for node in nodes[rank]]

        sums = list(self._threads.map(add_mine, range(len(like))))
        mine = {node: [each[number] for each in sums] for number, node in enumerate(nodes[rank])}
        everybodys = self._ranks.exchange(mine, nodes, like)

        def add_all(position: int) -> Tensor:
            known = {node: each[position] for node, each in everybodys.items()}
            with self._threads.arithmetic():
                return compute_node(find_root(num_shards), known, num_shards, adds[position])

        return list(self._threads.map(add_all, range(len(like))))


def take_first(one: Tensor, other: Tensor) -> Tensor:
    """Take the place of a sum of what is the same in each shard."""
    return one


def list_buffers(classifier: nn.Module) -> list[Tensor]:
    """List the buffers that may change: neither the classifier's own nor a frozen body's, which are constants."""
    parts = (module for child in classifier.children() for module in child.modules() if module.training)
    return [buffer for part in parts for buffer in part.buffers(recurse=False)]


def _sort(buffers: Sequence[Tensor]) -> list[list[Tensor]]:
    """Sort buffers by type."""
    types = dict.fromkeys(buffer.dtype for buffer in buffers)
    return [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in types]


def _flatten(buffers: Sequence[Tensor]) -> Tensor:
    """Lay buffers out one after the other in one tensor, which is returned, so that one operation is for all."""
    flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
    for buffer, part in zip(buffers, torch.split(flat, [each.numel() for each in buffers]), strict=True):
        buffer.data = part.view_as(buffer)
    return flat


def share_parameters(classifier: nn.Module) -> nn.Module:
    """Copy all of a module but its parameters."""
    return copy.deepcopy(classifier, {id(parameter): parameter for parameter in classifier.parameters()})
