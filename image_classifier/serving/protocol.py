"""uvicorn's HTTP protocol with what it leaves open: slow and large heads, slow bodies, clients that leave.

Each connection always has a deadline: for the head, then for the body, then for the answer; between two requests
uvicorn's own timer for idle connections runs. `sweep` ends those that are past it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from image_classifier.serving.app import App
from image_classifier.serving.batching import NUM_BYTES, SMALL_FILE_BYTES, InferenceError, QueueFullError, Ticket
from image_classifier.serving.problems import Problem, build_raw_answer, build_raw_head
from image_classifier.serving.requests import IMAGE_TYPES, PIXELS, PredictRequest

MAX_HEAD_BYTES = 32 * 2**10
MAX_PIPELINED = 32
NUM_PIXEL_BYTES = str(NUM_BYTES).encode()
NEVER = float("inf")
CLOSE_S = 5.0
"""After so long a connection that is to be closed, but whose client takes nothing, is cut."""

logger = logging.getLogger(__name__)


class ShortCycle:
    """One small image, answered without a task: what uvicorn's RequestResponseCycle does for the others.

    To the batcher it is the future of the image, whose result it writes at once. A small network's throughput is
    decided by how little happens here.

    Attributes:
        more_body, response_started, response_complete, keep_alive, disconnected, body, message_event: what the protocol
            asks of a cycle.
    """

    __slots__ = (
        "_began",
        "_caller",
        "_headers",
        "_is_cancelled",
        "_protocol",
        "body",
        "disconnected",
        "keep_alive",
        "message_event",
        "more_body",
        "response_complete",
        "response_started",
    )

    def __init__(self, protocol: GuardedProtocol, headers: dict[bytes, bytes]) -> None:
        self.body = bytearray()
        self.more_body = self.keep_alive = True
        self.response_started = self.response_complete = self.disconnected = self._is_cancelled = False
        self.message_event = NO_EVENT
        self._protocol = protocol
        self._headers = headers
        self._caller = ""
        self._began = time.perf_counter()

    def begin(self) -> None:
        """Ask for the answer, now that the body is whole."""
        app = self._protocol.app
        try:
            self._caller = app.gate.recognise(self._headers)
            app.batcher.check_room(1)
        except Problem as problem:
            self._refuse(problem)
        except (InferenceError, QueueFullError) as error:
            self.set_exception(error)
        except Exception:
            self._fail()
        else:
            formats = IMAGE_TYPES.get(self._headers[b"content-type"])
            body = bytes(self.body)
            ticket = Ticket(None, body, formats) if formats else Ticket(body)
            app.batcher.submit(ticket, self)  # type: ignore[arg-type]  # as far as is used

    def done(self) -> bool:
        """Say whether nobody waits any more."""
        return self.response_complete or self._is_cancelled

    def cancelled(self) -> bool:
        """Say whether the client has left."""
        return self._is_cancelled

    def cancel(self) -> None:
        """Note that the client has left."""
        if not self.response_complete:
            self._is_cancelled = True
            self._note(499, None)

    def set_result(self, ticket: Ticket) -> None:
        """Answer with a computed image."""
        request = PredictRequest()
        try:
            body = self._protocol.app.build_answer((ticket,), request, self._headers)
        except Exception:  # which is this request's, and none of the batch's
            self._fail()
            return
        self._write(HEAD_200, body)
        self._note(200, request.request_id)

    def set_exception(self, error: Exception) -> None:
        """Answer with what went wrong."""
        self._refuse(self._protocol.app.explain(error))

    def _fail(self) -> None:
        """Answer where something happened that should not, and log what."""
        logger.exception("unexpected error in POST /predict")
        self._refuse(Problem("internal", "the server's log has the reason"))

    def _refuse(self, problem: Problem) -> None:
        app = self._protocol.app
        app.metrics.count_refusal(problem.kind)
        request_id = app.find_id(self._headers)
        self._write(build_raw_head(problem), problem.build_body(request_id))
        self._note(problem.status, request_id)

    def _write(self, head: bytes, body: bytes) -> None:
        protocol = self._protocol
        parts = [head]
        for name, value in protocol.server_state.default_headers:  # the date
            parts += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            parts.append(b"connection: close\r\n")
        parts += (b"content-length: %d\r\n\r\n" % len(body), body)
        self.response_started = self.response_complete = True
        protocol.transport.write(b"".join(parts))
        if not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()

    def _note(self, status: int, request_id: str | None) -> None:
        protocol = self._protocol
        protocol.app.note(
            "POST",
            protocol.app.predict_path,
            "/predict",
            status,
            self._began,
            self._headers,
            protocol.client,
            self._caller,
            request_id,
        )


class _NoEvent:
    def set(self) -> None:
        """Wake nobody: nobody waits."""


NO_EVENT = _NoEvent()
HEAD_200 = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


class GuardedProtocol(HttpToolsProtocol):
    """One connection, of which nothing is taken for granted.

    Attributes:
        waiting: futures of the images that this connection's client waits for.
        deadline: on the event loop's clock.
        has_begun: whether a request ever began to arrive.
    """

    app: App

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waiting: Iterable[asyncio.Future[Any] | ShortCycle] = ()
        self.deadline = NEVER
        self.has_begun = False
        self._in_head = False
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self.deadline = self.loop.time() + self.app.settings.header_timeout_s
        self.app.metrics.connections.set(len(self.connections))
        if len(self.connections) > self.app.settings.max_connections:
            self.app.metrics.rejected.labels("too-many-connections").inc()
            self._end(Problem("too-many-connections", "try again"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.app.metrics.connections.set(len(self.connections))
        self.deadline = NEVER
        for future in self.waiting:
            future.cancel()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # what a client sends after we have answered for the last time
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes + (0 if self._head_bytes else len(data)) > MAX_HEAD_BYTES:
            self._end(Problem("head-too-large", f"a head may have {MAX_HEAD_BYTES:,} bytes"))

    def send_400_response(self, msg: str) -> None:
        self._end(Problem("bad-request", "this is no HTTP request"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.has_begun = self._in_head = True
        self._head_bytes = 0
        self.deadline = self.loop.time() + self.app.settings.header_timeout_s

    def on_headers_complete(self) -> None:
        settings = self.app.settings
        self._in_head = False
        self.deadline = self.loop.time() + settings.body_timeout_s
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError("too many requests at once")
        if self.url == b"/predict" and self._take_short_way():
            return
        self.scope["connection"] = self  # type: ignore[typeddict-unknown-key]  # ours, for the application
        super().on_headers_complete()
        if self.app.is_draining:
            self.cycle.keep_alive = False

    def _take_short_way(self) -> bool:
        """Let a ShortCycle answer where the request is one small image, and nothing about it is special."""
        if not (self.cycle is None or self.cycle.response_complete) or not self.app.has_short_way:
            return False
        if self.flow.write_paused:  # a client that does not read; the other way waits for it
            return False
        headers = dict(self.headers)
        kind, length = headers.get(b"content-type"), headers.get(b"content-length", b"0")
        if kind == PIXELS:
            if length != NUM_PIXEL_BYTES:
                return False
        elif kind not in IMAGE_TYPES or len(length) > 4 or not 0 < int(length) <= SMALL_FILE_BYTES:
            return False
        if int(length) > self.app.settings.max_body_bytes:
            return False
        if self.expect_100_continue or self.parser.get_method() != b"POST" or self.parser.should_upgrade():
            return False
        if self.parser.get_http_version() != "1.1" or not self.parser.should_keep_alive():
            return False
        if b"content-encoding" in headers:
            return False
        cycle = ShortCycle(self, headers)
        self.cycle = cycle  # type: ignore[assignment]  # does what the protocol asks of a cycle
        self.waiting = (cycle,)
        return True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        settings = self.app.settings
        self.deadline = self.loop.time() + settings.timeout_s + settings.body_timeout_s
        cycle: object = self.cycle
        if isinstance(cycle, ShortCycle) and not cycle.response_complete:
            cycle.begin()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.cycle.more_body and not self._in_head:
            if not self.transport.is_closing():  # else it has a deadline for that
                self.deadline = NEVER

    def sweep(self, now: float) -> None:
        """End a connection that is past its deadline."""
        if now < self.deadline:
            return
        if self.transport.is_closing():
            self.transport.abort()
        elif not self.has_begun or (self.cycle is not None and self.cycle.response_started):
            self.transport.close()
            self.deadline = now + CLOSE_S
        else:
            self._end(Problem("request-timeout", "send the whole request in less time"))
            self.app.metrics.rejected.labels("request-timeout").inc()

    def _end(self, problem: Problem) -> None:
        """Answer outside of any request, and close."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(build_raw_answer(problem))
        self.transport.close()
        self._in_head = False
        self.deadline = self.loop.time() + CLOSE_S
