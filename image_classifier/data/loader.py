"""Batches of augmented uint8 images, prepared by threads ahead of the training loop.

Batches are prepared in blocks of several, so that with a batch size of 4 the cost of a call is shared by a
thousand steps. Their content is a function of (seed, epoch, position): the number of threads cannot change it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from image_classifier.data.augment import Augmentation, augment_images, compute_order

BLOCK_BYTES = 4096 * 3072  # of uint8 a block: little memory, and few calls even at a batch size of 1


@dataclass(frozen=True)
class Batch:
    """The images of one step."""

    images: Tensor  # [B, 3, S, S] uint8
    labels: Tensor  # [B] int64


@dataclass(frozen=True)
class Loader:
    """A training set, cut into batches anew each epoch; the last batch may be smaller.

    Attributes:
        images: uint8 [N, 3, S, S], all images of the snapshot.
        labels: int64 [N].
        indices: int64 [M], which of them are trained on.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    batch_size: int
    seed: int
    augmentation: Augmentation
    num_workers: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.indices) // self.batch_size)

    def iterate(self, num_epochs: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of all epochs in order, from a step (counted from 0) onwards."""
        batch_bytes = self.batch_size * math.prod(self.images.shape[1:])
        batches_per_block = max(1, BLOCK_BYTES // batch_bytes)

        def list_blocks() -> Iterator[tuple[int, NDArray[np.int64]]]:
            for epoch in range(first_step // max(self.steps_per_epoch, 1), num_epochs):
                order = self.indices[compute_order(self.seed, epoch, len(self.indices))]
                begin = max(first_step - epoch * self.steps_per_epoch, 0) * self.batch_size
                for start in range(begin, len(order), batches_per_block * self.batch_size):
                    yield epoch, order[start : start + batches_per_block * self.batch_size]

        def prepare(epoch: int, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            images = augment_images(self.images, chosen, self.seed, epoch, self.augmentation)
            return torch.from_numpy(images), torch.from_numpy(self.labels[chosen])

        for images, labels in _run_ahead(prepare, list_blocks(), self.num_workers):
            for start in range(0, len(labels), self.batch_size):
                stop = start + self.batch_size
                yield Batch(images[start:stop], labels[start:stop])


def _run_ahead(
    prepare: Callable[[int, NDArray[np.int64]], tuple[Tensor, Tensor]],
    blocks: Iterator[tuple[int, NDArray[np.int64]]],
    num_workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the prepared blocks in order, up to num_workers + 1 of them ahead of their use."""
    if num_workers == 0:
        yield from (prepare(*block) for block in blocks)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader")
    try:
        pending: deque[Future[tuple[Tensor, Tensor]]] = deque()
        for block in blocks:
            pending.append(pool.submit(prepare, *block))
            if len(pending) > num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
