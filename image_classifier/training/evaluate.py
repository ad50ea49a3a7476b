"""Evaluation: a network's probabilities on a set of images, and what they are worth against the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from image_classifier.config import Views
from image_classifier.errors import DataError, ModelError

BATCH_SIZE = 500
"""Images a forward pass: a constant, so that an evaluation does not depend on the batch size of the training."""

NUM_CALIBRATION_BINS = 15
"""As in Guo et al.: On Calibration of Modern Neural Networks, 2017."""

SURE = 0.2
"""Six views are averaged for an image only if the two likeliest classes of the first are closer together than this."""

_VIEWS: dict[Views, list[tuple[float, bool, int]]] = {  # weight, whether mirrored, shift down and to the right
    "mirror": [(0.5, False, 0), (0.5, True, 0)],
    "six": [
        (weight, mirror, shift) for weight, shift in ((0.25, 0), (0.125, -1), (0.125, 1)) for mirror in (False, True)
    ],
}

_AVERAGED = {"precision": "precision", "recall": "recall", "f1": "f1_score"}  # our name: torchmetrics'
_CPU = torch.device("cpu")


def compute_evaluation(
    classifier: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    *,
    views: Views = "one",
    device: torch.device = _CPU,
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Compute what `evaluation.json` holds, and the probabilities [N, C] that it is computed from.

    `accuracy` and all other metrics are those of the views; `accuracy_single_view` is that of the images alone.

    Raises:
        DataError: there are no images.
        ModelError: the network's outputs are not finite.
    """
    if not len(images):
        raise DataError("there are no images to evaluate on: the test set is empty; choose a data set that has one")
    single_view = compute_probabilities(classifier, images, device=device)
    probabilities = _average_views(classifier, images, single_view, views, device, BATCH_SIZE)
    evaluation = {
        "format_version": 1,
        "num_images": len(labels),
        "views": views,
        "accuracy_single_view": _to_float((single_view.argmax(axis=1) == labels).mean()),
        **compute_metrics(probabilities, labels, classes),
    }
    return evaluation, probabilities


def compute_probabilities(
    classifier: nn.Module,
    images: NDArray[np.uint8],
    *,
    views: Views = "one",
    device: torch.device = _CPU,
    batch_size: int = BATCH_SIZE,
) -> NDArray[np.float32]:
    """Compute the probability of each class for each image, in fp32 and in evaluation mode.

    Args:
        classifier: on device; maps uint8 images [B, 3, 32, 32] to logits [B, C]; left in the mode it was in.
        images: uint8 [N, 3, 32, 32].
        views: `mirror` averages the probabilities of the image and of its mirror image along the width; `six` also
            those of both shifted by a pixel to the upper left and the lower right, at half the weight, for images that
            the first view leaves unsure (views of Jordan: 94% on CIFAR-10 in 3.29 Seconds, 2024).

    Returns:
        float32 [N, C].

    Raises:
        ModelError: an output is not finite.
    """
    single_view = _compute_view(classifier, images, False, 0, device, batch_size)
    return _average_views(classifier, images, single_view, views, device, batch_size)


def _average_views(
    classifier: nn.Module,
    images: NDArray[np.uint8],
    single_view: NDArray[np.float32],
    views: Views,
    device: torch.device,
    batch_size: int,
) -> NDArray[np.float32]:
    if views == "one":
        return single_view
    rows = np.arange(len(images))
    if views == "six":
        ordered = np.sort(single_view, axis=1)
        rows = np.flatnonzero(ordered[:, -1] - ordered[:, -2:-1].sum(axis=1) < SURE)  # of one class there is no second
    chosen = images[rows]
    averaged = sum(
        np.float32(weight)
        * (
            _compute_view(classifier, chosen, mirror, shift, device, batch_size)
            if mirror or shift
            else single_view[rows]
        )
        for weight, mirror, shift in _VIEWS[views]
    )
    probabilities = single_view.copy()
    probabilities[rows] = averaged
    return probabilities


def _compute_view(
    classifier: nn.Module,
    images: NDArray[np.uint8],
    mirror: bool,
    shift: int,
    device: torch.device,
    batch_size: int,
) -> NDArray[np.float32]:
    was_training = classifier.training
    classifier.eval()
    starts = range(0, max(len(images), 1), batch_size)  # of no images one empty batch, which has a shape
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),  # TF32 is not fp32
        ):
            parts = [_compute_batch(classifier, images[i : i + batch_size], mirror, shift, device) for i in starts]
    finally:
        classifier.train(was_training)
    return np.concatenate(parts)


