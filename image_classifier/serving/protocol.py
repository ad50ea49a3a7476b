"""HTTP/1.1 on one connection, for uvicorn, parsed by httptools. Every state has a deadline, and every buffer a limit.

It replaces uvicorn's protocol, which is open to attacks: slow and large heads, endless trailers, slow bodies, timers
that a client can switch off, lost answers. `SmallImage` answers a request with one small image here, without a task:
the overhead per request decides the throughput of a small network. `AppExchange` hands all other requests to the ASGI
application.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import MutableMapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import httptools

from image_classifier.serving.app import App
from image_classifier.serving.batching import SMALL_FILE_BYTES, InferenceError, QueueFullError, Ticket
from image_classifier.serving.problems import Problem, build_raw_head
from image_classifier.serving.requests import IMAGE_TYPES, PIXELS
from image_classifier.serving.service import Caller, count_all_pixels

if TYPE_CHECKING:
    from uvicorn.server import ServerState

MAX_HEAD_BYTES = 32 * 2**10
LINE_BYTES = len(b"GET  HTTP/1.1\r\n\r\n")
MAX_PIPELINED = 32
BUFFER_BYTES = 64 * 2**10
"""Size of the unread part of a body from which reading pauses."""

LINGER_S = 10.0
LINGER_BYTES = 128 * 2**20
"""Limits for reading on after a refusal: a client that is still sending would otherwise not see the answer."""

FRESH_S = 1.0
"""Time that shutdown waits for the first request of a new connection."""

SMALL_PIXEL_BYTES = 16 * 2**10
"""Largest raw image for the fast path: 64 x 64 pixels."""

HEAD_200 = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
NOBODY = Caller("", "")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_ADDRESS = re.compile(r"[\d.]+|\[[\da-f:.]+\]")
"""IP addresses, which no web page can use as its host name."""

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}

logger = logging.getLogger(__name__)


class Head:
    """The head of a request.

    Attributes:
        began: time of arrival, by `time.perf_counter`.
        headers: lower-case names with values, in the order of the request.
        fields: value by name; the last one if a name is repeated.
    """

    __slots__ = ("began", "fields", "headers", "is_upgrade", "keeps_alive", "method", "target", "version")

    def __init__(self, parser: Any, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.began = time.perf_counter()
        self.method: bytes = parser.get_method()
        self.version: str = parser.get_http_version()
        self.is_upgrade: bool = parser.should_upgrade()
        self.keeps_alive: bool = parser.should_keep_alive() and not self.is_upgrade
        self.target = target
        self.headers = headers
        self.fields = dict(headers)

    def check(self, allowed_hosts: frozenset[str] | None) -> None:
        """Refuse requests that a proxy and this server could interpret differently (request smuggling).

        Raises:
            Problem: `bad-request` or `unknown-host`.
        """
        fields = self.fields
        if self.version not in ("1.1", "1.0"):
            raise Problem("bad-request", "use HTTP/1.1")
        if len(fields) < len(self.headers):
            names = [name for name, _ in self.headers]
            if any(names.count(name) > 1 for name in (b"host", b"content-length", b"transfer-encoding")):
                raise Problem("bad-request", "Host, Content-Length and Transfer-Encoding must not be repeated")
        if _CONTROL.search(b"".join(fields.values())):
            raise Problem("bad-request", "a header has a control character")
        if self.is_upgrade and (b"transfer-encoding" in fields or fields.get(b"content-length", b"0") != b"0"):
            raise Problem("bad-request", "an upgrade request must not have a body")
        coding = fields.get(b"transfer-encoding")
        if coding is not None:
            if coding.lower() != b"chunked" or self.version == "1.0" or b"content-length" in fields:
                detail = "Transfer-Encoding must be chunked, in HTTP/1.1 and without Content-Length"
                raise Problem("bad-request", detail)
        self._check_host(allowed_hosts)

    def _check_host(self, allowed_hosts: frozenset[str] | None) -> None:
        host = self.fields.get(b"host")
        if host is None:
            if self.version == "1.1":
                raise Problem("bad-request", "the header Host is missing")
            return
        if not self.target.startswith(b"/") and self.target != b"*":
            authority = self.target.partition(b"://")[2].partition(b"/")[0]
            if authority.lower() != host.lower():
                raise Problem("bad-request", "the request target and the header Host name different hosts")
        if allowed_hosts is not None:
            name = re.sub(r":\d*$", "", host.decode("latin-1").lower())
            if name not in allowed_hosts and not _ADDRESS.fullmatch(name):
                raise Problem("unknown-host", "--allowed_hosts does not include this host name")


class Exchange:
    """A request and its answer.

    Attributes:
        client: address and port.
        has_begun: it is this request's turn to be answered.
        is_whole: the whole request has arrived.
        has_answer: the answer has begun.
        is_answered: the transport has the whole answer.
        keeps_alive: the connection stays open afterwards.
        answer_by: deadline of the answer, on the event loop's clock; set when the request is whole.
    """

    __slots__ = (
        "answer_by",
        "client",
        "connection",
        "has_answer",
        "has_begun",
        "head",
        "is_answered",
        "is_whole",
        "keeps_alive",
    )

    def __init__(self, connection: Connection, head: Head | None) -> None:
        self.connection = connection
        self.head = head
        self.is_whole = self.has_begun = self.has_answer = self.is_answered = False
        self.keeps_alive = head is not None and head.keeps_alive
        self.answer_by = float("inf")
        self.client = connection.find_client(head)

    def start(self) -> None:
        """Start to answer. All previous requests are answered, and writing is not paused."""

    def take(self, data: bytes) -> None:
        """Receive a part of the body."""

    def complete(self) -> None:
        """Receive the end of the request."""
        self.is_whole = True

    def leave(self) -> None:
        """Handle that the client disconnected."""

    def resume(self) -> None:
        """Continue writing."""

    @property
    def num_unread(self) -> int:
        """Number of bytes of the body that the application has not read."""
        return 0

    @property
    def lingers(self) -> bool:
        """Whether the client may still be sending after the answer: the rest of this request or another one."""
        return True

    def write(self, head: bytes, body: bytes) -> None:
        """Write a whole answer.

        Args:
            head: status line and the headers that are specific to this answer.
        """
        connection = self.connection
        parts = [head, *self.build_common(), b"content-length: %d\r\n\r\n" % len(body)]
        if self.head is None or self.head.method != b"HEAD":
            parts.append(body)
        connection.transport.write(b"".join(parts))
        self.finish()

    def build_common(self) -> list[bytes]:
        """Build the headers of every answer, and decide whether the connection stays open."""
        self.has_answer = True
        self.keeps_alive = self.keeps_alive and self.is_whole and not self.connection.is_last_of_all(self)
        parts = [part for header in self.connection.date for part in (header[0], b": ", header[1], b"\r\n")]
        if not self.keeps_alive:
            parts.append(b"connection: close\r\n")
        elif self.head is not None and self.head.version == "1.0":
            parts.append(b"connection: keep-alive\r\n")
        return parts

    def finish(self) -> None:
        """Mark the answer as complete, and continue with the next request."""
        self.is_answered = True
        self.connection.go_on()


class Refusal(Exchange):
    """The answer to a request that cannot be parsed or is refused; the connection ends after it."""

    __slots__ = ("_is_noted", "_problem")

    def __init__(self, connection: Connection, refused: Exchange | None, problem: Problem) -> None:
        super().__init__(connection, refused.head if refused else None)
        self.keeps_alive = False
        self._problem = problem
        self._is_noted = refused is not None and refused.has_begun

    @property
    def lingers(self) -> bool:
        return self._problem.kind != "too-many-connections"

    def start(self) -> None:
        app, head = self.connection.app, self.head
        app.metrics.count_refusal(self._problem.kind)
        request_id = app.service.find_id(head.fields) if head else None
        self.write(build_raw_head(self._problem), self._problem.build_body(request_id))
        if not self._is_noted:
            method, path = (head.method.decode("latin-1"), head.target.decode("latin-1")) if head else ("-", "-")
            began, fields = (head.began, head.fields) if head else (time.perf_counter(), {})
            app.note(method, path, "other", self._problem.status, began, fields, self.client, "", request_id)


class SmallImage(Exchange):
    """A request with one small image, answered without a task. It is the future of its own ticket."""

    __slots__ = ("_body", "_caller", "_is_cancelled")

    head: Head

    def __init__(self, connection: Connection, head: Head) -> None:
        super().__init__(connection, head)
        self._body = b""
        self._caller = NOBODY
        self._is_cancelled = False

    def take(self, data: bytes) -> None:
        self._body = self._body + data if self._body else data

    def complete(self) -> None:
        self.is_whole = True
        if self.has_begun:
            self._submit()

    def start(self) -> None:
        if self.is_whole:
            self._submit()

    def _submit(self) -> None:
        """Submit the image. The body is whole, and it is this request's turn."""
        app, fields = self.connection.app, self.head.fields
        try:
            self._caller = app.admit(fields, self.client)
            app.service.batcher.check_room(1)
        except (Problem, InferenceError, QueueFullError) as error:
            self.set_exception(error)
        except Exception:
            self._fail()
        else:
            formats = IMAGE_TYPES.get(fields[b"content-type"])
            ticket = Ticket(None, self._body, formats) if formats else Ticket(self._body)
            ticket.caller = self._caller.payer
            if app.service.limits.counts_pixels:
                app.service.limits.charge(ticket.caller, count_all_pixels((ticket,)))
            app.service.batcher.submit_to(ticket, self)

    def done(self) -> bool:
        """Return whether nobody waits for the answer any more."""
        return self.is_answered or self._is_cancelled

    def cancelled(self) -> bool:
        """Return whether the client disconnected."""
        return self._is_cancelled

    def set_result(self, ticket: Ticket) -> None:
        """Answer with the prediction."""
        app = self.connection.app
        request_id = app.service.find_id(self.head.fields)
        try:
            body = app.service.build_answer((ticket,), request_id)
        except Exception:  # concerns this request, not the batch
            self._fail()
            return
        self.write(HEAD_200, body)
        self._note(200, request_id)
        if app.service.recorder is not None:
            app.service.recorder.record(ticket.classifier.model, (ticket,), request_id, self._caller.name)

    def set_exception(self, error: Exception) -> None:
        """Answer with an error."""
        app = self.connection.app
        problem = error if isinstance(error, Problem) else app.service.explain(error)
        request_id = app.service.find_id(self.head.fields)
        app.metrics.count_refusal(problem.kind)
        self.write(build_raw_head(problem), problem.build_body(request_id))
        self._note(problem.status, request_id)

    def _fail(self) -> None:
        logger.exception("unexpected error in POST /predict")
        self.set_exception(Problem("internal", "see the server's log"))

    def leave(self) -> None:
        if not self.is_answered and not self._is_cancelled:
            self._is_cancelled = True
            if self.has_begun:
                self._note(499, None)

    def _note(self, status: int, request_id: str | None) -> None:
        app = self.connection.app
        app.note(
            "POST",
            app.predict_path,
            "/predict",
            status,
            self.head.began,
            self.head.fields,
            self.client,
            self._caller.name,
            request_id,
        )


