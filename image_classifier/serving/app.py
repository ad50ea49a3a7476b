"""The ASGI application: routes, authentication, rate limits, problem answers, request metrics and the request log."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from image_classifier import __version__, files
from image_classifier.published.predictor import PublishedModel
from image_classifier.serving import schemas, site
from image_classifier.serving.auth import Gate
from image_classifier.serving.limits import find_caller
from image_classifier.serving.oip import InferenceProtocol
from image_classifier.serving.problems import CONTENT_TYPE, Problem
from image_classifier.serving.proxies import TrustedProxies
from image_classifier.serving.requests import describe_bodies, parse_body
from image_classifier.serving.routes import add_route, answer_json, complete_openapi, is_open_route
from image_classifier.serving.service import Caller, ClientLeft, Service
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import LineLimit, Metrics, log_request

QUIET_PATHS = frozenset(("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"))
"""Routes that probes poll all the time. Only failures are logged."""

RENDER_SHARE = 0.05
"""Long-term share of the time in which metrics may be rendered."""

MAX_RENDER_S = 0.25
"""Largest credit of such time that accumulates."""

Options = Annotated[schemas.PredictOptions, Query()]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

logger = logging.getLogger(__name__)


class App:
    """The ASGI application of one server.

    Args:
        lifespan: context that is entered at startup and left at shutdown.
    """

    def __init__(
        self, settings: ServerSettings, service: Service, gate: Gate, metrics: Metrics, lifespan: Lifespan | None = None
    ) -> None:
        self.settings = settings
        self.service = service
        self.gate = gate
        self.metrics = metrics
        self.allowed_hosts = settings.find_allowed_hosts()
        self._description: dict[str, Any] | None = None
        self._rendered, self._rendered_at, self._render_credit_s = b"", 0.0, 0.0
        self._rendering = asyncio.Lock()
        self.proxies = TrustedProxies(settings.trusted_proxies) if settings.trusted_proxies else None
        self.predict_path = f"{settings.root_path}/predict"
        self.log_limit = LineLimit(settings.log_lines_per_s)
        self.api = self._build_api(lifespan)
        self._routes = [route for route in self.api.routes if isinstance(route, APIRoute)]
        self._handle: Any = self._handle_request
        if settings.traces:
            from image_classifier.serving.tracing import trace

            self._handle = trace(self._handle)

    @property
    def has_fast_path(self) -> bool:
        """Whether `protocol.SmallImage` may answer: there is no tracing middleware and no cache."""
        return not (self.settings.traces or self.settings.cache_size)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the lifespan."""
        handle = self._handle if scope["type"] == "http" else self.api
        await handle(scope, receive, send)

    # Around a request

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, count and log a request."""
        began = time.perf_counter()
        method, headers = scope["method"], dict(scope["headers"])
        status = 499  # as nginx has it: the client closed the connection

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path, is_open = self._find_route(scope["path"].removeprefix(self.settings.root_path))
        scope["caller"], scope["request_id"] = Caller("", ""), None
        try:
            if not is_open:
                scope["caller"] = self.admit(headers, scope.get("client"))
        except Problem as problem:
            await self._answer_problem(Request(scope), problem)(scope, receive, send_and_note_status)
        else:
            try:
                scope["method"] = "GET" if method == "HEAD" else method  # the protocol omits the body
                await self.api(scope, receive, send_and_note_status)
            except ClientLeft:
                status = 499
            except Exception:  # the API has already answered with 500
                logger.exception("unexpected error in %s %s", method, path)
        client, caller = scope.get("client"), scope["caller"]
        self.note(method, scope["path"], path, status, began, headers, client, caller.name, scope["request_id"])

    def admit(self, headers: Mapping[bytes, bytes], client: Sequence[Any] | None) -> Caller:
        """Authenticate a request, take it from the caller's rate limit, and return the caller.

        Raises:
            Problem: `unauthorized` or `rate-limited`.
        """
        name = self.gate.recognise(headers)
        caller = Caller(name, find_caller(name, client[0] if client else None))
        wait_s = self.service.limits.admit(caller.payer)
        if wait_s:
            after = [(b"retry-after", b"%d" % math.ceil(wait_s))]
            raise Problem("rate-limited", f"try again in {wait_s:.1f} s", after)
        return caller

    def note(
        self,
        method: str,
        path: str,
        route: str,
        status: int,
        began: float,
        headers: Mapping[bytes, bytes],
        client: Sequence[Any] | None,
        caller: str,
        request_id: str | None,
    ) -> None:
        """Count and log an answered request.

        Args:
            path: as requested.
            route: template that matched, which labels the metrics.
            began: start of the request, from `time.perf_counter`.
            caller: name of the key or token, or "".
        """
        seconds = time.perf_counter() - began
        self.metrics.observe_request(method, route, status)(seconds)
        if (status >= 400 or route not in QUIET_PATHS) and self.log_limit.has_room():
            trace = headers.get(b"traceparent", b"").split(b"-")
            fields = {
                "http.request.id": request_id,
                "client.ip": client[0] if client else None,
                "user.name": caller,
                "trace.id": trace[1][:32].decode("latin-1") if len(trace) == 4 else None,
            }
            log_request(method, path, status, seconds, fields)

    def _find_route(self, path: str) -> tuple[str, bool]:
        """Return the template of the route that matches a path, and whether it is open to unauthenticated callers."""
        for route in self._routes:
            if route.path_regex.match(path):
                return route.path, is_open_route(route)
        return "other", False

    # Problems

    def _answer_problem(self, request: Request, error: Exception) -> Response:
        problem = error if isinstance(error, Problem) else _explain(error)
        self.metrics.count_refusal(problem.kind)
        headers = {name.decode(): value.decode() for name, value in problem.build_headers()}
        path = request.scope["path"].removeprefix(self.settings.root_path)
        if path.startswith("/v2"):
            answer = answer_json(schemas.InferenceError(error=problem.printable), problem.status)
        else:
            scope = request.scope
            scope["request_id"] = scope["request_id"] or self.service.find_id(dict(scope["headers"]))
            body = problem.build_body(scope["request_id"])
            answer = Response(body, problem.status, media_type=CONTENT_TYPE.decode())
        answer.headers.update(headers)
        return answer

    # Routes

    def _build_api(self, lifespan: Lifespan | None) -> FastAPI:
        api = FastAPI(
            title="image_classifier",
            version=__version__,
            description="Classifies images with a published model.",
            license_info={"name": "MIT", "identifier": "MIT"},
            openapi_url=None,
            lifespan=lifespan,
            redirect_slashes=False,
            root_path_in_servers=False,
        )

        async def answer(request: Request, error: Exception) -> Response:
            return self._answer_problem(request, error)

        for kind in (Problem, HTTPException, RequestValidationError, MemoryError, Exception):
            api.add_exception_handler(kind, answer)
        add_route(
            api,
            "/predict",
            self.predict,
            "Classify one image or several",
            schemas.Predictions,
            *("no-image", "body-too-large", "too-many-images", "unsupported-media-type", "unreadable-image"),
            *("queue-full", "deadline", "not-ready", "out-of-memory"),
            method="POST",
            extra=describe_bodies(self.service.batcher.image_size),
        )
        add_route(api, "/model", self.model, "Classes, model card and provenance", schemas.ModelDescription)
        add_route(api, "/samples.png", self.samples, "Sample images, side by side", "image/png", "not-found")
        add_route(api, "/health/live", self.live, "Liveness probe", schemas.Status, is_open=True)
        add_route(api, "/health/ready", self.ready, "Readiness probe", schemas.Status, "not-ready", is_open=True)
        add_route(api, "/metrics", self.show_metrics, "Metrics in Prometheus text format", "text/plain")
        add_route(api, "/openapi.json", self.openapi, "This API in OpenAPI 3.1", dict[str, Any], is_open=True)
        site.add_routes(api, self.describe)
        InferenceProtocol(self.service).add_routes(api)
        return api

    def describe(self) -> dict[str, Any]:
        """Return the OpenAPI 3.1 document. It is built once: building it takes as long as answering 100 images."""
        if self._description is None:
            self._description = complete_openapi(self.api.openapi())
            if self.settings.root_path:  # generated clients take the prefix from here
                self._description["servers"] = [{"url": self.settings.root_path}]
        return self._description

    async def predict(self, request: Request, options: Options) -> Response:
        """Classify the images of a request."""
        service = self.service
        if len(request.query_params.multi_items()) > len(request.query_params):
            raise Problem("bad-request", "the query string repeats an option")
        request.scope["request_id"] = options.request_id or None
        content_type = request.headers.get("content-type", "").encode("latin-1")
        async with service.hold_body(request) as chunks:
            tickets, own = await service.parse(
                chunks,
                parse_body,
                content_type,
                request.headers,
                service.settings.max_images,
                service.batcher.image_size,
            )
            own_options = own.model_dump(include=set(schemas.PredictOptions.model_fields), exclude_unset=True)
            options = options.model_copy(update=own_options)
            request_id = options.request_id or service.find_id(dict(request.scope["headers"]))
            request.scope["request_id"] = request_id
            num_classes = len(service.batcher.classifier.model.classes)
            if options.top_k > num_classes and "top_k" in options.model_fields_set:
                raise Problem("bad-request", f"top_k takes at most the number of classes, {num_classes}")
            tickets = await service.compute(tickets, request)
        answer = service.build_answer(tickets, request_id, options.top_k, shows_input=options.show_input)
        if service.recorder is not None:
            service.recorder.record(tickets[0].classifier.model, tickets, request_id, request.scope["caller"].name)
        return Response(answer, media_type="application/json")

    async def live(self) -> Response:
        """Answer the liveness probe."""
        return answer_json(schemas.Status(status="live"))

    async def ready(self) -> Response:
        """Answer the readiness probe."""
        if not self.service.is_ready:
            reason = "the server is stopping" if self.service.is_draining else "a thread is stuck or has died"
            raise Problem("not-ready", reason)
        return answer_json(schemas.Status(status="ready"))

    async def show_metrics(self) -> Response:
        """Return the metrics; to a client that polls too often, the previous ones."""
        async with self._rendering:
            began = time.perf_counter()
            credit_s = self._render_credit_s + (began - self._rendered_at) * RENDER_SHARE
            self._render_credit_s = min(MAX_RENDER_S, credit_s)
            if self._render_credit_s > 0:
                self.metrics.pending.set(self.service.batcher.num_pending)
                self._rendered = await asyncio.to_thread(self.metrics.render)  # takes 8 ms with many series
                self._render_credit_s -= time.perf_counter() - began
            self._rendered_at = began
        return Response(self._rendered, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def model(self) -> Response:
        """Describe the model."""
        return answer_json(describe_model(self.service.name, self.service.batcher.classifier.model))

    async def samples(self) -> Response:
        """Return the sample images as one PNG. The manifest in `/model` names their classes."""
        samples = self.service.batcher.classifier.model.samples
        if samples is None:
            raise Problem("not-found", "the model has no sample images; publish it with --num_samples 12")
        return Response(samples, headers=site.HEADERS, media_type="image/png")

    async def openapi(self) -> Response:
        """Return the OpenAPI document."""
        return answer_json(self.describe())


def describe_model(name: str, model: PublishedModel) -> schemas.ModelDescription:
    """Describe a model: its input and output, its run and its model card."""
    facts = asdict(model)
    for hidden in ("path", "digest", "samples", "reference"):
        del facts[hidden]
    card, manifest = facts.pop("card"), facts.pop("manifest")
    return {
        "name": name,
        **facts,  # type: ignore[typeddict-item]  # the schema has the fields of PublishedModel
        "input": {"datatype": "uint8", "shape": [None, model.image_size, model.image_size, 3], "channels": "RGB"},
        "output": {"datatype": "float32", "shape": [None, len(model.classes)]},
        "manifest": None if manifest is None else files.parse_json(manifest),
        "card": None if card is None else card.decode("utf-8", "replace"),
    }


def _explain(error: Exception) -> Problem:
    """Convert an exception of FastAPI, or an unexpected one, to the problem that the client gets."""
    if isinstance(error, RequestValidationError):
        return Problem("bad-request", schemas.explain_invalid(error))
    if isinstance(error, HTTPException) and error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "").encode()
        return Problem("method-not-allowed", "use a method that the header Allow lists", [(b"allow", allow)])
    if isinstance(error, HTTPException):
        return Problem("not-found", "GET /openapi.json lists the paths")
    if isinstance(error, MemoryError):
        return Problem("out-of-memory", "try again later, or send fewer or smaller images")
    return Problem("internal", "see the server's log")
