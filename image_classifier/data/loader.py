"""Batches of augmented uint8 images, prepared by threads ahead of the training loop.

Batches are prepared in blocks of several, so that with a batch size of 4 the cost of a call is shared by a
thousand steps. Their content is a function of (seed, epoch, position): the number of threads cannot change it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from image_classifier.choices import Sampler
from image_classifier.data.augment import Augmentation, augment_images, compute_order
from image_classifier.data.balance import compute_balanced_order
from image_classifier.data.blocks import compute_windows, count_block_images, read_ahead
from image_classifier.data.mixing import cut_images, find_partners, mix_images

BLOCK_BYTES = 4096 * 3072  # of uint8 a block: little memory, and few calls even at a batch size of 1


@dataclass(frozen=True)
class Batch:
    """The images of one step."""

    images: Tensor  # [B, 3, S, S] uint8
    labels: Tensor  # [B] int64
    targets: Tensor | None = None  # [B, C] float32; None where the labels say all


Block = tuple[int, NDArray[np.int64], NDArray[np.int64]]
"""An epoch, the indices of some of its images, and the numbers by which they are told apart."""


@dataclass(frozen=True)
class Loader:
    """A training set, cut into batches anew each epoch; the last batch may be smaller.

    Attributes:
        images: uint8 [N, 3, S, S], all images of the snapshot.
        labels: int64 [N].
        indices: int64 [M], which of them are trained on.
        targets: float32 [C, C], what an image of each class is trained towards; None for its class alone.
        mixup: alpha of mixup, which needs targets; 0 for none.
        cutmix: alpha of cutmix, likewise.
        shuffle_window: MiB of images that are shuffled with each other; 0 for all. Not with a balanced sampler.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    batch_size: int
    seed: int
    augmentation: Augmentation
    num_workers: int = 1
    sampler: Sampler = "uniform"
    targets: NDArray[np.float32] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    shuffle_window: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.indices) // self.batch_size)

    def iterate(self, num_epochs: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of all epochs in order, from a step (counted from 0) onwards."""
        batch_bytes = self.batch_size * math.prod(self.images.shape[1:])
        batches_per_block = max(1, BLOCK_BYTES // batch_bytes)

        def list_blocks() -> Iterator[Block]:
            for epoch in range(first_step // max(self.steps_per_epoch, 1), num_epochs):
                chosen, numbers, ends = self._order_images(epoch)
                begins, ahead = [0, *ends], 0
                begin = max(first_step - epoch * self.steps_per_epoch, 0) * self.batch_size
                for start in range(begin, len(chosen), batches_per_block * self.batch_size):
                    stop = start + batches_per_block * self.batch_size
                    while ahead < len(ends) and begins[max(ahead - 1, 0)] < stop:  # the window before is begun
                        read_ahead(self.images, chosen[max(start, begins[ahead]) : ends[ahead]])
                        ahead += 1
                    yield epoch, chosen[start:stop], numbers[start:stop]

        for block in _run_ahead(self._prepare, list_blocks(), self.num_workers):
            for start in range(0, len(block.labels), self.batch_size):
                part = slice(start, start + self.batch_size)
                targets = None if block.targets is None else block.targets[part]
                yield Batch(block.images[part], block.labels[part], targets)

    def _order_images(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        """Find the images of an epoch, the numbers that tell them apart in it, both [M], and where windows end."""
        shape = self.images.shape[1:]
        return order_images(self.sampler, self.seed, epoch, self.indices, self.labels, self.shuffle_window, shape)

    def _prepare(self, epoch: int, chosen: NDArray[np.int64], numbers: NDArray[np.int64]) -> Batch:
        """Prepare the images at these indices, which are those of whole batches, as one."""
        images = augment_images(self.images, chosen, self.seed, epoch, self.augmentation, numbers)
        labels = self.labels[chosen]
        targets = None if self.targets is None else self.targets[labels]
        if targets is not None and (alpha := self.mixup or self.cutmix):
            partners = find_partners(len(chosen), self.batch_size)
            mix = mix_images if self.mixup else cut_images
            images, shares = mix(images, partners, numbers, self.seed, epoch, alpha)
            targets = shares[:, None] * targets + (1 - shares)[:, None] * targets[partners]
        soft = None if targets is None else torch.from_numpy(targets)
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), soft)


def order_images(
    sampler: Sampler,
    seed: int,
    epoch: int,
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
    shuffle_window: int = 0,
    shape: Sequence[int] = (),
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Find the images of an epoch in their order, the numbers that tell them apart in it, and where windows end.

    Args:
        indices: int64 [M], which images are trained on.
        labels: int64 [N], of all images; a uniform sampler does not look at them.
        shuffle_window: blocks of a window; 0 shuffles all images.
        shape: of an image, which a window goes by.

    Returns:
        Images and numbers int64 [M]; no ends without windows.
    """
    if shuffle_window:
        windows = compute_windows(seed, epoch, indices, count_block_images(shape), shuffle_window)
        chosen = indices[np.concatenate(windows)]
        return chosen, chosen, np.cumsum([len(window) for window in windows]).tolist()
    if sampler == "uniform":
        chosen = indices[compute_order(seed, epoch, len(indices))]
        return chosen, chosen, []
    order = compute_balanced_order(seed, epoch, labels[indices])
    times, places = np.divmod(order, len(indices))
    chosen = indices[places]
    return chosen, chosen + times * len(labels), []


def _run_ahead(
    prepare: Callable[[int, NDArray[np.int64], NDArray[np.int64]], Batch], blocks: Iterator[Block], num_workers: int
) -> Iterator[Batch]:
    """Yield the prepared blocks in order, up to num_workers + 1 of them ahead of their use."""
    if num_workers == 0:
        yield from (prepare(*block) for block in blocks)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader")
    try:
        pending: deque[Future[Batch]] = deque()
        for block in blocks:
            pending.append(pool.submit(prepare, *block))
            if len(pending) > num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
