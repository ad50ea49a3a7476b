"""The writer process of captures, which never delays the server's answers.

    ring buffer ──> record batches that point into it ──> a file at least every `flush_s` seconds ──> the place

When the parent closes the socket or dies, it writes what is left and ends.
"""

from __future__ import annotations

import json
import logging
import marshal
import os
import select
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from image_classifier.capture.files import CaptureFacts, FileMemory, Row, build_batch, build_file, build_schema
from image_classifier.capture.places import Place, open_place
from image_classifier.capture.ring import Message, Ring
from image_classifier.text import one_line

HOUR_US = 3_600_000_000
MEASURE_S = 600.0
MEASURE_FULL_S = 60.0
"""Intervals at which the size of a place, or of a full place, is measured: others may also write or delete there."""

POLL_S = 0.05
NICENESS = 5
"""Priority below the server's. On a shared core, the writer still gets a quarter of the time."""

PATIENT_SHARE = 0.6
"""Fraction of `flush_s` for which images wait before they are written without yielding the core."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WriterSettings:
    """Settings of the process, passed on its command line.

    Attributes:
        place: folder or URL.
        flush_s: maximum seconds of answers that are lost if the process is killed. This holds if the place writes a
            file in half that time.
        max_bytes: limit of all files at the place; then nothing more is written.
        file_images: number of images from which a file is written.
        ring_bytes: size of the ring buffer.
    """

    place: str
    flush_s: float
    max_bytes: int
    file_images: int
    ring_bytes: int


class Writer:
    """Writes messages as files.

    Attributes:
        num_images: number of images that wait to be written.
    """

    def __init__(self, place: Place, max_bytes: int, flush_s: float) -> None:
        self._place = place
        self._patient_us = round(PATIENT_SHARE * flush_s * 1e6)
        self._oldest_us = 0
        self._max_bytes = max_bytes
        self.num_images = self._num_bytes = 0
        self._counts: Counter[str] = Counter()
        self._batches: defaultdict[tuple[CaptureFacts, int], list[Any]] = defaultdict(list)
        self._memory = FileMemory()
        self._used_bytes = 0
        self._logged: set[str] = set()
        self._measure()

    def take(self, message: Message) -> None:
        """Add a message. Its memory must stay unchanged until `flush` returns."""
        (image_size, *others), rows = marshal.loads(message.rows)  # nosec B302: written by the parent process
        facts, start = CaptureFacts(image_size, *others), 0
        num_pixels = 3 * image_size**2
        for hour, group in groupby(rows, lambda row: row[0] // HOUR_US):
            chosen = list(group)
            pixels = message.pixels[start : start + len(chosen) * num_pixels]
            start += len(pixels)
            self._batches[facts, hour] += self._build(chosen, pixels, build_schema(facts))
        if not self.num_images:
            self._oldest_us = rows[0][0]
        self.num_images += len(rows)
        self._num_bytes += message.num_bytes
        self.pause()

    def pause(self) -> None:
        """Yield the core, unless images have waited too long.

        A lower priority is not enough: the kernel lets a process finish its time slice of a millisecond or more.
        """
        if time.time_ns() // 1000 - self._oldest_us < self._patient_us:
            os.sched_yield()

    def _build(self, rows: Sequence[Row], pixels: memoryview, schema: Any) -> Iterator[Any]:
        """Build a record batch; after an error, build batches of the halves, so that only bad rows are lost."""
        try:
            yield build_batch(rows, pixels, schema)
        except Exception as error:
            if len(rows) == 1:
                self._lose(1, error)
                return
            half = len(rows) // 2
            middle = len(pixels) // len(rows) * half
            yield from self._build(rows[:half], pixels[:middle], schema)
            yield from self._build(rows[half:], pixels[middle:], schema)

    def flush(self) -> tuple[dict[str, int], int]:
        """Write what waits; return the number of images by result, and the number of freed bytes of the ring."""
        for (facts, _), group in self._batches.items():
            number = sum(map(len, group))
            try:
                if number:
                    self._counts[self._write(group, build_schema(facts))] += number
            except Exception as error:  # places raise many types
                self._lose(number, error)
        self._batches.clear()
        counts, num_bytes = dict(self._counts), self._num_bytes
        self._counts.clear()
        self.num_images = self._num_bytes = 0
        return counts, num_bytes

    def _write(self, group: Sequence[Any], schema: Any) -> str:
        """Write a file and return the result for its images."""
        path, content = build_file(group, schema, self._memory, self.pause)
        if not self._has_room(len(content)):
            self._log_once(
                "full", "capture stopped: %s has reached its limit of %d bytes; make room", self._place, self._max_bytes
            )
            return "dropped"
        self._place.write(path, content)
        self._used_bytes += len(content)
        if self._logged:
            self._logged.clear()
            logger.info("capture resumed at %s", self._place)
        return "written"

    def _has_room(self, num_bytes: int) -> bool:
        age_s = time.monotonic() - self._measured_at
        if age_s > MEASURE_S or (age_s > MEASURE_FULL_S and self._used_bytes + num_bytes > self._max_bytes):
            self._measure()
        return self._used_bytes + num_bytes <= self._max_bytes

    def _measure(self) -> None:
        """Measure the size of the place; after an error, keep the previous value."""
        self._measured_at = time.monotonic()
        try:
            self._used_bytes = self._place.measure()
        except Exception as error:
            self._lose(0, error)

    def _lose(self, number: int, error: Exception) -> None:
        self._counts["failed"] += number
        self._log_once("failed", "capture failed, answering continues: %s", one_line(error))

    def _log_once(self, kind: str, message: str, *arguments: object) -> None:
        """Log an error once until it is resolved."""
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error(message, *arguments)


class Parent(logging.Handler):
    """Sends counts and log lines to the server as JSON, over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(logging.INFO)
        self._connection = connection

    def has_gone(self, within_s: float) -> bool:
        """Wait, and return whether the server closed its end."""
        return bool(select.select([self._connection], [], [], within_s)[0])

    def send(self, **facts: Any) -> None:
        """Send a message, unless the server is dead."""
        with suppress(OSError):
            self._connection.send(json.dumps(facts).encode())

    def emit(self, record: logging.LogRecord) -> None:
        self.send(level=record.levelno, text=record.getMessage()[:4096])


