"""The process that writes captures, beside the server: what it does holds up no answer.

    ring of memory ──> tables that point into it ──> a file at least every `flush_s` seconds ──> the place

It ends when its parent closes the socket between them, or dies; then it writes what is left.
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
"""How often a place is measured, and one that is full: others write there too, or make room."""

POLL_S = 0.05
NICENESS = 5
"""Whoever answers goes first; of a core that it shares with another process, the writer still gets a quarter."""

PATIENT_SHARE = 0.6
"""Of `flush_s`: images that have waited for longer are written without letting others go first."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WriterSettings:
    """What the process is told on its command line.

    Attributes:
        place: folder or URL.
        flush_s: seconds of answers that are lost, at most, when the process is killed and the place takes no more than
            half of them to write a file.
        max_bytes: of all files at the place; when they have so many, nothing more is written.
        file_images: after so many a file is written.
        ring_bytes: size of the ring.
    """

    place: str
    flush_s: float
    max_bytes: int
    file_images: int
    ring_bytes: int


class Writer:
    """Makes files of messages.

    Attributes:
        num_images: that wait to be written.
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
        self._told: set[str] = set()
        self._measure()

    def take(self, message: Message) -> None:
        """Take a message, whose memory must stay as it is until `flush` has returned."""
        (image_size, *others), rows = marshal.loads(message.rows)  # nosec B302: our parent's
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
        """Let whoever waits for this core go first, unless the images have waited for too long.

        A lower priority alone is not enough: the kernel lets whatever runs end its slice, of a millisecond or more.
        """
        if time.time_ns() // 1000 - self._oldest_us < self._patient_us:
            os.sched_yield()

    def _build(self, rows: Sequence[Row], pixels: memoryview, schema: Any) -> Iterator[Any]:
        """Build a record batch; where that cannot be, of the halves, so that one bad row is lost alone."""
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
        """Write what waits; return what became of how many images, and the bytes of the ring that are free again."""
        for (facts, _), group in self._batches.items():
            number = sum(map(len, group))
            try:
                if number:
                    self._counts[self._write(group, build_schema(facts))] += number
            except Exception as error:  # of whatever type a place has; answers go on
                self._lose(number, error)
        self._batches.clear()
        counts, num_bytes = dict(self._counts), self._num_bytes
        self._counts.clear()
        self.num_images = self._num_bytes = 0
        return counts, num_bytes

    def _write(self, group: Sequence[Any], schema: Any) -> str:
        """Write a file and return what became of its images."""
        path, content = build_file(group, schema, self._memory, self.pause)
        if not self._has_room(len(content)):
            self._say("full", "nothing more is captured: %s has its %d bytes; make room", self._place, self._max_bytes)
            return "dropped"
        self._place.write(path, content)
        self._used_bytes += len(content)
        if self._told:
            self._told.clear()
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
        self._counts["failed"] += number
        self._say("failed", "answers cannot be captured, and are given all the same: %s", one_line(error))

    def _say(self, kind: str, message: str, *arguments: object) -> None:
        """Log what is wrong, once until it has been well again."""
        if kind not in self._told:
            self._told.add(kind)
            logger.error(message, *arguments)


class Parent(logging.Handler):
    """Tells the server over a socket, in messages of JSON, what became of images, and what it shall log."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(logging.INFO)
        self._connection = connection

    def has_gone(self, within_s: float) -> bool:
        """Wait so long, and say whether the server has closed its end."""
        return bool(select.select([self._connection], [], [], within_s)[0])

    def tell(self, **facts: Any) -> None:
        """Send a message; to a server that was killed, none."""
        with suppress(OSError):
            self._connection.send(json.dumps(facts).encode())

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(level=record.levelno, text=record.getMessage()[:4096])


def work(writer: Writer, ring: Ring, parent: Parent, flush_s: float, file_images: int) -> None:
    """Write what comes until the parent has gone, and what is left then."""

    def flush() -> None:
        counts, num_bytes = writer.flush()
        if num_bytes:
            parent.tell(counts=counts, num_bytes=num_bytes)

    parent.tell(counts={}, num_bytes=0)  # ready
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
    """Build a file for nothing: what pyarrow loads at its first one takes a tenth of a second."""
    schema = build_schema(CaptureFacts(1, ("",)))
    build_file([build_batch([(0, "", 0, None, "", 1, [1.0])], bytes(3), schema)], schema, FileMemory())


def build_command(settings: WriterSettings, ring: Ring, connection: socket.socket) -> list[str]:
    """Build the words that start the process, which has to inherit the descriptors."""
    descriptors = map(str, (*ring.descriptors, connection.fileno()))
    return [sys.executable, "-P", "-m", __name__, json.dumps(asdict(settings)), *descriptors]


def main(argv: Sequence[str]) -> None:
    """Run the process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server gets them, too, and closes the socket at its end
        signal.signal(number, signal.SIG_IGN)
    settings = WriterSettings(**json.loads(argv[0]))
    memory, counter, connection = map(int, argv[1:])
    parent = Parent(socket.socket(fileno=os.dup(connection)))  # the other one closes when the process has ended
    logging.basicConfig(handlers=[parent], level=logging.INFO)
    writer = Writer(open_place(settings.place), settings.max_bytes, settings.flush_s)
    ring = Ring(settings.ring_bytes, (memory, counter))
    warm_up()
    with suppress(OSError):  # a sandbox may refuse it
        os.nice(NICENESS)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # that it wakes up interrupts nobody
    work(writer, ring, parent, settings.flush_s, settings.file_images)


if __name__ == "__main__":
    main(sys.argv[1:])
