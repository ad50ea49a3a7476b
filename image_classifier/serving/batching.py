"""Dynamic batching: a bounded queue, with threads that decode and threads that run inference.

A free thread takes what waits, up to a maximum batch size. Waiting a fixed time for more images would halve the
throughput of a small network. Each core has one inference thread with its own batch: two threads that share a batch
wait for each other after every layer.

    submit ──> [queue by caller ──> decoding threads] ──> event loop
           ──> queue ──> inference threads ──> event loop: the ticket's future

Handing an image to another thread often takes longer than the work itself. So the event loop itself decodes image files
about as small as the network's input. It also computes batches faster than `COMPUTE_AT_ONCE_S` while nothing else is
computed.

Larger files wait by caller. Some decoding threads take only files that are cheap to decode, so that large images delay
only large images.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from image_classifier.errors import ImageError, ImageSizeError
from image_classifier.imaging import decode_image, give_memory_back
from image_classifier.serving.fairness import FairQueue

if TYPE_CHECKING:
    from image_classifier.published.predictor import PublishedModel

SMALL_FILE_BYTES = 4 * 2**10
SMALL_FILE_PIXELS = 64 * 64 * 3 // 2
"""The event loop decodes image files up to both limits (a WebP of 64 x 64). Larger ones would block it."""

CHEAP_FILE_BYTES = 4 * 2**20
CHEAP_FILE_PIXELS = 3 * 2**20
"""Image files up to both limits are cheap to decode (about 0.1 s): JPEG photos, Full HD screenshots."""

MAX_COSTLY_DECODERS = 2
"""Maximum number of threads that decode costly files: each may hold the memory of a large image."""

METADATA_MARKS = (b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"EXIF", b"Exif\0\0")
"""Mark metadata of an image file that may take longer to read than its pixels."""

AT_ONCE_S = 0.002
"""Time for which the event loop decodes without a break."""

COMPUTE_AT_ONCE_S = 0.0008
"""Longest batch that the event loop computes itself. A thread computes longer ones while the loop reads and answers:
20 % more requests a second from 128 clients of a small network. A shorter batch would wait longer for the thread."""

BATCH_S = 0.005
"""Target duration of a batch: a larger one is no faster, and other images wait for it."""

SWEEP_S = 0.05
"""Interval at which deadlines are checked."""

logger = logging.getLogger(__name__)


class Classifier(Protocol):
    """Computes images: a `Predictor`, or a substitute in tests.

    Attributes:
        seconds_per_image: inference time, measured while nothing else was computed.
    """

    seconds_per_image: float

    @property
    def model(self) -> PublishedModel: ...

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool) -> NDArray[np.float32]:
        """Predict images, uint8 [N, S, S, 3], as probabilities, float32 [N, C]."""


class AnswerFuture(Protocol):
    """Receives an image's answer: an asyncio future, or `protocol.SmallImage`, which costs less."""

    def done(self) -> bool: ...

    def cancelled(self) -> bool: ...

    def set_result(self, result: Ticket, /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...


class QueueFullError(Exception):
    """The queue is full."""


class DeadlineError(Exception):
    """The deadline passed before the image was computed."""


class InferenceError(Exception):
    """An inference thread has died."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One image in the queue, from its bytes to its probabilities.

    Attributes:
        pixels: S * S * 3 bytes, RGB, row by row; None until decoded.
        content: image file; None if the request has raw pixels, and after decoding.
        formats: image formats that the file may have.
        caller: name or address of the sender, whose share of the decoding time it uses.
        row: the probability of each class.
        order: class indices, most probable first.
        batch_size: images that were computed together.
        classifier: the model that computes it: the one in service when the image was accepted.
        future: resolves to this ticket or to an error; cancelled when the client disconnects.
        deadline: by `time.perf_counter`, as the next two.
        submitted_at: time of acceptance.
        taken_at: start of the batch.
    """

    pixels: bytes | None
    content: bytes | None = None
    formats: tuple[str, ...] = ()
    caller: str = ""
    error: Exception | None = None
    row: list[float] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    batch_size: int = field(init=False)
    classifier: Classifier = field(init=False)
    future: AnswerFuture = field(init=False)
    deadline: float = field(init=False)
    submitted_at: float = field(init=False)
    taken_at: float = field(init=False)


def is_small(content: bytes) -> bool:
    """Return whether an image file is quick to decode: few bytes, no metadata, no BMP."""
    if len(content) > SMALL_FILE_BYTES or content.startswith(b"BM"):
        return False
    return not any(mark in content for mark in METADATA_MARKS)


def infer(tickets: Sequence[Ticket], *, is_alone: bool) -> list[tuple[list[Ticket], float]]:
    """Compute images, each by its model, and write the results into the tickets.

    Returns:
        The batches, each with its duration in seconds.
    """
    computed = []
    for classifier, group in groupby(tickets, attrgetter("classifier")):
        batch = list(group)
        began = time.perf_counter()
        pixels = np.frombuffer(b"".join([ticket.pixels or b"" for ticket in batch]), np.uint8)
        side = classifier.model.image_size
        rows = classifier.predict(pixels.reshape(-1, side, side, 3), is_alone=is_alone)
        orders = np.argsort(-rows, axis=1, kind="stable").tolist()
        for ticket, row, order in zip(batch, rows.tolist(), orders, strict=True):
            ticket.taken_at, ticket.row, ticket.order, ticket.batch_size = began, row, order, len(batch)
        computed.append((batch, time.perf_counter() - began))
    return computed


class Observer:
    """Callbacks for events of a `Batcher`, on the event loop's thread. The default ignores all events."""

    def on_batch(self, tickets: Sequence[Ticket], seconds: float) -> None:
        """Handle a computed batch, and its duration in seconds."""

    def on_drop(self, ticket: Ticket, reason: str) -> None:
        """Handle an image that was not computed, because of `client_left` or `deadline`."""

    def on_fallback(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """Handle images that the canary failed to compute and the champion computed instead."""


class CanaryClassifier(Classifier, Protocol):
    """A second model, which answers a part of the images."""

    def takes(self, ticket: Ticket) -> bool:
        """Return whether it answers an image."""


class Batcher:
    """Computes tickets in batches.

    Args:
        classifier: the model, called from several threads.
        max_batch: maximum number of images in a batch.
        max_queue: maximum number of images that wait or are being computed.
        timeout_s: seconds from acceptance after which an image is dropped.
        num_threads: inference threads. As many threads, but at least 2, decode image files that are not small. At most
            `MAX_COSTLY_DECODERS` of them take costly files; the others, at least 1, take only cheap ones.
        max_pixels: pixel limit of an image file, as `decode_image` counts them.
        on_death: called on the event loop's thread when an inference thread has died.

    Attributes:
        classifier: the champion. A new one, of the same image size, computes images accepted from then on.
        canary: model for a part of the images, which may also be replaced; None if there is none.
        image_size: side of the model's input in pixels.
        num_bytes: bytes of one input image.
        death: error that ended an inference thread.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        max_batch: int,
        max_queue: int,
        timeout_s: float,
        num_threads: int = 1,
        max_pixels: int = 12_500_000,
        observers: Sequence[Observer] = (),
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.classifier = classifier
        self.canary: CanaryClassifier | None = None
        self.image_size = classifier.model.image_size
        self.num_bytes = 3 * self.image_size**2
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.timeout_s = timeout_s
        self.max_pixels = max_pixels
        self.death: BaseException | None = None
        self._observers = tuple(observers)
        self._on_death = on_death
        self._pending: dict[Ticket, None] = {}  # ordered by deadline
        self._encoded: FairQueue[Ticket] = FairQueue()
        self._decoded: SimpleQueue[Ticket | None] = SimpleQueue()
        self._arrived: deque[Ticket] = deque()  # raw pixels or small files
        self._busy_since: dict[int, float] = {}  # by thread
        self._inference_threads = [
            threading.Thread(target=self._compute, name=f"inference-{number}", daemon=True)
            for number in range(num_threads)
        ]
        num_decoders = max(2, num_threads)
        num_costly = min(MAX_COSTLY_DECODERS, num_decoders - 1)
        self._decoders = [
            threading.Thread(target=self._decode, args=(number >= num_costly,), name=f"decoder-{number}", daemon=True)
            for number in range(num_decoders)
        ]

    def start(self) -> None:
        """Start the threads. The running event loop receives the answers."""
        give_memory_back()
        self._loop = asyncio.get_running_loop()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        for thread in (*self._inference_threads, *self._decoders):
            thread.start()

    def stop(self) -> None:
        """Let the threads finish what is queued and end."""
        self._sweeper.cancel()
        self._encoded.close()
        for _ in self._inference_threads:
            self._decoded.put(None)

    @property
    def num_pending(self) -> int:
        """Number of images that wait or are being computed."""
        return len(self._pending)

    def is_beating(self, within_s: float = 10.0) -> bool:
        """Return whether all threads are alive and none has worked on one batch or file for longer than `within_s`."""
        now = time.perf_counter()
        began = [*self._busy_since.values(), *self._encoded.list_began()]
        are_alive = all(thread.is_alive() for thread in (*self._inference_threads, *self._decoders))
        return self.death is None and are_alive and all(now - since <= within_s for since in began)

    def check_room(self, num_images: int) -> None:
        """Check that the queue has room for more images.

        Raises:
            QueueFullError: it does not.
            InferenceError: an inference thread has died.
        """
        if self.death is not None:
            raise InferenceError
        if len(self._pending) + num_images > self.max_queue:
            raise QueueFullError

    def submit(self, ticket: Ticket) -> asyncio.Future[Ticket]:
        """Accept an image after `check_room`, and return the future of its answer."""
        future: asyncio.Future[Ticket] = self._loop.create_future()
        self.submit_to(ticket, future)
        return future

    def submit_to(self, ticket: Ticket, future: AnswerFuture) -> None:
        """Accept an image as `submit` does, with an existing future."""
        now = time.perf_counter()
        ticket.submitted_at = now
        ticket.deadline = now + self.timeout_s
        canary = self.canary
        ticket.classifier = self.classifier if canary is None or not canary.takes(ticket) else canary
        ticket.future = future
        self._pending[ticket] = None
        if ticket.content is None or is_small(ticket.content):
            self._arrive([ticket])
        else:
            self._encoded.put(ticket, ticket.caller, is_cheap=len(ticket.content) <= CHEAP_FILE_BYTES)

    def _arrive(self, tickets: Iterable[Ticket]) -> None:
        if not self._arrived:
            self._loop.call_soon(self._dispatch)
        self._arrived.extend(tickets)

    def _dispatch(self) -> None:
        """Decode small files and compute quick batches, for a limited time; the threads get the rest."""
        until = time.perf_counter() + AT_ONCE_S
        batch: list[Ticket] = []
        try:
            self._read_arrived(batch, until)
        finally:
            if self._arrived:
                self._loop.call_soon(self._dispatch)
        is_alone = not self._busy_since and self._decoded.empty()
        if not is_alone or sum(ticket.classifier.seconds_per_image for ticket in batch) > COMPUTE_AT_ONCE_S:
            for ticket in batch:
                self._decoded.put(ticket)
        elif batch:
            try:
                computed = self._infer(batch, is_alone=True)
            except Exception as error:
                self._die(error)
            else:
                self._deliver(computed)

    def _read_arrived(self, batch: list[Ticket], until: float) -> None:
        """Move images that arrived into a batch, decoding small files, until it is full or `until` has passed."""
        while self._arrived and len(batch) < self.max_batch and time.perf_counter() < until:
            ticket = self._arrived.popleft()
            if not self._is_wanted(ticket):
                self._drop([ticket])
            elif ticket.pixels is not None or self._read(ticket, min(self.max_pixels, SMALL_FILE_PIXELS)):
                batch.append(ticket)
            elif isinstance(ticket.error, ImageSizeError):  # few bytes, but many pixels
                ticket.error = None
                self._encoded.put(ticket, ticket.caller, is_cheap=True)
            else:
                self._drop([ticket])

    def _decode(self, only_cheap: bool) -> None:
        max_pixels = min(self.max_pixels, CHEAP_FILE_PIXELS) if only_cheap else self.max_pixels
        while (ticket := self._encoded.take(only_cheap=only_cheap)) is not None:
            is_read = self._is_wanted(ticket) and self._read(ticket, max_pixels)
            if only_cheap and isinstance(ticket.error, ImageSizeError):  # costly after all
                ticket.error = None
                self._encoded.put(ticket, ticket.caller, is_cheap=False)
            else:
                self._call(self._arrive if is_read else self._drop, [ticket])

    def _read(self, ticket: Ticket, max_pixels: int) -> bool:
        """Decode an image file into its ticket, and return whether that succeeded; if not, the ticket has the error."""
        assert ticket.content is not None
        try:
            model, formats = ticket.classifier.model, ticket.formats
            pixels = decode_image(
                ticket.content, side=model.image_size, max_pixels=max_pixels, formats=formats, fit=model.fit
            )
            ticket.pixels = pixels.tobytes()
            ticket.content = None
        except ImageError as error:
            ticket.error = error
        except MemoryError:
            ticket.error = ImageError("there is not enough memory to decode the image")
        except Exception:  # concerns this image alone
            logger.exception("unexpected error while decoding an image")
            ticket.error = ImageError("the image cannot be decoded; see the server's log")
        return ticket.error is None

    def _compute(self) -> None:
        thread = threading.get_ident()
        try:
            while (ticket := self._decoded.get()) is not None:
                self._busy_since[thread] = time.perf_counter()
                batch, dropped = self._take(ticket)
                if dropped:
                    self._call(self._drop, dropped)
                is_alone = len(self._busy_since) == 1 and len(batch) == 1 and self._decoded.empty()
                computed = self._infer(batch, is_alone=is_alone)
                del self._busy_since[thread]
                self._call(self._deliver, computed)
        except BaseException as error:  # the thread ends, whatever the reason
            self._call(self._die, error)

    def _infer(self, batch: list[Ticket], *, is_alone: bool) -> list[tuple[list[Ticket], float]]:
        """Compute images by their models; the champion computes those that the canary fails to compute."""
        if self.canary is None:
            return infer(batch, is_alone=is_alone)
        groups: dict[Classifier, list[Ticket]] = {}
        for ticket in batch:
            groups.setdefault(ticket.classifier, []).append(ticket)
        computed = []
        champion = self.classifier
        for classifier, group in groups.items():
            try:
                computed += infer(group, is_alone=is_alone)
            except Exception as error:
                if classifier is champion:
                    raise
                for ticket in group:
                    ticket.classifier = champion
                computed += infer(group, is_alone=is_alone)
                for observer in self._observers:
                    self._call(observer.on_fallback, group, error)
        return computed

    def _take(self, first: Ticket) -> tuple[list[Ticket], list[Ticket]]:
        """Take this thread's share of the queue, and separately the tickets that nobody waits for any more."""
        num_idle = len(self._inference_threads) - len(self._busy_since) + 1  # this thread counts as busy
        quick = max(1.0, BATCH_S / first.classifier.seconds_per_image)
        share = math.ceil(min((self._decoded.qsize() + 1) / num_idle, quick, self.max_batch))
        batch: list[Ticket] = []
        dropped: list[Ticket] = []
        ticket: Ticket | None = first
        while ticket is not None:
            (batch if self._is_wanted(ticket) else dropped).append(ticket)
            if len(batch) == share:
                return batch, dropped
            try:
                ticket = self._decoded.get_nowait()
            except Empty:
                return batch, dropped
        self._decoded.put(None)  # put the end marker back
        return batch, dropped

    def _is_wanted(self, ticket: Ticket) -> bool:
        """Return whether a client still waits. If the sweep dropped the ticket, its future is done."""
        return not ticket.future.done() and time.perf_counter() < ticket.deadline

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed
            logger.debug("an answer came after shutdown")

    def _deliver(self, computed: list[tuple[list[Ticket], float]]) -> None:
        for batch, seconds in computed:
            for ticket in batch:
                self._pending.pop(ticket, None)
                if not ticket.future.done():
                    ticket.future.set_result(ticket)
            for observer in self._observers:
                observer.on_batch(batch, seconds)

    def _drop(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._pending.pop(ticket, None)
            if ticket.error is not None:
                self._fail(ticket, ticket.error)
            elif ticket.future.cancelled():
                self._report_drop(ticket, "client_left")
            else:
                self._give_up(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(error)

    def _give_up(self, ticket: Ticket) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(DeadlineError())
            self._report_drop(ticket, "deadline")

    def _report_drop(self, ticket: Ticket, reason: str) -> None:
        for observer in self._observers:
            observer.on_drop(ticket, reason)

    def _sweep(self) -> None:
        """Drop tickets past their deadline, even while all threads are busy."""
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        now = time.perf_counter()
        for ticket in self._pending:  # a dropped ticket counts as pending until a thread removes it from the queue
            if ticket.deadline > now:
                break
            self._give_up(ticket)

    def _die(self, error: BaseException) -> None:
        self.death = error
        for ticket in list(self._pending):
            self._fail(ticket, InferenceError())
        self._pending.clear()
        logger.critical("inference failed, the server stops", exc_info=error)
        if self._on_death is not None:
            self._on_death(error)