def work(writer: Writer, ring: Ring, parent: Parent, flush_s: float, file_images: int) -> None:
    """Write messages until the parent is gone and nothing is left."""

    def flush() -> None:
        counts, num_bytes = writer.flush()
        if num_bytes:
            parent.send(counts=counts, num_bytes=num_bytes)

    parent.send(counts={}, num_bytes=0)  # ready
    flush_at, is_last = 0.0, False
    while not is_last:
        is_last = parent.has_gone(POLL_S)
        for message in ring.read():
            if not writer.num_images:
                flush_at = time.monotonic() + flush_s / 2 - POLL_S  # the other half is for writing
            writer.take(message)
            if writer.num_images >= file_images:
                flush()
        if is_last or time.monotonic() >= flush_at:
            flush()


def warm_up() -> None:
    """Build a file and discard it: what pyarrow loads for the first one takes 0.1 s."""
    schema = build_schema(CaptureFacts(1, ("",)))
    build_file([build_batch([(0, "", 0, None, "", 1, [1.0])], bytes(3), schema)], schema, FileMemory())


def build_command(settings: WriterSettings, ring: Ring, connection: socket.socket) -> list[str]:
    """Build the command line of the process, which must inherit the descriptors."""
    descriptors = map(str, (*ring.descriptors, connection.fileno()))
    return [sys.executable, "-P", "-m", __name__, json.dumps(asdict(settings)), *descriptors]


def main(argv: Sequence[str]) -> None:
    """Run the process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server handles them and closes the socket
        signal.signal(number, signal.SIG_IGN)
    settings = WriterSettings(**json.loads(argv[0]))
    memory, counter, connection = map(int, argv[1:])
    parent = Parent(socket.socket(fileno=os.dup(connection)))  # the inherited descriptor closes with the process
    logging.basicConfig(handlers=[parent], level=logging.INFO)
    writer = Writer(open_place(settings.place), settings.max_bytes, settings.flush_s)
    ring = Ring(settings.ring_bytes, (memory, counter))
    warm_up()
    with suppress(OSError):  # a sandbox may refuse it
        os.nice(NICENESS)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # does not preempt others on wake-up
    work(writer, ring, parent, settings.flush_s, settings.file_images)


if __name__ == "__main__":
    main(sys.argv[1:])
