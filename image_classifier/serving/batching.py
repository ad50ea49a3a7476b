"""Requests that arrive together are computed together: a bounded queue, and threads that decode and compute.

A batch is whatever waits when a thread is free, up to a size: waiting a fixed time for more would cost a small network
half of its throughput. There is an inference thread a core, each computing a batch of its own: two threads that share
one batch wait for each other at the end of every layer.

    submit ──> [queue by caller ──> decoding threads] ──> event loop
           ──> queue ──> inference threads ──> event loop: the ticket's future

Handing an image from one thread to another takes longer than much of what the other thread would do. So the event loop
decodes image files that are about as small as the network's input itself, and computes what takes less than
`COMPUTE_AT_ONCE_S` where nothing else is being computed.

Files that are not small wait by caller. Some decoding threads take those that are cheap to decode and no others, so
that large images, whoever sends them, hold up nothing but large images.
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
"""Image files up to both (a WebP of 64 x 64) are decoded by the event loop; larger ones would hold the others up."""

CHEAP_FILE_BYTES = 4 * 2**20
CHEAP_FILE_PIXELS = 3 * 2**20
"""Image files up to both are cheap to decode, a tenth of a second or so: photos as JPEG, screenshots in Full HD."""

MAX_COSTLY_DECODERS = 2
"""Threads that decode what is not cheap, at most: each may hold the memory of a large image."""

METADATA_MARKS = (b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"EXIF", b"Exif\0\0")
"""Of the parts of an image file that take longer to read than its pixels."""

AT_ONCE_S = 0.002
"""What the event loop decodes at a time."""

COMPUTE_AT_ONCE_S = 0.0008
"""What the event loop computes at a time. A longer batch is computed by a thread while the loop reads and answers: a
fifth more requests a second from 128 clients of a small network. A shorter one would wait longer for the thread."""

BATCH_S = 0.005
"""A batch that takes so long is large enough: a larger one is no faster, and the others wait for it."""

SWEEP_S = 0.05
"""How often the deadlines of what waits are looked at."""

logger = logging.getLogger(__name__)


class Classifier(Protocol):
    """What computes: a published model, or in tests a few lines that stand in for one.

    Attributes:
        seconds_per_image: of computing, as it was measured when nothing else was going on.
    """

    seconds_per_image: float

    @property
    def model(self) -> PublishedModel: ...

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool) -> NDArray[np.float32]:
        """Predict uint8 [N, S, S, 3] images: float32 [N, C] probabilities."""


class Answer(Protocol):
    """What waits for an image: an asyncio future, or what does the same in less time."""

    def done(self) -> bool: ...

    def cancelled(self) -> bool: ...

    def set_result(self, result: Ticket, /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...


class QueueFullError(Exception):
    """As many images wait as may wait."""


class DeadlineError(Exception):
    """The answer would come after its deadline."""


class InferenceError(Exception):
    """A thread that computes has died."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One image on its way: first as it came, then as pixels, then with its probabilities.

    Attributes:
        pixels: S * S * 3 bytes, RGB, row by row; None until decoded.
        content: bytes of an image file, or None where the pixels came themselves.
        formats: that the file may have.
        caller: name or address of who sent it, and pays with his share of the decoding time.
        row: the probability of each class.
        order: the classes from the most probable to the least.
        batch_size: images that were computed together.
        classifier: the model that was current when the image was accepted, and computes it.
        future: done with this ticket, or with the reason why not; cancelled when the client has left.
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
    future: Answer = field(init=False)
    deadline: float = field(init=False)
    submitted_at: float = field(init=False)
    taken_at: float = field(init=False)


def is_small(content: bytes) -> bool:
    """Say whether an image file is decoded in no time: small, and with nothing in it that unpacks to more."""
    if len(content) > SMALL_FILE_BYTES or content.startswith(b"BM"):
        return False
    return not any(mark in content for mark in METADATA_MARKS)


