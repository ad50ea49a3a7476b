"""The training loop: a generator that yields the result of each step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from image_classifier.plugins import is_own
from image_classifier.settings import TrainingSettings
from image_classifier.training.average import Average
from image_classifier.training.draws import OF_THE_OPTIMIZER, Draws
from image_classifier.training.engine import build_engine
from image_classifier.training.optimizer import compute_schedule
from image_classifier.training.ranks import Ranks
from image_classifier.training.threads import Threads
from image_classifier.training.watching import Watch


class Batch(Protocol):
    """What a step is taken on."""

    @property
    def images(self) -> Tensor: ...  # [B, 3, S, S] uint8

    @property
    def labels(self) -> Tensor: ...  # [B] int64

    @property
    def targets(self) -> Tensor | None: ...  # [B, C] float32; None where the labels say all


@dataclass(frozen=True)
class Step:
    """What one step did; the tensors stay on the device until somebody wants the number.

    Attributes:
        number: of the step in the run, counted from 1.
        loss: float32 [], the mean over the batch.
        num_correct: int64 [], images classified rightly before the step's update.
        seconds: from the request for the batch to the end of the step.
    """

    number: int
    learning_rate: float
    loss: Tensor
    num_correct: Tensor
    num_images: int
    seconds: float


# Over 50 lines: the training loop reads from top to bottom without a jump.
def train(
    classifier: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    *,
    num_steps: int,
    first_step: int = 0,
    threads: Threads | None = None,
    ranks: Ranks | None = None,
    average: Average[Any] | None = None,
    watch: Watch | None = None,
) -> Iterator[Step]:
    """Train on each batch in turn, yielding after each step; the state is consistent whenever it yields.

    Args:
        classifier: maps uint8 images [B, 3, S, S] and the size to scale them to, to logits [B, C]; changed in place.
            Its `begin_step` takes which part of the run is over, from 0 to 1.
        batches: the batches from first_step on.
        settings: resolved.
        num_steps: length of the whole schedule.
        first_step: how many steps were taken before.
        threads: that compute the shards of each batch; by default as many as this process may use cores.
        ranks: the processes that do so; by default this one alone.
        average: of the weights, which each step moves on.
        watch: shown what each step computes.
    """
    watch = watch or Watch()
    device = torch.device(settings.device)
    classifier.train()
    compute_gradients = build_engine(classifier, settings, threads, ranks, watch)
    is_own_optimizer = is_own("optimizer", settings.optimizer)
    started = time.perf_counter()
    for number, batch in enumerate(batches, start=first_step + 1):
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        targets = None if batch.targets is None else batch.targets.to(device, non_blocking=True)
        schedule = compute_schedule(settings, number - 1, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule

        classifier.begin_step((number - 1) / num_steps)  # type: ignore[operator]  # a method, by the arguments
        size = compute_image_size(settings, number, num_steps)
        inputs = {"images": images, "labels": labels, "targets": targets}
        watch.begin(number, settings.learning_rate * schedule, classifier, inputs)
        loss, num_correct = compute_gradients(images, labels, size, targets, number)
        watch.gradients(classifier, settings.count_shards())
        with nullcontext() if is_own_optimizer else Draws(settings.seed, number, OF_THE_OPTIMIZER, device):
            optimizer.step()
        if average is not None:
            average.update(classifier, number)

        seconds = time.perf_counter() - started
        yield Step(number, settings.learning_rate * schedule, loss, num_correct, len(labels), seconds)
        started = time.perf_counter()


def compute_image_size(settings: TrainingSettings, number: int, num_steps: int) -> int:
    """Compute the side in pixels that a step's images are scaled to, the step counted from 1.

    Training on small images first and large ones last takes fewer operations to the same accuracy (Howard: Training
    Imagenet in 3 hours for $25, 2018).
    """
    return settings.image_sizes[(number - 1) * len(settings.image_sizes) // num_steps]