def _compute_batch(
    classifier: nn.Module, images: NDArray[np.uint8], mirror: bool, shift: int, device: torch.device
) -> NDArray[np.float32]:
    rows, columns = (np.arange(size) for size in images.shape[2:])
    if shift:  # reflected at the edge, as training images are
        rows, columns = ((len(r) - 1) - np.abs((len(r) - 1) - np.abs(r - shift)) for r in (rows, columns))
    view = images[:, :, rows[:, None], columns[::-1] if mirror else columns]  # a copy, which may be written to
    logits: Tensor = classifier(torch.from_numpy(view).to(device))
    if not torch.isfinite(logits).all():
        raise ModelError(
            "the network gives outputs that are not numbers: its training went out of bounds; "
            "train again with a lower --learning_rate"
        )
    return logits.float().softmax(dim=1).cpu().numpy()


def compute_metrics(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str]
) -> dict[str, Any]:
    """Compute the metrics of a test set, ready for strict JSON.

    A class's accuracy is the part of its images that is classified rightly, which is also its recall. Where a class
    has no images, what is then undefined is None, and the macro averages leave the class out. A class with images
    that is never predicted has precision 0 by convention.

    Args:
        probabilities: float32 [N, C], N at least 1.
        labels: int64 [N].
        classes: the names of the C classes.

    Returns:
        `loss` (cross entropy in nats), `accuracy`, `top5_accuracy` (of min(5, C)), `per_class` (by name: accuracy,
        precision, recall, f1, support), `macro`, `micro`, `weighted` (precision, recall, f1), `confusion_matrix`
        (rows true, columns predicted) and `expected_calibration_error` (15 equal bins); rates are fractions.
    """
    # Imported here because it takes 2 s (it imports the metrics of every field), which would delay the first step.
    from torchmetrics.functional import classification

    num_classes = len(classes)
    target = torch.from_numpy(np.array(labels))
    scores = torch.from_numpy(np.array(probabilities, dtype=np.float64))
    # torchmetrics would silently take numbers outside [0, 1] for logits; a sum of floats can be 1 + 1e-7.
    scores = scores.clamp(0, 1)
    predicted = scores.argmax(dim=1)

    def compute(metric: str, average: str) -> Tensor:
        function = getattr(classification, f"multiclass_{metric}")
        value: Tensor = function(predicted, target, num_classes, average=average, validate_args=False)
        return value

    confusion = classification.multiclass_confusion_matrix(predicted, target, num_classes, validate_args=False)
    support = confusion.sum(dim=1)
    never_met = support + confusion.sum(dim=0) == 0  # neither an image of the class nor a prediction of it
    by_class = {
        "accuracy": compute("accuracy", "none").where(support > 0, torch.nan),
        "precision": compute("precision", "none").where(~never_met, torch.nan),
        "recall": compute("recall", "none").where(support > 0, torch.nan),
        "f1": compute("f1_score", "none").where(~never_met, torch.nan),
    }
    averages = {
        average: {name: _to_float(compute(metric, average)) for name, metric in _AVERAGED.items()}
        for average in ("micro", "weighted")
    }
    top_k = min(5, num_classes)
    return {
        # A probability that float32 rounds to 0 counts as the smallest normal one, so that the loss stays finite.
        "loss": float(torch.nn.functional.nll_loss(scores.clamp(min=float(np.finfo(np.float32).tiny)).log(), target)),
        "accuracy": _to_float(compute("accuracy", "micro")),
        "top5_accuracy": _to_float(
            classification.multiclass_accuracy(
                scores, target, num_classes, average="micro", top_k=top_k, validate_args=False
            )
        ),
        "per_class": {
            name: {
                **{metric: _to_float_or_none(values[index]) for metric, values in by_class.items()},
                "support": int(support[index]),
            }
            for index, name in enumerate(classes)
        },
        "macro": {name: _to_float(by_class[name][support > 0].mean()) for name in _AVERAGED},
        **averages,
        "confusion_matrix": confusion.tolist(),
        "expected_calibration_error": float(
            classification.multiclass_calibration_error(
                scores, target, num_classes, n_bins=NUM_CALIBRATION_BINS, validate_args=False
            )
        ),
    }


def _to_float(value: Tensor | np.floating[Any]) -> float:
    """The shortest decimal that names the same float32: torchmetrics divides in float32, and 0.8051 is meant."""
    return float(str(np.float32(value.item())))


def _to_float_or_none(value: Tensor) -> float | None:
    return None if value.isnan() else _to_float(value)
