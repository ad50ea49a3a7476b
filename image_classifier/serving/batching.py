"""Requests that arrive together are computed together: a bounded queue, and threads that decode and compute.

A batch is whatever waits when the session is free, up to a size: waiting a fixed time for more would cost a small
network half of its throughput. Everything but decoding and computing happens on the event loop's thread.

    submit ──> [decoding threads] ──> queue ──> inference thread ──> event loop: the ticket's future

Image files about as small as the network's input are decoded by the inference thread itself, right before they are
computed: handing each from one thread to another takes longer than decoding it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from image_classifier.errors import ImageError, ImageSizeError
from image_classifier.imaging import SIDE, decode_image

if TYPE_CHECKING:
    from image_classifier.serving.predictor import PublishedModel

NUM_BYTES = SIDE * SIDE * 3
SMALL_FILE_BYTES = 16 * 2**10
SMALL_FILE_PIXELS = 64 * 64
"""Image files up to both are decoded by the inference thread; larger ones would hold the others up."""

SWEEP_S = 0.05
"""How often the deadlines of what waits are looked at."""

logger = logging.getLogger(__name__)


class Classifier(Protocol):
    """What computes: a published model, or in tests a few lines that stand in for one."""

    @property
    def model(self) -> PublishedModel: ...

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Predict uint8 [N, 32, 32, 3] images: float32 [N, C] probabilities."""


class QueueFullError(Exception):
    """As many images wait as may wait."""


class DeadlineError(Exception):
    """The answer would come after its deadline."""


class InferenceError(Exception):
    """The thread that computes has died."""


class Ticket:
    """One image on its way: first as it came, then as pixels, then with its probabilities.

    Attributes:
        content: bytes of an image file, or None where the pixels came themselves.
        pixels: 3,072 bytes, RGB, row by row; None until decoded.
        classifier: the model that was current when the image was accepted, and computes it.
        future: done with this ticket, or with the reason why not; cancelled when the client has left.
        row: the probability of each class.
        order: the classes from the most probable to the least.
    """

    __slots__ = (
        "classifier",
        "content",
        "deadline",
        "error",
        "formats",
        "future",
        "num_images",
        "order",
        "pixels",
        "row",
        "submitted_at",
        "taken_at",
    )

    def __init__(self, pixels: bytes | None, content: bytes | None = None, formats: tuple[str, ...] = ()) -> None:
        self.pixels = pixels
        self.content = content
        self.formats = formats
        self.error: Exception | None = None
        self.row: list[float] = []
        self.order: list[int] = []
        self.classifier: Classifier
        self.future: asyncio.Future[Ticket]
        self.deadline: float
        self.submitted_at: float
        self.taken_at: float


class Observer:
    """Hears what happens to batches; this one listens to nothing. Called on the event loop's thread."""

    def on_batch(self, tickets: Sequence[Ticket], seconds: float) -> None:
        """Hear of a computed batch, and the seconds that computing took."""

    def on_drop(self, ticket: Ticket, reason: str) -> None:
        """Hear of an image that was not computed: `client_left` or `deadline`."""


