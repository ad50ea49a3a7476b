"""Metrics of predictions, for strict JSON. Without torch, so that published models use the same code.

The tests compare the rates with torchmetrics, which needs torch and takes 2 s to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.errors import DataError

NUM_CALIBRATION_BINS = 15
"""As in Guo et al., On Calibration of Modern Neural Networks, 2017."""

MIN_TOP5_CLASSES = 6
"""Smallest number of classes for which top-5 accuracy is shown: with five it is always 100 %."""

_RATES = ("precision", "recall", "f1")


def build_evaluation(
    probabilities: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    *,
    views: str,
    single_view: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """Build the content of `evaluation.json`.

    `accuracy` and all other metrics use test-time augmentation; `accuracy_single_view` does not.

    Args:
        probabilities: float32 [N, C], with test-time augmentation.
        labels: int64 [N].
        views: kind of test-time augmentation.
        single_view: probabilities without test-time augmentation, float32 [N, C]; None if unknown.

    Raises:
        DataError: there are no images.
    """
    if not len(labels):
        raise DataError("there are no images to evaluate on: the test set is empty; choose a data set that has one")
    return {
        "format_version": 1,
        "num_images": len(labels),
        "views": views,
        "accuracy_single_view": (
            None if single_view is None else to_float((single_view.argmax(axis=1) == labels).mean())
        ),
        **compute_metrics(probabilities, labels, classes),
    }


# Over 50 lines: half of it is the docstring.
def compute_metrics(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str]
) -> dict[str, Any]:
    """Compute the metrics of predictions.

    A class's accuracy is its recall. Metrics that are undefined for a class without images are None, and macro averages
    omit the class. A class that has images but is never predicted has precision 0 by convention.

    Args:
        probabilities: float32 [N, C], N at least 1.
        labels: int64 [N].
        classes: the names of the C classes.

    Returns:
        `loss` (cross entropy in nats), `accuracy`, `top5_accuracy` (of min(5, C)), `per_class` (by name: accuracy,
        precision, recall, f1, support), `macro`, `micro`, `weighted` (precision, recall, f1), `confusion_matrix`
        (rows true, columns predicted) and `expected_calibration_error` (15 equal bins); rates are fractions.
    """
    num_classes, num_images = len(classes), len(labels)
    scores = np.clip(probabilities.astype(np.float64), 0, 1)  # a sum of floats can be 1 + 1e-7
    rows, predicted = np.arange(num_images), scores.argmax(axis=1)
    pairs = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = pairs.reshape(num_classes, num_classes)
    right, support, num_predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    by_class = {
        "precision": _divide(right, num_predicted),
        "recall": _divide(right, support),
        "f1": _divide(2 * right, support + num_predicted),
    }
    undefined = {"precision": support + num_predicted == 0, "recall": support == 0, "f1": support + num_predicted == 0}
    accuracy = float(right.sum() / num_images)
    likeliest = np.argsort(-scores, axis=1, kind="stable")[:, : min(5, num_classes)]
    # A probability of 0 counts as the smallest normal float32, so that the loss stays finite.
    chosen = np.maximum(scores[rows, labels], np.finfo(np.float32).tiny)
    return {
        "loss": float(0 - np.log(chosen).mean()),  # where all are certain 0, and not -0
        "accuracy": to_float(accuracy),
        "top5_accuracy": to_float((likeliest == labels[:, None]).any(axis=1).mean()),
        "per_class": {
            name: {
                rate: None if undefined[source][index] else to_float(by_class[source][index])
                for rate, source in (("accuracy", "recall"), *zip(_RATES, _RATES, strict=True))
            }
            | {"support": int(support[index])}
            for index, name in enumerate(classes)
        },
        "macro": {rate: to_float(by_class[rate][support > 0].mean()) for rate in _RATES},
        "micro": {rate: to_float(accuracy) for rate in _RATES},
        "weighted": {rate: to_float(by_class[rate] @ support / num_images) for rate in _RATES},
        "confusion_matrix": confusion.tolist(),
        "expected_calibration_error": _compute_calibration_error(scores[rows, predicted], predicted == labels),
    }


def _divide(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)


def _compute_calibration_error(confidence: NDArray[np.float64], is_right: NDArray[np.bool_]) -> float:
    """Compute the mean absolute difference of confidence and accuracy over bins, weighted by images."""
    bins = np.digitize(confidence, np.linspace(0, 1, NUM_CALIBRATION_BINS + 1))
    surplus = np.bincount(bins, weights=confidence - is_right)
    return float(np.abs(surplus).sum() / len(confidence))


def to_float(value: float | np.floating[Any]) -> float:
    """Return the shortest decimal of a float32: 0.8051, not 0.805100023746."""
    return float(str(np.float32(value)))
