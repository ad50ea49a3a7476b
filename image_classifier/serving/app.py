"""The application: `POST /predict` as bare ASGI, because for a small network the server is the whole cost.

Everything else (health, model, metrics, documents, the page, the Open Inference Protocol) goes through Starlette's
router. Both share what is around a request: who asks, the problem answers, metrics, and the line in the log.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from image_classifier.errors import ImageError
from image_classifier.files import read_file
from image_classifier.published.folder import CARD, MANIFEST, one_line
from image_classifier.published.predictor import PublishedModel
from image_classifier.serving import oip, site
from image_classifier.serving.auth import Gate
from image_classifier.serving.batching import (
    NUM_BYTES,
    Batcher,
    DeadlineError,
    InferenceError,
    QueueFullError,
    Ticket,
)
from image_classifier.serving.openapi import API_VERSION, build_openapi
from image_classifier.serving.problems import CONTENT_TYPE, Problem
from image_classifier.serving.requests import DEFAULT_TOP_K, PIXELS, PredictRequest, parse_body, parse_query
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import Metrics, RequestLog

OPEN_PATHS = frozenset(("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"))
JSON_TYPE = (b"content-type", b"application/json")
LARGE = 64 * 2**10
"""Bodies from here on are parsed off the event loop."""

MAX_BODIES_BYTES = 256 * 2**20
"""Bytes of all bodies that are held at once, at most; however many clients send large ones."""

MAX_SHOWN_BYTES = 2**22
"""Of the card and of the manifest, which `/model` shows; a manifest has a bit for each test image."""

logger = logging.getLogger(__name__)


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class App:
    """One server's application, as ASGI.

    Args:
        name: the model's, in the Open Inference Protocol.
    """

    def __init__(
        self,
        settings: ServerSettings,
        batcher: Batcher,
        gate: Gate,
        metrics: Metrics,
        name: str,
    ) -> None:
        self.settings = settings
        self.batcher = batcher
        self.metrics = metrics
        self.is_draining = False
        self.gate = gate
        self.name = name
        self._log = RequestLog(settings.log_lines_per_s)
        self.predict_path = f"{settings.root_path}/predict"
        self._prefix_length = len(settings.root_path)
        prefix = secrets.token_hex(6)
        self._ids = (f"{prefix}-{number:x}" for number in itertools.count())
        self._cache: OrderedDict[bytes, Ticket] = OrderedDict()
        self._bodies_bytes = 0
        self._router, self._patterns = self._build_router()
        self._handle: Callable[[Scope, Receive, Send], Awaitable[None]] = self._handle_request
        if settings.trusted_proxies:
            from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

            proxied: Any = ProxyHeadersMiddleware
            self._handle = proxied(self._handle, settings.trusted_proxies)
        if settings.traces:
            from image_classifier.serving.tracing import trace

            self._handle = trace(self._handle)  # outermost: a span has the client's own address

    @property
    def has_short_way(self) -> bool:
        """Whether `protocol.ShortCycle` may answer: nothing stands around the application, or between two requests."""
        settings = self.settings
        return not (self.is_draining or settings.trusted_proxies or settings.traces or settings.cache_size)

    @property
    def is_ready(self) -> bool:
        """Whether a balancer should send requests here."""
        return not self.is_draining and self.batcher.is_beating()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or the server's start and end."""
        if scope["type"] == "http":
            await self._handle(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self.batcher.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.batcher.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, count it, and write its line."""
        began = time.perf_counter()
        method, path = scope["method"], scope["path"]
        headers = dict(scope["headers"])
        request = PredictRequest()
        caller = ""
        route = "/predict"
        try:
            if path == self.predict_path:
                if method != "POST":
                    raise Problem("method-not-allowed", "/predict takes POST", [(b"allow", b"POST")])
                caller = self.gate.recognise(headers)
                await self._predict(scope, headers, receive, send, request)
                status = 200
            else:
                route = self._find_route(path[self._prefix_length :])
                if route not in OPEN_PATHS and route not in site.PATHS:
                    caller = self.gate.recognise(headers)
                status = await self._route(scope, receive, send)
        except Problem as problem:
            status = problem.status
            self.metrics.count_refusal(problem.kind)
            await self._refuse(problem, route, send, request.request_id or self.find_id(headers))
        except ClientLeft:
            status = 499
        except Exception:
            status = 500
            logger.exception("unexpected error in %s %s", method, route)
            internal = Problem("internal", "the server's log has the reason")
            await self._refuse(internal, route, send, request.request_id or self.find_id(headers))
        self.note(method, path, route, status, began, headers, scope.get("client"), caller, request.request_id)

    def note(
        self,
        method: str,
        path: str,
        route: str,
        status: int,
        began: float,
        headers: dict[bytes, bytes],
        client: Sequence[Any] | None,
        caller: str,
        request_id: str | None,
    ) -> None:
        """Count an answered request, and write its line."""
        seconds = time.perf_counter() - began
        self.metrics.observe_request(method, route, status)(seconds)
        if (status >= 400 or route not in OPEN_PATHS) and self._log.has_room():
            trace = headers.get(b"traceparent", b"").split(b"-")
            self._log.write(
                method,
                path,
                status,
                seconds,
                http__request__id=request_id,
                client__ip=client[0] if client else None,
                user__name=caller,
                trace__id=trace[1][:32].decode("latin-1") if len(trace) == 4 else None,
            )

    async def _refuse(self, problem: Problem, route: str, send: Send, request_id: str) -> None:
        if route.startswith("/v2"):
            body, content_type = orjson.dumps({"error": problem.detail}), JSON_TYPE[1]
        else:
            body, content_type = problem.build_body(request_id), CONTENT_TYPE
        await _send(send, problem.status, body, [(b"content-type", content_type), *problem.build_headers()])

    def find_id(self, headers: dict[bytes, bytes]) -> str:
        """Find the request's name in `X-Request-ID`, or give it one."""
        given = headers.get(b"x-request-id")
        if given is not None and len(given) <= 128:
            text = given.decode("latin-1")
            if text.isascii() and text.isprintable() and text:
                return text
        return next(self._ids)

    # The way of an image

    async def _predict(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send, request: PredictRequest
    ) -> None:
        if scope["query_string"]:
            parse_query(scope["query_string"], request)
        content_type = headers.get(b"content-type", b"")
        self._check_length(headers)
        message = await receive()
        body: bytes = message.get("body", b"")
        is_plain = content_type == PIXELS and b"content-encoding" not in headers
        if is_plain and len(body) == NUM_BYTES and not message["more_body"]:
            request.tickets.append(Ticket(body))
            await self._answer(scope, headers, send, request)
            return
        held: list[int] = []
        try:
            body = await self._read_body(message, receive, held)
            parse = partial(parse_body, content_type, headers, body, request, max_images=self.settings.max_images)
            if len(body) < LARGE:
                parse()
            else:
                await asyncio.to_thread(parse)
            del body, parse
            await self._answer(scope, headers, send, request)
        finally:
            self._bodies_bytes -= sum(held)

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        """Refuse a body that says that it is too large, before any of it is read."""
        declared = headers.get(b"content-length", b"0")
        if len(declared) > 15 or int(declared) > self.settings.max_body_bytes:
            raise Problem("body-too-large", f"a body may have {self.settings.max_body_bytes:,} bytes")

    async def _read_body(self, message: Message, receive: Receive, held: list[int]) -> bytes:
        """Read the rest of a body, of which a first message is there, within the limits.

        Args:
            held: gets the bytes by which `_bodies_bytes` grew, also where this raises.
        """
        limit = self.settings.max_body_bytes
        chunks: list[bytes] = []
        length = 0
        while True:
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk = message.get("body", b"")
            length += len(chunk)
            if length > limit:
                raise Problem("body-too-large", f"a body may have {limit:,} bytes")
            if self._bodies_bytes + len(chunk) > MAX_BODIES_BYTES:
                raise Problem("queue-full", "too many large bodies at once; try again")
            held.append(len(chunk))
            self._bodies_bytes += len(chunk)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)
            message = await receive()

    async def _answer(self, scope: Scope, headers: dict[bytes, bytes], send: Send, request: PredictRequest) -> None:
        classes = self.batcher.classifier.model.classes
        if request.top_k is not None and request.top_k > len(classes):
            raise Problem("bad-request", f"top_k takes a whole number up to the number of classes, {len(classes)}")
        tickets = await self.compute(request.tickets, scope.get("connection"))
        await _send(send, 200, self.build_answer(tickets, request, headers), [JSON_TYPE])

    def build_answer(self, tickets: Sequence[Ticket], request: PredictRequest, headers: dict[bytes, bytes]) -> bytes:
        """Build the answer of `/predict` as JSON; a request without a name gets one."""
        model = tickets[0].classifier.model
        names, top_k = model.classes, request.top_k or DEFAULT_TOP_K
        predictions: list[dict[str, Any]] = []
        for ticket in tickets:
            row = ticket.row
            best = [{"class": names[index], "probability": round(row[index], 6)} for index in ticket.order[:top_k]]
            predictions.append({**best[0], "top_k": best})
            if request.show_input:
                assert ticket.pixels is not None
                predictions[-1]["input"] = base64.b64encode(ticket.pixels).decode()
        if request.request_id is None:
            request.request_id = self.find_id(headers)
        answer = {
            "predictions": predictions,
            "request_id": request.request_id,
            "model_version": model.version,
            "api_version": API_VERSION,
        }
        return orjson.dumps(answer)

    async def compute(self, tickets: Sequence[Ticket], connection: Any = None) -> list[Ticket]:
        """Compute images of one request, all with the same model.

        Args:
            connection: cancels the futures in its list `waiting` when the client leaves.

        Raises:
            Problem: no room, too late, or an image that cannot be read.
            ClientLeft: nobody waits any more.
        """
        batcher = self.batcher
        try:
            batcher.check_room(len(tickets))
            if self.settings.cache_size == 0:
                futures = [batcher.submit(ticket) for ticket in tickets]
            else:
                futures = [self._submit_or_find(ticket) for ticket in tickets]
            if connection is not None:
                connection.waiting = futures
            try:
                return [await future for future in futures]
            finally:
                if connection is not None:
                    connection.waiting = ()
                if len(futures) > 1:
                    for future in futures:
                        future.cancel()
                        if future.done() and not future.cancelled():
                            future.exception()  # seen: the first one is what the client hears of
        except (QueueFullError, DeadlineError, InferenceError, ImageError) as error:
            raise self.explain(error) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ClientLeft from error

    def explain(self, error: Exception) -> Problem:
        """Turn what the batcher says into what the client hears."""
        if isinstance(error, QueueFullError):
            return Problem("queue-full", f"{self.batcher.max_queue} images wait already; try again")
        if isinstance(error, DeadlineError):
            return Problem("deadline", f"no answer within {self.batcher.timeout_s:g} s; try again")
        if isinstance(error, ImageError):
            return Problem("unreadable-image", str(error))
        return Problem("not-ready", "the server is about to end")

    def _submit_or_find(self, ticket: Ticket) -> asyncio.Future[Ticket]:
        """Submit an image unless its answer by the same model is kept; keep the answer when it comes."""
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

    # Everything else

    def _build_router(self) -> tuple[Router, list[tuple[Any, str]]]:
        routes = [
            Route("/health/live", self._show_live),
            Route("/health/ready", self._show_ready),
            Route("/metrics", self._show_metrics),
            Route("/model", self._show_model),
            Route("/openapi.json", self._show_openapi),
            *site.build_routes(),
            *oip.build_routes(self),
        ]
        patterns = [(route.path_regex, route.path) for route in routes]
        return Router(routes, redirect_slashes=False), patterns

    def _find_route(self, path: str) -> str:
        """Find the route of a path, which is the same for all paths that it stands for."""
        for pattern, route in self._patterns:
            if pattern.match(path):
                return route
        return "other"

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> int:
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["app"] = self
        try:
            await self._router(scope, receive, note)
        except HTTPException as error:
            if error.status_code == 405:
                allow = (error.headers or {}).get("Allow", "").encode()
                raise Problem("method-not-allowed", "the path takes other methods", [(b"allow", allow)]) from error
            raise Problem("not-found", "GET /openapi.json lists the paths") from error
        return status

    async def read_request(self, request: Request) -> bytes:
        """Read the body of a request that the router has, within the limits."""
        self._check_length(dict(request.scope["headers"]))
        held: list[int] = []
        try:
            return await self._read_body(await request.receive(), request.receive, held)
        finally:
            self._bodies_bytes -= sum(held)

    async def _show_live(self, request: Request) -> Response:
        return _answer_json({"status": "live"})

    async def _show_ready(self, request: Request) -> Response:
        if not self.is_ready:
            raise Problem("not-ready", "the server is stopping" if self.is_draining else "nothing computes")
        return _answer_json({"status": "ready"})

    async def _show_metrics(self, request: Request) -> Response:
        self.metrics.pending.set(self.batcher.num_pending)
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _show_model(self, request: Request) -> Response:
        return _answer_json(await asyncio.to_thread(describe_model, self.name, self.batcher.classifier.model))

    async def _show_openapi(self, request: Request) -> Response:
        return _answer_json(build_openapi())


def describe_model(name: str, model: PublishedModel) -> dict[str, Any]:
    """Describe a model: what it takes and gives, what it comes from, and its card."""
    facts = asdict(model)
    folder = facts.pop("path")
    folder = folder if folder.is_dir() else folder.parent
    card, manifest = (_read_beside(folder / name) for name in (CARD, MANIFEST))
    return {
        "name": name,
        **facts,
        "input": {"datatype": "uint8", "shape": [None, 32, 32, 3], "channels": "RGB"},
        "output": {"datatype": "float32", "shape": [None, len(model.classes)]},
        "manifest": orjson.loads(manifest) if manifest is not None else None,
        "card": card.decode("utf-8", "replace") if card is not None else None,
    }


def _read_beside(path: Path) -> bytes | None:
    try:
        return read_file(path, MAX_SHOWN_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is not shown: %s", path, one_line(error))
        return None


def _answer_json(document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
