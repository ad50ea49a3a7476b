"""The accuracy of captured answers over time, by labels that arrive later."""

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
    """How right the answers of an hour or a day were.

    Attributes:
        start: of the hour or day by UTC, such as 2026-11-30T12 or 2026-11-30.
        low: of the 95 % interval (Wilson 1927).
        high: likewise.
    """

    start: str
    num_images: int
    num_right: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        """The part that is right."""
        return self.num_right / self.num_images


@dataclass(frozen=True)
class Accuracy:
    """How right the answers were.

    Attributes:
        num_labels: in the file; some may be of images that were not captured.
        total: over all times.
    """

    num_labels: int
    total: PeriodAccuracy
    periods: tuple[PeriodAccuracy, ...]


def compute_accuracy(labels: Labels, parts: Iterable[Captured], period: Period = "day") -> Accuracy:
    """Compute how right the captured answers are that have a label.

    Clients may choose the ids of their requests: where one comes again, the first image counts.

    Raises:
        DataError: none of them has.
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
            f"none of the {len(labels):,} labels belongs to a captured image; give request_id and image_index of "
            "captured answers"
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