def infer(tickets: Sequence[Ticket], *, is_alone: bool) -> list[tuple[list[Ticket], float]]:
    """Compute images, each by its model, and note the results in the tickets; return the batches and their seconds."""
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
    """Hears what happens to batches; this one listens to nothing. Called on the event loop's thread."""

    def on_batch(self, tickets: Sequence[Ticket], seconds: float) -> None:
        """Hear of a computed batch, and the seconds that computing took."""

    def on_drop(self, ticket: Ticket, reason: str) -> None:
        """Hear of an image that was not computed: `client_left` or `deadline`."""

    def on_fallback(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """Hear of images that the canary failed to compute, and the champion computed."""


class Part(Classifier, Protocol):
    """A second model that answers some of the images: a canary."""

    def takes(self, ticket: Ticket) -> bool:
        """Say whether it answers an image."""


class Batcher:
    """Computes tickets in batches.

    Args:
        classifier: the model, called from several threads; `replace_classifier` changes it between two batches.
        max_batch: images that are computed at once, at most.
        max_queue: images that may wait or be computed, at most.
        timeout_s: seconds from acceptance after which an image is given up.
        num_threads: inference threads, and as many, but at least 2, that decode image files which are not small. Of
            these, `MAX_COSTLY_DECODERS` at most take what is not cheap to decode; the others, at least 1, do not.
        max_pixels: of an image file, as `decode_image` counts them.
        on_death: called on the event loop's thread when an inference thread has died.

    Attributes:
        canary: answers some of the images, may be another one between two batches; None where there is none.
        image_size: side in pixels of the images that the model takes.
        num_bytes: of an image's pixels.
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
        self.canary: Part | None = None
        self.image_size = classifier.model.image_size
        self.num_bytes = 3 * self.image_size**2
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.timeout_s = timeout_s
        self.max_pixels = max_pixels
        self.death: BaseException | None = None
        self._observers = tuple(observers)
        self._on_death = on_death
        self._pending: dict[Ticket, None] = {}  # in the order of their deadlines
        self._encoded: FairQueue[Ticket] = FairQueue()
        self._decoded: SimpleQueue[Ticket | None] = SimpleQueue()
        self._arrived: deque[Ticket] = deque()  # as pixels or small files
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
        """Start the threads; from now on the running event loop is the one that gets the answers."""
        give_memory_back()
        self._loop = asyncio.get_running_loop()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        for thread in (*self._inference_threads, *self._decoders):
            thread.start()

    def stop(self) -> None:
        """Let the threads end after what they have."""
        self._sweeper.cancel()
        self._encoded.close()
        for _ in self._inference_threads:
            self._decoded.put(None)

    @property
    def num_pending(self) -> int:
        """Images that wait or are being computed."""
        return len(self._pending)

    def is_beating(self, within_s: float = 10.0) -> bool:
        """Say whether all threads live and none has been at one batch, or one image file, for longer than that."""
        now = time.perf_counter()
        began = [*self._busy_since.values(), *self._encoded.list_began()]
        are_alive = all(thread.is_alive() for thread in (*self._inference_threads, *self._decoders))
        return self.death is None and are_alive and all(now - since <= within_s for since in began)

    def replace_classifier(self, classifier: Classifier) -> None:
        """Compute what is accepted from now on with another model; what was accepted keeps its own.

        It takes images of the same size: what clients send, and were told to send, stays what it is.
        """
        self.classifier = classifier

    def check_room(self, num_images: int) -> None:
        """Raise what would be in the way of so many more images.

        Raises:
            QueueFullError: they do not fit into the queue.
            InferenceError: nothing computes any more.
        """
        if self.death is not None:
            raise InferenceError
        if len(self._pending) + num_images > self.max_queue:
            raise QueueFullError

    def submit(self, ticket: Ticket) -> asyncio.Future[Ticket]:
        """Accept an image, for which `check_room` has found room, and return the future of its answer."""
        future: asyncio.Future[Ticket] = self._loop.create_future()
        self.submit_to(ticket, future)
        return future

    def submit_to(self, ticket: Ticket, future: Answer) -> None:
        """Accept an image as `submit` does, for a future that is there."""
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
        """Decode what is small and compute what is quick, as much as fits into a moment; the threads get the rest."""
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
        """Take what has arrived into a batch, small files decoded, until it is full or a moment has passed."""
        while self._arrived and len(batch) < self.max_batch and time.perf_counter() < until:
            ticket = self._arrived.popleft()
            if not self._is_wanted(ticket):
                self._drop([ticket])
            elif ticket.pixels is not None or self._read(ticket, min(self.max_pixels, SMALL_FILE_PIXELS)):
                batch.append(ticket)
            elif isinstance(ticket.error, ImageSizeError):  # few bytes that say that they are many pixels
                ticket.error = None
                self._encoded.put(ticket, ticket.caller, is_cheap=True)
            else:
                self._drop([ticket])

    def _decode(self, only_cheap: bool) -> None:
        max_pixels = min(self.max_pixels, CHEAP_FILE_PIXELS) if only_cheap else self.max_pixels
        while (ticket := self._encoded.take(only_cheap=only_cheap)) is not None:
            is_read = self._is_wanted(ticket) and self._read(ticket, max_pixels)
            if only_cheap and isinstance(ticket.error, ImageSizeError):  # not cheap, after all
                ticket.error = None
                self._encoded.put(ticket, ticket.caller, is_cheap=False)
            else:
                self._call(self._arrive if is_read else self._drop, [ticket])

    def _read(self, ticket: Ticket, max_pixels: int) -> bool:
        """Decode an image file, and say whether that went well; the ticket has the pixels or the error."""
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
            ticket.error = ImageError("the image needs more memory than there is")
        except Exception:  # which is this image's, and no other's
            logger.exception("unexpected error in decoding an image")
            ticket.error = ImageError("the image cannot be decoded; the server's log has the reason")
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
        except BaseException as error:  # whatever it was: this thread computes no more
            self._call(self._die, error)

    def _infer(self, batch: list[Ticket], *, is_alone: bool) -> list[tuple[list[Ticket], float]]:
        """Compute images; what any other model fails to compute is computed by the champion."""
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
        """Take this thread's share of what waits, and apart from it what nobody waits for any more."""
        num_idle = len(self._inference_threads) - len(self._busy_since) + 1  # this thread is marked as busy
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
        self._decoded.put(None)  # the end, again, for the next turn
        return batch, dropped

    def _is_wanted(self, ticket: Ticket) -> bool:
        """Say whether anybody still waits for it; a future that the sweep has failed is done."""
        return not ticket.future.done() and time.perf_counter() < ticket.deadline

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to hear
            logger.debug("an answer came after the end")

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
                self._tell_drop(ticket, "client_left")
            else:
                self._give_up(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(error)

    def _give_up(self, ticket: Ticket) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(DeadlineError())
            self._tell_drop(ticket, "deadline")

    def _tell_drop(self, ticket: Ticket, reason: str) -> None:
        for observer in self._observers:
            observer.on_drop(ticket, reason)

    def _sweep(self) -> None:
        """Give up what has waited too long, also where the thread is at one batch all the time."""
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        now = time.perf_counter()
        for ticket in self._pending:  # which stays until it is taken out of the queue, and counts as waiting
            if ticket.deadline > now:
                break
            self._give_up(ticket)

    def _die(self, error: BaseException) -> None:
        self.death = error
        for ticket in list(self._pending):
            self._fail(ticket, InferenceError())
        self._pending.clear()
        logger.critical("computing failed, and the server ends", exc_info=error)
        if self._on_death is not None:
            self._on_death(error)
