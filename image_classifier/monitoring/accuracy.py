"""Accuracy of captured predictions over time, from labels that arrive later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from image_classifier.capture.files import Captured
from image_classifier.capture.labels import Labels
from image_classifier.errors import DataError
from image_classifier.extras import load_extra

Period = Literal["hour", "day"]


@dataclass(frozen=True)
class PeriodAccuracy:
    """Accuracy in an hour or a day.

    Attributes:
        start: hour or day in UTC, such as 2026-11-30T12 or 2026-11-30; "all" for the total.
        num_right: number of correct predictions.
        low: lower bound of the 95 % confidence interval (Wilson 1927).
        high: upper bound.
    """

    start: str
    num_images: int
    num_right: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions."""
        return self.num_right / self.num_images


@dataclass(frozen=True)
class Accuracy:
    """Accuracy by period.

    Attributes:
        num_labels: number of labels in the file, including those of images that were not captured.
        total: accuracy of all images.
    """

    num_labels: int
    total: PeriodAccuracy
    periods: tuple[PeriodAccuracy, ...]


def compute_accuracy(labels: Labels, parts: Iterable[Captured], period: Period = "day") -> Accuracy:
    """Compute the accuracy of the captured predictions that have a label.

    Clients may choose request ids: of several images with the same id, the first counts.

    Raises:
        DataError: no captured image has a label.
        SettingsError: SciPy is not installed.
    """
    counts: dict[str, list[int]] = {}
    waiting = dict(labels)
    for part in parts:
        starts = np.datetime_as_string(part.times, "h" if period == "hour" else "D").tolist()
        answers = part.probabilities.argmax(axis=1).tolist()
        keys = zip(part.request_ids, part.image_indices.tolist(), strict=True)
        for start, answer, key in zip(starts, answers, keys, strict=True):
            label = waiting.pop(key, None)
            if label is not None:
                count = counts.setdefault(start, [0, 0])
                count[0] += 1
                count[1] += label == answer
    if not counts:
        raise DataError(
            f"none of the {len(labels):,} labels belongs to a captured image; check request_id and image_index"
        )
    total = [sum(each) for each in zip(*counts.values(), strict=True)]
    return Accuracy(
        num_labels=len(labels),
        total=_describe("all", *total),
        periods=tuple(_describe(start, *counts[start]) for start in sorted(counts)),
    )


def _describe(start: str, num_images: int, num_right: int) -> PeriodAccuracy:
    stats = load_extra("scipy.stats", "drift")
    interval = stats.binomtest(num_right, num_images).proportion_ci(method="wilson")
    return PeriodAccuracy(start, num_images, num_right, float(interval.low), float(interval.high))
