"""Record what a server answers: it puts images into a queue, from which a thread writes files.

    record ──> queue in memory, bounded ──> record batches ──> a file at least every `flush_s` seconds ──> the place

An answer never waits. What the thread cannot keep up with is dropped; what the place refuses is lost. Both are counted,
and said once in the log.
"""

from __future__ import annotations

import logging
import platform
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from image_classifier.capture.files import CaptureFacts, Row, build_batch, build_file, build_schema
from image_classifier.capture.places import Place
from image_classifier.published.predictor import PublishedModel
from image_classifier.text import one_line

FILE_BYTES = 8 * 2**20
"""Of pixels, which are written without waiting for more."""

HOUR_US = 3_600_000_000
OVERHEAD_BYTES = 1024
"""Memory of an image beside its pixels."""

MEASURE_S = 600.0
MEASURE_FULL_S = 60.0
"""How often a place is measured, and one that is full: others write there too, or make room."""

POLL_S = 0.05
CHUNK = 256
"""Images that are converted at once: as long as that takes, 0.2 ms, nothing else of Python runs."""

logger = logging.getLogger(__name__)

Count = Callable[[str, int], object]
"""Hears what became of so many images: `written`, `dropped` or `failed`."""


class Answered(Protocol):
    """An image with its answer."""

    pixels: bytes | None
    row: list[float]
    batch_size: int


class Recorder:
    """Writes what is answered to a place.

    Args:
        image_size: side in pixels of the images.
        fraction: of the requests that are kept, chosen at random.
        flush_s: seconds of answers that are lost, at most, when the process is killed and the place takes no more than
            half of them to write a file.
        max_bytes: of all files at the place; when they have so many, nothing more is written.
        memory_bytes: of images that wait.
        count: called from several threads.
    """

    def __init__(
        self,
        place: Place,
        *,
        image_size: int,
        fraction: float,
        flush_s: float,
        max_bytes: int,
        memory_bytes: int,
        count: Count,
    ) -> None:
        self._place = place
        self._fraction = fraction
        self._flush_s = flush_s
        self._max_bytes = max_bytes
        self._image_bytes = 3 * image_size**2
        self._max_images = max(1, memory_bytes // (self._image_bytes + OVERHEAD_BYTES))
        self._file_images = max(1, min(FILE_BYTES // self._image_bytes, self._max_images // 4))
        self._count = count
        self._queue: deque[tuple[PublishedModel, Row]] = deque()
        self._num_taken = self._num_done = 0  # each changed by one thread alone
        self._batches: dict[tuple[PublishedModel, int], list[Any]] = {}
        self._num_converted = 0
        self._used_bytes, self._measured_at = 0, float("-inf")
        self._told: set[str] = set()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="capture", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def record(self, model: PublishedModel, images: Sequence[Answered], request_id: str, caller: str) -> None:
        """Take the images of an answered request, or a part of the requests; called by one thread alone.

        Args:
            caller: name of the key or token; empty where nobody had to show one.
        """
        if self._fraction < 1 and random.random() >= self._fraction:  # nosec B311: nobody gains by guessing it
            return
        if self._num_taken - self._num_done + len(images) > self._max_images:
            self._count("dropped", len(images))
            self._say("dropped", "answers are dropped from the capture: %s is slower than they come", self._place)
            return
        now, version, name = time.time_ns() // 1000, model.version, caller or None
        for index, image in enumerate(images):
            row = (now, request_id, index, name, version, image.batch_size, image.pixels or b"", image.row)
            self._queue.append((model, row))
        self._num_taken += len(images)

    def stop(self, within_s: float) -> None:
        """Write what waits and end the thread; what is not written in time is lost."""
        self._has_ended.set()
        self._thread.join(within_s)
        if self._thread.is_alive():
            number = self._num_taken - self._num_done
            self._count("failed", number)
            logger.error("%d captured images are lost: %s takes too long", number, self._place)

    def _work(self) -> None:
        flush_at = time.monotonic() + self._flush_s / 2  # the other half is for writing
        self._measure()
        is_last = False
        while not is_last or self._queue or self._num_converted:
            is_last = self._has_ended.wait(POLL_S)
            self._convert()
            if is_last or self._num_converted >= self._file_images or time.monotonic() >= flush_at:
                flush_at = time.monotonic() + self._flush_s / 2
                self._flush()

    def _convert(self) -> None:
        """Make record batches, each of one model and hour, of what waits, up to a file."""
        while self._queue and self._num_converted < self._file_images:
            model, row = self._queue.popleft()
            hour, rows = row[0] // HOUR_US, [row]
            while self._queue and len(rows) < CHUNK:
                next_model, row = self._queue[0]
                if next_model is not model or row[0] // HOUR_US != hour:
                    break
                rows.append(row)
                self._queue.popleft()
            try:
                batch = build_batch(rows, build_model_schema(model))
            except Exception as error:
                self._lose(len(rows), error)
                self._num_done += len(rows)
            else:
                self._batches.setdefault((model, hour), []).append(batch)
                self._num_converted += len(rows)
            time.sleep(0)  # whoever answers goes first

    def _flush(self) -> None:
        batches, self._batches = self._batches, {}
        for (model, _), group in batches.items():
            number = sum(map(len, group))
            try:
                self._count(self._write(model, group), number)
            except Exception as error:  # of whatever type a place has; answers go on
                self._lose(number, error)
        self._num_done += self._num_converted
        self._num_converted = 0

    def _write(self, model: PublishedModel, group: Sequence[Any]) -> str:
        """Write a file and return what became of its images."""
        path, content = build_file(group, build_model_schema(model))
        if not self._has_room(len(content)):
            self._say("full", "nothing more is captured: %s has its %d bytes; make room", self._place, self._max_bytes)
            return "dropped"
        self._place.write(path, content)
        self._used_bytes += len(content)
        for kind in {"failed", "full"} & self._told:
            self._told.remove(kind)
            logger.info("answers are captured again at %s", self._place)
        return "written"

    def _has_room(self, num_bytes: int) -> bool:
        age_s = time.monotonic() - self._measured_at
        if age_s > MEASURE_S or (age_s > MEASURE_FULL_S and self._used_bytes + num_bytes > self._max_bytes):
            self._measure()
        return self._used_bytes + num_bytes <= self._max_bytes

    def _measure(self) -> None:
        """Measure the files that are there; where that cannot be done, what was written counts."""
        self._measured_at = time.monotonic()
        try:
            self._used_bytes = self._place.measure()
        except Exception as error:
            self._lose(0, error)

    def _lose(self, number: int, error: Exception) -> None:
        self._count("failed", number)
        self._say("failed", "answers cannot be captured, and are given all the same: %s", one_line(error))

    def _say(self, kind: str, message: str, *arguments: object) -> None:
        """Log what is wrong, once until it has been well again."""
        if kind not in self._told:
            self._told.add(kind)
            logger.error(message, *arguments)


@lru_cache(maxsize=8)
def build_model_schema(model: PublishedModel) -> Any:
    """Build the schema of the files of a model's answers, computed here."""
    return build_schema(CaptureFacts(model.image_size, model.classes, model.digest, describe_machine()))


def describe_machine() -> str:
    """Describe what the bits of an answer may depend on, beside the model: ONNX Runtime and the processor."""
    import onnxruntime

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    processor = names[0] if names else platform.processor() or "unknown processor"
    return f"ONNX Runtime {onnxruntime.__version__}, {platform.machine()}, {processor}"