class AppExchange(Exchange):
    """A request that the ASGI application answers, in a task.

    Attributes:
        waiting: futures that the application awaits, which are cancelled if the client disconnects.
    """

    __slots__ = ("_body", "_change", "_has_left", "_is_chunked", "_is_continued", "_is_read", "_scope", "waiting")

    head: Head

    def __init__(self, connection: Connection, head: Head) -> None:
        super().__init__(connection, head)
        self.waiting: Sequence[asyncio.Future[Ticket]] = ()
        self._body = bytearray()
        self._change = asyncio.Event()
        self._has_left = self._is_chunked = self._is_read = False
        self._is_continued = head.fields.get(b"expect", b"").lower() != b"100-continue"
        self._scope = self._build_scope(head)

    def _build_scope(self, head: Head) -> dict[str, Any]:
        connection = self.connection
        try:
            url = httptools.parse_url(head.target)
        except httptools.HttpParserInvalidURLError:
            raise Problem("bad-request", "the request target is not a path") from None
        raw_path: bytes = url.path or b"/"
        root_path = connection.app.settings.root_path
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "server": connection.server,
            "client": self.client,
            "scheme": "https" if self._came_by_https(head) else "http",
            "method": head.method.decode("ascii"),
            "root_path": root_path,
            "path": root_path + unquote(raw_path.decode("ascii", "replace")),
            "raw_path": root_path.encode() + raw_path,
            "query_string": url.query or b"",
            "headers": head.headers,
            "exchange": self,
        }

    def _came_by_https(self, head: Head) -> bool:
        proxies, peer = self.connection.app.proxies, self.connection.peer
        is_trusted = proxies is not None and peer is not None and proxies.trusts(peer[0])
        return is_trusted and head.fields.get(b"x-forwarded-proto") == b"https"

    def start(self) -> None:
        connection = self.connection
        task = connection.loop.create_task(self._run())
        connection.tasks.add(task)
        task.add_done_callback(connection.tasks.discard)

    async def _run(self) -> None:
        try:
            await self.connection.app(self._scope, self._receive, self._send)
        except Exception:
            logger.exception("unexpected error in %s", self._scope["path"])
        if not self.is_answered and not self._has_left:
            self.connection.abort()  # so that the client does not take an incomplete answer for a whole one

    def take(self, data: bytes) -> None:
        if self.is_answered:
            return
        self._body += data
        self._change.set()

    def complete(self) -> None:
        self.is_whole = True
        self._change.set()

    def leave(self) -> None:
        self._has_left = True
        self._change.set()
        for future in self.waiting:
            future.cancel()

    def resume(self) -> None:
        self._change.set()

    @property
    def num_unread(self) -> int:
        return len(self._body)

    async def _receive(self) -> dict[str, Any]:
        if not self._is_continued and not self.is_whole and not self._has_left:
            self._is_continued = True
            self.connection.transport.write(CONTINUE)
        while not (self._has_left or self.is_answered or (not self._is_read and (self._body or self.is_whole))):
            await self._wait()
        if self._has_left or self.is_answered:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        self._is_read = self.is_whole
        self.connection.balance_reading()
        return {"type": "http.request", "body": body, "more_body": not self.is_whole}

    async def _wait(self) -> None:
        self._change.clear()
        await self._change.wait()

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        connection = self.connection
        while connection.is_writing_paused and not self._has_left:
            await self._wait()
        if self._has_left or self.is_answered:
            return
        if message["type"] == "http.response.start":
            self._write_head(message["status"], message.get("headers", ()))
            return
        body, is_last = message.get("body", b""), not message.get("more_body", False)
        if self.head.method != b"HEAD":
            if self._is_chunked:
                body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
                body += b"0\r\n\r\n" if is_last else b""
            connection.transport.write(body)
        if is_last:
            self.finish()

    def _write_head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        parts = [_STATUS_LINES[status]]
        has_length = False
        for name, value in headers:
            has_length = has_length or name.lower() == b"content-length"
            parts += (name, b": ", value, b"\r\n")
        if not has_length and status >= 200 and status not in (204, 304):
            if self.head.version == "1.1":
                self._is_chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keeps_alive = False
        self.connection.transport.write(b"".join([*parts, *self.build_common(), b"\r\n"]))


