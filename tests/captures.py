"""Captures of images and answers, written as a server writes them."""

from __future__ import annotations

import marshal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from image_classifier.capture.files import CaptureFacts, FileMemory, Row, build_batch, build_file, build_schema
from image_classifier.capture.places import LocalPlace
from image_classifier.capture.ring import Message
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.published.folder import MODEL, read_manifest
from image_classifier.published.predictor import PublishedModel, load_predictor

START = datetime(2026, 11, 30, 12, tzinfo=UTC)
HOUR_US = 3600 * 10**6


SERVED = PublishedModel(Path("model.onnx"), ("a", "b"), "1", "e", "r", "0" * 64, "one", 1, digest="d" * 64)
MESSAGE_FACTS = CaptureFacts(32, ("a", "b"), "d" * 64, "a machine")
MESSAGE_BYTES = 10_000


class CapturedImage(NamedTuple):
    """One answered image.

    Attributes:
        time_us: microseconds since the epoch.
        pixels: uint8 [S, S, 3] as bytes.
        probabilities: float32 values [K].
    """

    time_us: int
    request_id: str
    image_index: int
    caller: str | None
    model_version: str
    batch_size: int
    pixels: bytes
    probabilities: Sequence[float]


def build_part(images: Sequence[CapturedImage], facts: CaptureFacts) -> Any:
    """Build the record batch of images."""
    rows = [(*image[:-2], image.probabilities) for image in images]
    return build_batch(rows, b"".join(image.pixels for image in images), build_schema(facts))


def build_capture(facts: CaptureFacts, *parts: Sequence[CapturedImage]) -> tuple[str, bytes]:
    """Build a file of images of one hour, which came in parts: its path from the place on, and its content."""
    path, content = build_file([build_part(part, facts) for part in parts], build_schema(facts), FileMemory())
    return path, bytes(content)


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
    rows = _iterate_rows(images, probabilities, version, start, every)
    for _, hour in groupby(rows, lambda row: row.time_us // HOUR_US):
        LocalPlace(folder).write(*build_capture(facts, list(hour)))
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


@dataclass
class Answer:
    """An image with its answer, as the server records it."""

    pixels: bytes | None
    row: list[float]
    batch_size: int = 1


def draw_answers(number: int, seed: int = 0) -> list[Answer]:
    """Draw images and the probabilities of two classes."""
    generator = np.random.default_rng(seed)
    pixels = [generator.integers(0, 256, 3072, np.uint8).tobytes() for _ in range(number)]
    return [Answer(each, generator.random(2, np.float32).tolist(), row + 1) for row, each in enumerate(pixels)]


def build_message(*rows: Row, facts: CaptureFacts = MESSAGE_FACTS, missing: int = 0) -> Message:
    """Build what the server hands to the writer: images of noise, short of so many bytes."""
    pixels = np.random.default_rng(0).bytes(3072 * len(rows) - missing)
    values = facts.image_size, facts.classes, facts.model_digest, facts.machine
    return Message(memoryview(pixels), memoryview(marshal.dumps((values, list(rows)), 2)), MESSAGE_BYTES)


def build_row(name: str = "one", time_us: int = 0, probabilities: tuple[float, ...] = (0.25, 0.75)) -> Row:
    """Build the row of an image."""
    return (time_us, name, 0, None, "1", 1, probabilities)
