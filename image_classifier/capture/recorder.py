"""Records answered images through shared memory to a writer process.

    record ──> rows of up to `CHUNK` images ──> ring buffer in shared memory ──> `writer` process ──> the place

Answers never wait: the event loop copies some kilobytes, and the writer process does the rest. Images are dropped if
the writer is too slow, and lost if the place refuses them or the writer dies. Both are counted, and logged once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import marshal
import os
import platform
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from image_classifier.capture.files import Row
from image_classifier.capture.ring import Ring
from image_classifier.capture.writer import WriterSettings, build_command
from image_classifier.published.predictor import PublishedModel

FILE_BYTES = 8 * 2**20
"""Size of the pixels from which a file is written."""

OVERHEAD_BYTES = 1024
"""Memory per image in addition to its pixels."""

CHUNK = 64
"""Images that are handed over at once, which takes 0.04 ms."""

LATE_S = 0.05
"""Time after which fewer images are handed over."""

START_S = 10.0
RESTART_S = 1.0
"""Time to wait until the writer process is ready, and before it is restarted."""

logger = logging.getLogger(__name__)

Count = Callable[[str, int], object]
"""Called with `written`, `dropped` or `failed` and the number of images."""


class Answered(Protocol):
    """An image and its probabilities."""

    pixels: bytes | None
    row: list[float]
    batch_size: int


class Recorder:
    """Records answered images. Its methods run on the event loop.

    Args:
        place: folder or URL.
        image_size: side of the images in pixels.
        fraction: of the requests to record, chosen at random.
        flush_s: maximum seconds of answers that are lost if server and writer are killed. This holds if the place
            writes a file in half that time.
        max_bytes: limit of all files at the place; then nothing more is written.
        memory_bytes: limit of images that wait.

    Attributes:
        is_writing: whether the writer process is alive.
    """

    def __init__(
        self,
        place: str,
        *,
        image_size: int,
        fraction: float,
        flush_s: float,
        max_bytes: int,
        memory_bytes: int,
        count: Count,
    ) -> None:
        image_bytes = 3 * image_size**2
        room = max(memory_bytes, 4 * (image_bytes + OVERHEAD_BYTES))
        max_images = room // (image_bytes + OVERHEAD_BYTES)
        self._chunk = min(CHUNK, max_images // 4)
        file_images = max(1, min(FILE_BYTES // image_bytes, max_images // 4))
        self._settings = WriterSettings(place, flush_s, max_bytes, file_images, room // 64 * 64)
        self._fraction = fraction
        self._count = count
        self._waiting: dict[int, tuple[PublishedModel, list[Row], list[bytes]]] = {}  # by the model's id
        self._late: asyncio.TimerHandle | None = None
        self._logged: set[str] = set()
        self._num_unwritten = 0
        self._ring = Ring(self._settings.ring_bytes)
        self.is_writing = False
        self._process: subprocess.Popen[bytes]
        self._connection: socket.socket
        self._is_ready, self._has_ended = asyncio.Event(), asyncio.Event()
        self._is_ending = False

    async def start(self) -> None:
        """Start the writer process, and wait until it is ready."""
        self._loop = asyncio.get_running_loop()
        self._start_process()
        if self.is_writing:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_ready.wait(), START_S)

    def _start_process(self) -> None:
        if self._is_ending:
            return
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = start_process(self._settings, self._ring, theirs)
            except OSError as error:
                self._connection.close()
                self._log_once("died", "capture failed, answering continues: %s", error)
                self._loop.call_later(RESTART_S, self._start_process)
                return
        self.is_writing = True
        self._connection.setblocking(False)
        self._loop.add_reader(self._connection, self._receive)

    def record(self, model: PublishedModel, images: Sequence[Answered], request_id: str, caller: str) -> None:
        """Record the images of an answered request, for `fraction` of the requests.

        Args:
            caller: name of the API key or token; empty without authentication.
        """
        if self._fraction < 1 and random.random() >= self._fraction:  # nosec B311: nobody gains by guessing it
            return
        _, rows, pixels = self._waiting.get(id(model)) or self._begin(model)
        now, version, name = time.time_ns() // 1000, model.version, caller or None
        for index, image in enumerate(images):
            rows.append((now, request_id, index, name, version, image.batch_size, image.row))
            pixels.append(image.pixels or b"")
        if len(rows) >= self._chunk:
            self._hand_over()

    def _begin(self, model: PublishedModel) -> tuple[PublishedModel, list[Row], list[bytes]]:
        if self._late is None:
            self._late = self._loop.call_later(LATE_S, self._hand_over_late)
        return self._waiting.setdefault(id(model), (model, [], []))

    def _hand_over_late(self) -> None:
        self._late = None
        self._hand_over()

    def _hand_over(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for model, rows, pixels in waiting.values():
            content = marshal.dumps((describe_model(model), rows), 2)  # later versions search for repeated objects
            if not self.is_writing:
                self._count("failed", len(rows))
            elif self._ring.append(b"".join(pixels), content):
                self._num_unwritten += len(rows)
            else:
                self._count("dropped", len(rows))
                place = self._settings.place
                self._log_once("dropped", "images are dropped from the capture: %s is too slow", place)

    def _receive(self) -> None:
        """Receive counts or log lines from the writer process, or its end."""
        try:
            message = self._connection.recv(2**16)
        except OSError:
            message = b""
        if not message:
            self._lose_process()
            return
        facts = json.loads(message)
        if "text" in facts:
            logger.log(facts["level"], "%s", facts["text"])
            return
        self._is_ready.set()
        self._ring.free(facts["num_bytes"])
        for result, number in facts["counts"].items():
            self._count(result, number)
            self._num_unwritten -= number
        if "written" in facts["counts"]:
            self._logged.discard("died")

    def _lose_process(self) -> None:
        """Count the images of the dead process as lost, and restart it unless the server stops."""
        self._loop.remove_reader(self._connection)
        self._connection.close()
        self.is_writing = False
        status = end_process(self._process)
        self._ring.clear()
        number, self._num_unwritten = self._num_unwritten, 0
        if number:
            self._count("failed", number)
        self._is_ready.set()
        self._has_ended.set()
        if self._is_ending:
            return
        ended = "%d captured images are lost: the writer process ended with status %s and is restarted"
        self._log_once("died", ended, number, status)
        self._loop.call_later(RESTART_S, self._start_process)

    async def stop(self, within_s: float) -> None:
        """Write waiting images and stop the process; images not written in time are lost."""
        if self._late is not None:
            self._late.cancel()
        self._hand_over()
        self._is_ending = True
        if self.is_writing:
            self._has_ended.clear()
            self._connection.shutdown(socket.SHUT_WR)
            try:
                await asyncio.wait_for(self._has_ended.wait(), within_s)
            except TimeoutError:
                lost, place = self._num_unwritten, self._settings.place
                logger.error("%d captured images are lost: %s takes too long", lost, place)
                self._lose_process()
        self._ring.close()

    def _log_once(self, kind: str, message: str, *arguments: object) -> None:
        """Log an error once until it is resolved."""
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error(message, *arguments)


def start_process(settings: WriterSettings, ring: Ring, connection: socket.socket) -> subprocess.Popen[bytes]:
    """Start the writer process with this one's module path and environment, and one thread for Arrow.

    Raises:
        OSError: the process cannot be created.
    """
    places = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.Popen(
        build_command(settings, ring, connection),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(*ring.descriptors, connection.fileno()),
        env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(places)},
    )


def end_process(process: subprocess.Popen[bytes]) -> int | None:
    """Wait briefly for a process, kill it if necessary, and return its status; None if it cannot be killed."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(0.1)
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        return process.wait(1)
    return None


@lru_cache(maxsize=8)
def describe_model(model: PublishedModel) -> tuple[Any, ...]:
    """Return the values of `CaptureFacts` for a model on this machine."""
    return (model.image_size, tuple(model.classes), model.digest, describe_machine())


def describe_machine() -> str:
    """Describe the ONNX Runtime version and the processor, on which the bits of a prediction may depend."""
    import onnxruntime

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    processor = names[0] if names else platform.processor() or "unknown processor"
    return f"ONNX Runtime {onnxruntime.__version__}, {platform.machine()}, {processor}"