def build_too_large() -> Problem:
    """Build the problem of a head or trailers above the size limit."""
    return Problem("head-too-large", f"the limit is {MAX_HEAD_BYTES:,} bytes")


def is_small_image(app: App, head: Head) -> bool:
    """Return whether a request is one small image without special options."""
    fields = head.fields
    if head.target != b"/predict" or head.method != b"POST" or head.version != "1.1" or not app.has_fast_path:
        return False
    kind, length = fields.get(b"content-type"), fields.get(b"content-length", b"0")
    if kind == PIXELS:
        num_bytes = app.service.batcher.num_bytes
        if num_bytes > SMALL_PIXEL_BYTES or length != b"%d" % num_bytes:
            return False
    elif kind not in IMAGE_TYPES or len(length) > 4 or not 0 < int(length) <= SMALL_FILE_BYTES:
        return False
    is_plain = b"content-encoding" not in fields and b"expect" not in fields
    return is_plain and int(length) <= app.settings.max_body_bytes


class Connection(asyncio.Protocol):
    """One connection to an untrusted client.

    `_exchanges` holds the requests in order until they are answered. The last one may still be arriving. While a
    second request waits, reading pauses.

    Args:
        app: the application.
        server_state: uvicorn's `ServerState`; `connections`, `tasks` and `default_headers` are used.
    """

    def __init__(self, app: App, server_state: ServerState) -> None:
        self.app = app
        self.loop = asyncio.get_running_loop()
        self.tasks = server_state.tasks
        self.transport: asyncio.Transport
        self.peer: tuple[str, int] | None = None
        self.server: tuple[str, int] | None = None
        self.is_writing_paused = False
        self._state = server_state
        self._parser = httptools.HttpRequestParser(self)
        self._exchanges: deque[Exchange] = deque()
        self._arriving: Exchange | None = None
        self._has_begun = self._is_in_head = self._takes_no_more = self._is_reading_paused = self._is_busy = False
        self._is_further = False
        self._num_head_bytes = self._num_idle_bytes = self._num_discarded = 0
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._made_at = self.loop.time()
        self._idle_by = self._read_by = self._made_at + app.settings.header_timeout_s
        self._close_by: float | None = None

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self.peer, self.server = (tuple(each[:2]) if each else None for each in (peer, own))
        connections = self._state.connections
        connections.add(self)  # type: ignore[arg-type]  # has the methods that uvicorn calls
        self.app.metrics.connections.set(len(connections))
        if len(connections) > self.app.settings.max_connections:
            self.app.metrics.rejected.labels("too-many-connections").inc()
            self._refuse(Problem("too-many-connections", "try again later"))

    def connection_lost(self, exc: Exception | None) -> None:
        connections = self._state.connections
        connections.discard(self)
        self.app.metrics.connections.set(len(connections))
        self._drop()

    def data_received(self, data: bytes) -> None:
        if self._takes_no_more:
            self._num_discarded += len(data)
            if self._num_discarded > LINGER_BYTES:
                self.abort()
            return
        self._is_busy = True
        self._is_further = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # answered without upgrade, as the last request
            self._takes_no_more = True
        except httptools.HttpParserError as error:
            self._refuse(self._explain(error))
        self._num_idle_bytes = 0 if self._is_further else self._num_idle_bytes + len(data)
        if self._num_idle_bytes > MAX_HEAD_BYTES:  # an endless header, trailer or chunk extension
            self._refuse(build_too_large())
        self._is_busy = False
        self.go_on()

    @staticmethod
    def _explain(error: httptools.HttpParserError) -> Problem:
        if isinstance(error.__context__, Problem):
            return error.__context__
        if error.__context__ is not None:
            logger.error("unexpected error while parsing a request", exc_info=error.__context__)
            return Problem("internal", "see the server's log")
        return Problem("bad-request", "this is not an HTTP request")

    def pause_writing(self) -> None:
        self.is_writing_paused = True

    def resume_writing(self) -> None:
        self.is_writing_paused = False
        if self._exchanges:
            self._exchanges[0].resume()
        self.go_on()

    # What the parser calls

    def on_message_begin(self) -> None:
        if len(self._exchanges) >= MAX_PIPELINED:
            raise Problem("bad-request", f"at most {MAX_PIPELINED} requests may be pipelined")
        self._has_begun = self._is_in_head = self._is_further = True
        self._num_head_bytes = LINE_BYTES
        self._target, self._headers = b"", []
        self._read_by = self.loop.time() + self.app.settings.header_timeout_s

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if self._is_in_head:  # otherwise it is a trailer, which is ignored
            self._headers.append((name.lower(), value))

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            raise build_too_large()

    def on_headers_complete(self) -> None:
        app = self.app
        self._is_in_head, self._is_further = False, True
        self._num_head_bytes = 0
        self._read_by = self.loop.time() + app.settings.body_timeout_s
        head = Head(self._parser, self._target, self._headers)
        self._arriving = exchange = SmallImage(self, head) if is_small_image(app, head) else AppExchange(self, head)
        self._exchanges.append(exchange)
        head.check(app.allowed_hosts)

    def on_body(self, body: bytes) -> None:
        self._is_further = True
        if self._arriving is not None:
            self._arriving.take(body)

    def on_message_complete(self) -> None:
        self._is_further = True
        exchange, self._arriving = self._arriving, None
        if exchange is None:
            return
        exchange.answer_by = self._find_answer_time()
        exchange.complete()
        if not exchange.keeps_alive:
            self._takes_no_more = True

    # From request to answer

    def go_on(self) -> None:
        """Answer the next requests, and close the connection after the last answer."""
        if self._is_busy:
            return
        self._is_busy = True
        while self._exchanges and not self.is_writing_paused:
            exchange = self._exchanges[0]
            if not exchange.has_begun:
                exchange.has_begun = True
                if exchange.is_whole:
                    exchange.answer_by = self._find_answer_time()
                exchange.start()
            if not exchange.is_answered:
                break
            self._exchanges.popleft()
            self._idle_by = self.loop.time() + self.app.settings.keep_alive_s
            if not exchange.keeps_alive:
                self._end(lingers=exchange.lingers)
                return  # stay busy, so that nothing more is answered
        self._is_busy = False
        self.balance_reading()

    def balance_reading(self) -> None:
        """Pause reading while a second request waits or the application reads a body too slowly; otherwise resume."""
        first = self._exchanges[0] if self._exchanges else None
        is_full = first is not None and (len(self._exchanges) > 1 or first.num_unread > BUFFER_BYTES)
        if is_full == self._is_reading_paused or self.transport.is_closing():
            return
        self._is_reading_paused = is_full
        if is_full:
            self.transport.pause_reading()
        else:
            self._read_by = self.loop.time() + self.app.settings.body_timeout_s
            self.transport.resume_reading()

    @property
    def date(self) -> list[tuple[bytes, bytes]]:
        """The Date header."""
        return self._state.default_headers

    def find_client(self, head: Head | None) -> tuple[str, int] | None:
        """Find the client's address and port: the peer's, or the address that a trusted proxy forwards."""
        proxies, peer = self.app.proxies, self.peer
        if proxies is None or head is None or peer is None:
            return peer
        address = proxies.find_client(peer[0], head.fields.get(b"x-forwarded-for"))
        return peer if address == peer[0] else (address, 0)

    def is_last_of_all(self, exchange: Exchange) -> bool:
        """Return whether the server is shutting down and an exchange is the last of this connection."""
        return self.app.service.is_draining and self._exchanges[-1] is exchange and not self._is_in_head

    def _find_answer_time(self) -> float:
        return self.loop.time() + self.app.settings.timeout_s + self.app.settings.body_timeout_s

    def _refuse(self, problem: Problem) -> None:
        """Answer the request that is arriving with a problem, in its turn, and accept no more requests."""
        self._takes_no_more = True
        self._is_in_head = False
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            if arriving.has_answer:  # keep this answer, as the last of the connection
                arriving.answer_by = self._find_answer_time()
                return
            self._exchanges.pop()
            arriving.leave()
        elif self._exchanges and not self._exchanges[-1].keeps_alive:  # ignore data after the last request
            return
        refusal = Refusal(self, arriving, problem)
        refusal.answer_by = self._find_answer_time()
        self._exchanges.append(refusal)
        self.go_on()

    def _end(self, *, lingers: bool) -> None:
        """Close the connection after the written data.

        Args:
            lingers: read on for a while; otherwise a client that is still sending gets a reset instead of its answer.
        """
        self._drop()
        if self.transport.is_closing():
            return
        if self._is_reading_paused:
            self._is_reading_paused = False
            self.transport.resume_reading()
        if lingers:
            self.transport.write_eof()
        else:
            self.transport.close()
        self._close_by = self.loop.time() + LINGER_S

    def abort(self) -> None:
        """Cut the connection."""
        self._drop()
        self.transport.abort()
        self._close_by = self.loop.time() + LINGER_S

    def _drop(self) -> None:
        """Cancel all requests, and accept no more."""
        self._takes_no_more = self._is_busy = True
        self._is_in_head, self._arriving = False, None
        for exchange in self._exchanges:
            exchange.leave()
        self._exchanges.clear()

    # Deadlines

    @property
    def deadline(self) -> float:
        """Time at which the connection is closed unless something happens, on the event loop's clock; always finite."""
        if self._close_by is not None:
            return self._close_by
        times = []
        first = self._exchanges[0] if self._exchanges else None
        if first is not None:
            times.append(first.answer_by)
        if self._is_reading():
            times.append(self._read_by)
        return min(times, default=self._idle_by)

    def _is_reading(self) -> bool:
        """Return whether the server waits for the rest of a request."""
        is_incomplete = self._is_in_head or self._arriving is not None
        return is_incomplete and not (self._is_reading_paused and len(self._exchanges) > 1)

    def sweep(self, now: float) -> None:
        """Close the connection if its deadline has passed."""
        if now < self.deadline:
            return
        if self._close_by is not None:
            self.abort()
        elif self._is_reading() and now >= self._read_by:
            if self._arriving is not None and self._arriving.has_answer:
                self.abort()
            else:
                self.app.metrics.rejected.labels("request-timeout").inc()
                self._refuse(Problem("request-timeout", "send the request faster"))
        elif self._exchanges:
            self.abort()  # the client does not read, or the application did not answer
        else:
            self._end(lingers=False)

    def shutdown(self) -> None:
        """Close once all requests that arrived are answered. Uvicorn calls this at shutdown."""
        if self._exchanges or self._is_in_head or self._close_by is not None:
            return
        if self._has_begun:
            self._end(lingers=False)
        else:
            self._idle_by = self._made_at + FRESH_S
