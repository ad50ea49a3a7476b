"""Captures of images and answers, written as a server writes them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from image_classifier.capture.files import CapturedImage, CaptureFacts, build_batch, build_file, build_schema
from image_classifier.capture.places import LocalPlace
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.published.folder import MODEL, read_manifest
from image_classifier.published.predictor import load_predictor

START = datetime(2026, 11, 30, 12, tzinfo=UTC)
HOUR_US = 3600 * 10**6


def write_captures(
    folder: Path,
    facts: CaptureFacts,
    images: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    *,
    version: str = "1",
    start: datetime = START,
    every: timedelta = timedelta(seconds=1),
) -> Path:
    """Write a file an hour of images uint8 [N, S, S, 3] and answers float32 [N, C].

    Each is a request of its own, named by its number: `request-0` first.
    """
    schema = build_schema(facts)
    rows = _iterate_rows(images, probabilities, version, start, every)
    for _, hour in groupby(rows, lambda row: row.time_us // HOUR_US):
        path, content = build_file([build_batch(list(hour), schema)], schema)
        LocalPlace(folder).write(path, content)
    return folder


def write_test_set(folder: Path, published: Path, dataset: Path, *, darker: int = 1) -> Snapshot:
    """Write a capture of a test set as a published model answers it, its levels divided; return the data set."""
    predictor, snapshot = load_predictor(published, num_threads=1), load_snapshot(dataset)
    images = np.ascontiguousarray(snapshot.test[0].transpose(0, 2, 3, 1)) // np.uint8(darker)
    digest = read_manifest(published)["files"][MODEL]["sha256"]
    facts = CaptureFacts(predictor.model.image_size, snapshot.classes, digest)
    write_captures(folder, facts, images, predictor.predict(images))
    return snapshot


def _iterate_rows(
    images: NDArray[np.uint8], probabilities: NDArray[np.float32], version: str, start: datetime, every: timedelta
) -> Iterator[CapturedImage]:
    for number, (image, row) in enumerate(zip(images, probabilities, strict=True)):
        time_us = round((start + number * every).timestamp() * 1e6)
        yield CapturedImage(time_us, f"request-{number}", 0, None, version, 1, image.tobytes(), row.tolist())