class Batcher:
    """Computes tickets in batches on a thread of its own.

    Args:
        classifier: the model; `replace_classifier` changes it between two batches.
        max_batch: images that are computed at once, at most.
        max_queue: images that may wait or be computed, at most.
        timeout_s: seconds from acceptance after which an image is given up.
        num_decoders: threads that decode image files which are not small.
        max_pixels: of an image file.
        on_death: called on the event loop's thread when the inference thread has died.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        max_batch: int,
        max_queue: int,
        timeout_s: float,
        num_decoders: int = 1,
        max_pixels: int = 25_000_000,
        observer: Observer | None = None,
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.classifier = classifier
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.timeout_s = timeout_s
        self.max_pixels = max_pixels
        self.death: BaseException | None = None
        self.busy_since: float | None = None
        self._observer = observer or Observer()
        self._on_death = on_death
        self._pending: dict[Ticket, None] = {}  # in the order of their deadlines
        self._encoded: SimpleQueue[Ticket | None] = SimpleQueue()
        self._decoded: SimpleQueue[Ticket | None] = SimpleQueue()
        self._held: Ticket | None = None
        self._threads = [threading.Thread(target=self._compute, name="inference", daemon=True)]
        self._threads += [
            threading.Thread(target=self._decode, name=f"decoder-{number}", daemon=True)
            for number in range(num_decoders)
        ]

    def start(self) -> None:
        """Start the threads; from now on the running event loop is the one that gets the answers."""
        self._loop = asyncio.get_running_loop()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the threads end after what they have."""
        self._sweeper.cancel()
        for _ in self._threads[1:]:
            self._encoded.put(None)
        self._decoded.put(None)

    @property
    def num_pending(self) -> int:
        """Images that wait or are being computed."""
        return len(self._pending)

    def is_beating(self, within_s: float = 10.0) -> bool:
        """Say whether the inference thread lives and has not been at one batch for longer than that."""
        busy_since = self.busy_since
        is_late = busy_since is not None and time.perf_counter() - busy_since > within_s
        return self.death is None and self._threads[0].is_alive() and not is_late

    def replace_classifier(self, classifier: Classifier) -> None:
        """Compute what is accepted from now on with another model; what was accepted keeps its own."""
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

    def submit(self, ticket: Ticket, future: asyncio.Future[Ticket] | None = None) -> asyncio.Future[Ticket]:
        """Accept an image, for which `check_room` has found room, and return the future of its answer.

        Args:
            future: to be used instead of a new one.
        """
        now = time.perf_counter()
        ticket.submitted_at = now
        ticket.deadline = now + self.timeout_s
        ticket.classifier = self.classifier
        ticket.future = future = future or self._loop.create_future()
        self._pending[ticket] = None
        if ticket.content is not None and len(ticket.content) > SMALL_FILE_BYTES:
            self._encoded.put(ticket)
        else:
            self._decoded.put(ticket)
        return future

    def _decode(self) -> None:
        while (ticket := self._encoded.get()) is not None:
            if self._is_wanted(ticket) and self._read(ticket, self.max_pixels):
                self._decoded.put(ticket)
            else:
                self._call(self._drop, [ticket])

    def _read(self, ticket: Ticket, max_pixels: int) -> bool:
        """Decode an image file, and say whether that went well; the ticket has the pixels or the error."""
        assert ticket.content is not None
        try:
            ticket.pixels = decode_image(ticket.content, max_pixels=max_pixels, formats=ticket.formats).tobytes()
            ticket.content = None
        except ImageError as error:
            ticket.error = error
        except MemoryError:
            ticket.error = ImageError("the image needs more memory than there is")
        return ticket.error is None

    def _read_small(self, batch: list[Ticket]) -> list[Ticket]:
        """Decode what came as small image files; return what can be computed now."""
        readable = []
        for ticket in batch:
            if ticket.pixels is not None or self._read(ticket, min(self.max_pixels, SMALL_FILE_PIXELS)):
                readable.append(ticket)
            elif isinstance(ticket.error, ImageSizeError):  # few bytes that say that they are many pixels
                ticket.error = None
                self._encoded.put(ticket)
            else:
                self._call(self._drop, [ticket])
        return readable

    def _compute(self) -> None:
        try:
            while (taken := self._take()) is not None:
                batch, dropped = taken
                if dropped:
                    self._call(self._drop, dropped)
                batch = self._read_small(batch)
                if not batch:
                    continue
                began = self.busy_since = time.perf_counter()
                pixels = np.frombuffer(b"".join([ticket.pixels or b"" for ticket in batch]), np.uint8)
                rows = batch[0].classifier.predict(pixels.reshape(-1, SIDE, SIDE, 3))
                seconds = time.perf_counter() - began
                orders = np.argsort(-rows, axis=1, kind="stable").tolist()
                for ticket, row, order in zip(batch, rows.tolist(), orders, strict=True):
                    ticket.taken_at, ticket.row, ticket.order = began, row, order
                self.busy_since = None
                self._call(self._deliver, batch, seconds)
        except BaseException as error:  # whatever it was: nobody else computes
            self._call(self._die, error)

    def _take(self) -> tuple[list[Ticket], list[Ticket]] | None:
        """Wait for an image and take it with those that wait behind it for the same model; None is the end."""
        batch: list[Ticket] = []
        dropped: list[Ticket] = []
        ticket = self._held or self._decoded.get()
        self._held = None
        while ticket is not None:
            if not self._is_wanted(ticket):
                dropped.append(ticket)
            elif batch and ticket.classifier is not batch[0].classifier:
                self._held = ticket
                return batch, dropped
            else:
                batch.append(ticket)
            if len(batch) == self.max_batch:
                return batch, dropped
            try:
                ticket = self._decoded.get_nowait()
            except Empty:
                return batch, dropped
        if batch or dropped:
            self._decoded.put(None)  # again, for the next turn
            return batch, dropped
        return None

    def _is_wanted(self, ticket: Ticket) -> bool:
        """Say whether anybody still waits for it; a future that the sweep has failed is done."""
        return not ticket.future.done() and time.perf_counter() < ticket.deadline

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to hear
            logger.debug("an answer came after the end")

    def _deliver(self, batch: list[Ticket], seconds: float) -> None:
        for ticket in batch:
            self._pending.pop(ticket, None)
            if not ticket.future.done():
                ticket.future.set_result(ticket)
        self._observer.on_batch(batch, seconds)

    def _drop(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._pending.pop(ticket, None)
            if ticket.error is not None:
                self._fail(ticket, ticket.error)
            elif ticket.future.cancelled():
                self._observer.on_drop(ticket, "client_left")
            else:
                self._give_up(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(error)

    def _give_up(self, ticket: Ticket) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(DeadlineError())
            self._observer.on_drop(ticket, "deadline")

    def _sweep(self) -> None:
        """Give up what has waited too long, also where the thread is at one batch all the time."""
        now = time.perf_counter()
        for ticket in self._pending:  # which stays until it is taken out of the queue, and counts as waiting
            if ticket.deadline > now:
                break
            self._give_up(ticket)
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def _die(self, error: BaseException) -> None:
        self.death = error
        for ticket in list(self._pending):
            self._fail(ticket, InferenceError())
        self._pending.clear()
        logger.critical("the inference thread died", exc_info=error)
        if self._on_death is not None:
            self._on_death(error)
