"""Labels that arrive later, by request and image: how right the answers were over time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from image_classifier.capture.files import Captured
from image_classifier.errors import DataError
from image_classifier.extras import load_extra
from image_classifier.files import read_file
from image_classifier.text import one_line

Period = Literal["hour", "day"]
COLUMNS = ("request_id", "image_index", "label")
MAX_BYTES = 2**26
"""Some two million labels."""

Labels = dict[tuple[str, int], int]
"""The number of the class by request and image."""


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


def load_labels(path: Path, classes: tuple[str, ...]) -> Labels:
    """Load a CSV file with the columns `request_id`, `image_index` and `label`, the name of a class.

    Raises:
        DataError: it cannot be read, lacks a column, names no class of the model, or two of one image.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    labels: Labels = {}
    try:
        reader = csv.DictReader(io.StringIO(read_file(path, MAX_BYTES).decode("utf-8-sig"), newline=""), strict=True)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"its first line names no column {missing[0]}")
        for row in reader:
            place = f"line {reader.line_num}"
            request_id, index, label = (row[name] for name in COLUMNS)
            if not (request_id and (index or "").isdecimal() and label in numbers):
                raise ValueError(f"{place}: not a request_id, a whole number, and one of the {len(classes)} classes")
            if labels.setdefault((request_id, int(index)), numbers[label]) != numbers[label]:
                raise ValueError(f"{place}: another label for an image that has one")
    except (OSError, ValueError, csv.Error) as error:
        reason = one_line(error)
        raise DataError(f"{path} holds no labels: {reason}; it is CSV with the columns {', '.join(COLUMNS)}") from error
    return labels


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
            f"none of the {len(labels):,} labels is of a captured image; give request_id and image_index of answers "
            "that were captured"
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
