"""Evaluation: a network's probabilities on a set of images, and the metrics for their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from image_classifier.choices import Views
from image_classifier.errors import ModelError
from image_classifier.image_sizes import scale_batch
from image_classifier.metrics import build_evaluation
from image_classifier.progress import track
from image_classifier.training.ranks import Ranks
from image_classifier.training.threads import Arithmetic, Threads

BATCH_SIZE = 500
"""Images a forward pass, fewer if they are large: a constant, so that an evaluation does not depend on the batch size
of the training."""

SURE = 0.4
"""Six views are averaged for an image only if the two likeliest classes of the first are closer together than this."""

VIEWS: dict[Views, list[tuple[float, bool, int]]] = {  # weight, whether mirrored, shift down and to the right
    "mirror": [(0.5, False, 0), (0.5, True, 0)],
    "six": [
        (weight, mirror, shift) for weight, shift in ((0.25, 0), (0.125, -1), (0.125, 1)) for mirror in (False, True)
    ],
}

_CPU = torch.device("cpu")


def compute_evaluation(
    classifier: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    *,
    views: Views = "one",
    device: torch.device = _CPU,
    threads: Threads | None = None,
    ranks: Ranks | None = None,
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Compute what `evaluation.json` holds, and the probabilities [N, C] that it is computed from.

    Raises:
        DataError: there are no images.
        ModelError: the network's outputs are not finite.
    """
    single_view = compute_probabilities(classifier, images, device=device, threads=threads, ranks=ranks)
    probabilities = _average_views(classifier, images, None, single_view, views, device, None, threads, ranks)
    return build_evaluation(probabilities, labels, classes, views=views, single_view=single_view), probabilities


def compute_probabilities(
    classifier: nn.Module,
    images: NDArray[np.uint8],
    rows: NDArray[np.int64] | None = None,
    *,
    views: Views = "one",
    device: torch.device = _CPU,
    batch_size: int | None = None,
    threads: Threads | None = None,
    ranks: Ranks | None = None,
) -> NDArray[np.float32]:
    """Compute the probability of each class for each image, in fp32 and in evaluation mode.

    Args:
        classifier: on device; maps uint8 images [B, 3, S, S] to logits [B, C]; left in the mode it was in.
        images: uint8 [N, 3, S, S].
        rows: int64 [M], which of the images; None for all.
        views: `mirror` averages the probabilities of the image and of its mirror image along the width; `six` also
            those of both shifted by a pixel to the upper left and the lower right, at half the weight, for images that
            the first view leaves unsure (views of Jordan: 94% on CIFAR-10 in 3.29 Seconds, 2024).
        batch_size: images a forward pass; by default `BATCH_SIZE`, fewer if they are large.

    Returns:
        float32 [N, C], or [M, C].

    Raises:
        ModelError: an output is not finite.
    """
    single_view = _compute_view(classifier, images, rows, False, 0, device, batch_size, threads, ranks)
    return _average_views(classifier, images, rows, single_view, views, device, batch_size, threads, ranks)


def _average_views(
    classifier: nn.Module,
    images: NDArray[np.uint8],
    rows: NDArray[np.int64] | None,
    single_view: NDArray[np.float32],
    views: Views,
    device: torch.device,
    batch_size: int | None,
    threads: Threads | None,
    ranks: Ranks | None,
) -> NDArray[np.float32]:
    if views == "one":
        return single_view
    unsure = np.arange(len(single_view))
    if views == "six":
        ordered = np.sort(single_view, axis=1)  # of one class there is no second
        unsure = np.flatnonzero(ordered[:, -1] - ordered[:, -2:-1].sum(axis=1) < SURE)
    chosen = unsure if rows is None else rows[unsure]
    averaged = sum(
        np.float32(weight)
        * (
            _compute_view(classifier, images, chosen, mirror, shift, device, batch_size, threads, ranks)
            if mirror or shift
            else single_view[unsure]
        )
        for weight, mirror, shift in VIEWS[views]
    )
    probabilities = single_view.copy()
    probabilities[unsure] = averaged
    return probabilities


def _compute_view(
    classifier: nn.Module,
    images: NDArray[np.uint8],
    rows: NDArray[np.int64] | None,
    mirror: bool,
    shift: int,
    device: torch.device,
    batch_size: int | None,
    threads: Threads | None,
    ranks: Ranks | None,
) -> NDArray[np.float32]:
    was_training = classifier.training
    classifier.eval()
    side = max(*images.shape[2:], getattr(classifier, "image_size", 0))  # as they come, or as the network has them
    size = batch_size or scale_batch(BATCH_SIZE, side)
    num_images = len(images) if rows is None else len(rows)
    starts = range(0, max(num_images, 1), size)  # of no images one empty batch, which has a shape

    threads = threads or Threads()

    def compute(start: int) -> NDArray[np.float32]:
        part = slice(start, start + size)
        chosen = images[part if rows is None else rows[part]]
        return _compute_batch(classifier, chosen, mirror, shift, device, threads.arithmetic)

    try:
        with (
            track("evaluating", num_images, "images") as task,
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),  # TF32 is not fp32
        ):
            ranks = ranks or Ranks()
            parts = []
            for part in threads.map(compute, starts[ranks.rank :: ranks.size]):
                parts.append(part)
                task.advance(len(part) * ranks.size)
            everybodys = ranks.gather(parts)
            parts = [everybodys[number % ranks.size][number // ranks.size] for number in range(len(starts))]
    finally:
        classifier.train(was_training)
    return np.concatenate(parts)


def _compute_batch(
    classifier: nn.Module,
    images: NDArray[np.uint8],
    mirror: bool,
    shift: int,
    device: torch.device,
    arithmetic: Arithmetic,
) -> NDArray[np.float32]:
    rows, columns = (np.arange(size) for size in images.shape[2:])
    if shift:  # reflected at the edge, as training images are
        rows, columns = ((len(r) - 1) - np.abs((len(r) - 1) - np.abs(r - shift)) for r in (rows, columns))
    view = images[:, :, rows[:, None], columns[::-1] if mirror else columns]  # a copy, which may be written to
    with torch.no_grad(), torch.autocast(device.type, enabled=False), arithmetic():  # which hold for this thread alone
        logits: Tensor = classifier(torch.from_numpy(view).to(device))
        probabilities = logits.float().softmax(dim=1)
    if not np.isfinite(logits.cpu().numpy()).all():
        raise ModelError(
            "the network's outputs are not finite, because its training diverged; "
            "train again with a lower --learning_rate"
        )
    return probabilities.cpu().numpy()
