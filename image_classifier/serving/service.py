"""What all prediction routes share: size limits of bodies, batching, caching, answers and errors."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request

from image_classifier.capture.recorder import Recorder
from image_classifier.errors import ImageError
from image_classifier.serving.batching import Batcher, DeadlineError, InferenceError, QueueFullError, Ticket
from image_classifier.serving.candidates import PinnedTicket
from image_classifier.serving.limits import CallerLimits, count_pixels
from image_classifier.serving.problems import Problem
from image_classifier.serving.schemas import API_VERSION, DEFAULT_TOP_K, MAX_REQUEST_ID, Prediction, Predictions
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import Metrics

LARGE_BYTES = 64 * 2**10
"""Bodies from this size on are parsed in another thread, one at a time."""

MAX_BODIES_BYTES = 64 * 2**20
"""Limit of all request bodies in memory together."""

T = TypeVar("T")


class Caller(NamedTuple):
    """The sender of a request.

    Attributes:
        name: of the API key or token; empty without authentication.
        payer: whose rate limits and share of the decoding time the request uses.
    """

    name: str
    payer: str


class ClientLeft(Exception):
    """The client has disconnected."""


class Service:
    """What all prediction routes share.

    Args:
        name: of the model in the Open Inference Protocol.

    Attributes:
        recorder: captures answers; None if capture is off.
        is_draining: the server is shutting down.
    """

    def __init__(
        self, settings: ServerSettings, batcher: Batcher, metrics: Metrics, name: str, recorder: Recorder | None = None
    ) -> None:
        self.settings = settings
        self.batcher = batcher
        self.metrics = metrics
        self.name = name
        self.recorder = recorder
        self.limits = CallerLimits(settings.rate_limit, settings.pixel_rate_limit)
        self.is_draining = False
        prefix = secrets.token_hex(6)
        self._ids = (f"{prefix}-{number:x}" for number in itertools.count())
        self._bodies_bytes = 0
        self._cache: OrderedDict[bytes, Ticket] = OrderedDict()
        self._parser = ThreadPoolExecutor(1, "parser")

    @property
    def is_ready(self) -> bool:
        """Whether a load balancer should send requests."""
        return not self.is_draining and self.batcher.is_beating()

    def find_id(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the valid `X-Request-ID` of a request, or a new id."""
        given = headers.get(b"x-request-id")
        if given is not None and len(given) <= MAX_REQUEST_ID:
            text = given.decode("latin-1")
            if text.isascii() and text.isprintable() and text:
                return text
        return next(self._ids)

    # Bodies

    @asynccontextmanager
    async def hold_body(self, request: Request) -> AsyncIterator[list[bytes]]:
        """Read the body of a request as chunks for `parse`. It counts against the memory limit until the block ends.

        Raises:
            Problem: the body is too large, or there is no memory for it.
            ClientLeft: the client disconnected.
        """
        limit = self.settings.max_body_bytes
        too_large = Problem("body-too-large", f"the limit is {limit:,} bytes")
        declared = request.headers.get("content-length", "0")
        if len(declared) > 15 or int(declared) > limit:
            raise too_large
        chunks: list[bytes] = []
        length = 0
        try:
            async for chunk in request.stream():
                if length + len(chunk) > limit:
                    raise too_large
                if self._bodies_bytes + len(chunk) > MAX_BODIES_BYTES:
                    raise Problem("queue-full", "too many large bodies at once; try again later")
                length += len(chunk)
                self._bodies_bytes += len(chunk)
                chunks.append(chunk)
            yield chunks
        except ClientDisconnect:
            raise ClientLeft from None
        finally:
            self._bodies_bytes -= length

    async def parse(self, chunks: list[bytes], function: Callable[..., T], *arguments: Any) -> T:
        """Parse a body by `function`, in another thread if it is large. This empties `chunks`."""

        def parse() -> T:
            body = b"".join(chunks)
            chunks.clear()
            return function(body, *arguments)

        if sum(map(len, chunks)) < LARGE_BYTES:
            return parse()
        return await asyncio.get_running_loop().run_in_executor(self._parser, parse)

    # Images

    async def compute(self, tickets: Sequence[Ticket], request: Request) -> list[Ticket]:
        """Compute the images of one request, all with the same model.

        Raises:
            Problem: the queue is full, the deadline passed, or an image cannot be decoded.
            ClientLeft: the client disconnected.
        """
        exchange = request.scope.get("exchange")  # `protocol.AppExchange` cancels `waiting` if the client disconnects
        payer = request.scope["caller"].payer
        for ticket in tickets:
            ticket.caller = payer
        if self.limits.counts_pixels:
            self.limits.charge(payer, await asyncio.to_thread(count_all_pixels, tickets))
        try:
            self.batcher.check_room(len(tickets))
            computed = await self._submit_all(tickets, exchange)
            if self.batcher.canary is not None and len({id(ticket.classifier) for ticket in computed}) > 1:
                pinned = [PinnedTicket(ticket.pixels) for ticket in computed]  # the canary failed for some of them
                computed = await self._submit_all(pinned, exchange)
            return computed
        except (QueueFullError, DeadlineError, InferenceError, ImageError) as error:
            raise self.explain(error) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ClientLeft from error

    async def _submit_all(self, tickets: Sequence[Ticket], exchange: Any) -> list[Ticket]:
        submit = self.batcher.submit if self.settings.cache_size == 0 else self._submit_cached
        futures = [submit(ticket) for ticket in tickets]
        if exchange is not None:
            exchange.waiting = futures
        try:
            return [await future for future in futures]
        finally:
            if exchange is not None:
                exchange.waiting = ()
            if len(futures) > 1:
                for future in futures:
                    future.cancel()
                    if future.done() and not future.cancelled():
                        future.exception()  # marks it as retrieved: the client gets the first error

    def explain(self, error: Exception) -> Problem:
        """Convert an error of the batcher to a problem."""
        if isinstance(error, QueueFullError):
            return Problem("queue-full", f"{self.batcher.max_queue} images are waiting; try again later")
        if isinstance(error, DeadlineError):
            return Problem("deadline", f"no answer within {self.batcher.timeout_s:g} s; try again later")
        if isinstance(error, ImageError):
            return Problem("unreadable-image", str(error))
        return Problem("not-ready", "the server is stopping")

    def _submit_cached(self, ticket: Ticket) -> asyncio.Future[Ticket]:
        """Return the cached answer of the current model for an image; otherwise submit it and cache the answer."""
        kind = b"pixels" if ticket.pixels else " ".join(ticket.formats).encode()
        key = hashlib.sha256(kind + b"\0" + (ticket.pixels or ticket.content or b"")).digest()
        kept = self._cache.get(key)
        if kept is not None and kept.classifier is self.batcher.classifier:
            self._cache.move_to_end(key)
            self.metrics.cache.labels("hit").inc()
            self.metrics.count_predictions([kept])
            future: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
            future.set_result(kept)
            return future
        self.metrics.cache.labels("miss").inc()
        future = self.batcher.submit(ticket)
        future.add_done_callback(lambda done: self._keep(key, done))
        return future

    def _keep(self, key: bytes, future: asyncio.Future[Ticket]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._cache[key] = future.result()
            if len(self._cache) > self.settings.cache_size:
                self._cache.popitem(last=False)

    # Answers

    def build_answer(
        self, tickets: Sequence[Ticket], request_id: str, top_k: int = DEFAULT_TOP_K, *, shows_input: bool = False
    ) -> bytes:
        """Build the JSON answer of `/predict`."""
        model = tickets[0].classifier.model
        names = model.classes
        predictions: list[Prediction] = []
        for ticket in tickets:
            row = ticket.row
            best = [{"class": names[index], "probability": round(row[index], 6)} for index in ticket.order[:top_k]]
            prediction: Prediction = {**best[0], "top_k": best}  # type: ignore[typeddict-item]  # `class` is reserved
            if shows_input:
                assert ticket.pixels is not None
                prediction["input"] = base64.b64encode(ticket.pixels).decode()
            predictions.append(prediction)
        answer: Predictions = {
            "predictions": predictions,
            "request_id": request_id,
            "model_version": model.version,
            "api_version": API_VERSION,
        }
        return orjson.dumps(answer)


def count_all_pixels(tickets: Sequence[Ticket]) -> int:
    """Count the pixels of images without decoding them."""
    return sum(
        count_pixels(each.content, each.formats) if each.content else len(each.pixels or b"") // 3 for each in tickets
    )
