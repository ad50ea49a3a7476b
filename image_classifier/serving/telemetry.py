"""Prometheus metrics and logs of the server."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from image_classifier.logs import set_log_level
from image_classifier.published.predictor import PublishedModel
from image_classifier.serving.batching import Observer, Ticket
from image_classifier.serving.drift import DriftWindow
from image_classifier.serving.settings import LogFormat
from image_classifier.text import one_line

HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Buckets that OpenTelemetry recommends for `http.server.request.duration`."""

FINE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
DIFFERENCE_BUCKETS = (0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.5, 1)
REQUEST_LOGGER = "image_classifier.serving.request"
LIFE_LOGGERS = frozenset(("uvicorn.error", "image_classifier.serving.server"))
"""Loggers whose INFO lines are about start, shutdown or a new model version."""

ECS_VERSION = "9.0.0"
"""Version of the Elastic Common Schema. The default of ecs-logging, 1.6.0, has no http.request.id."""

logger = logging.getLogger(__name__)
request_logger = logging.getLogger(REQUEST_LOGGER)

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))


class Metrics(Observer):
    """All metrics of the server."""

    # Over 50 lines: a list of metrics.
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "image_classifier", "registry": registry}
        self.requests = Histogram(
            "http_server_request_duration_seconds",
            "Duration of HTTP requests, from the request head to the answer",
            ("http_request_method", "http_route", "http_response_status_code"),
            buckets=HTTP_BUCKETS,
            registry=registry,
        )
        fine: dict[str, Any] = {**own, "buckets": FINE_BUCKETS}
        waited = "Time of an image from acceptance to the start of its batch, including decoding"
        self.inference = Histogram("inference_duration_seconds", "Inference time of a batch", **fine)
        self.queue_wait = Histogram("queue_wait_seconds", waited, **fine)
        self.batch_size = Histogram("batch_size", "Images in a batch", buckets=BATCH_BUCKETS, **own)
        self.pending = Gauge("pending_images", "Images that wait or are being computed", **own)
        self.connections = Gauge("open_connections", "Open connections", **own)
        refused = "Requests and images without a prediction, by reason"
        self.rejected = Counter("rejected", refused, ("reason",), **own)
        self.cache = Counter("cache_lookups", "Cache lookups", ("result",), **own)
        self.predicted = Counter("predictions", "Predicted images, by class", ("class",), **own)
        sure = "Probability of the predicted class"
        self.confidence = Histogram("confidence", sure, buckets=CONFIDENCE_BUCKETS, **own)
        self.reloads = Counter("reloads", "Attempts to load another model version", ("result",), **own)
        reread = "Attempts to reload API keys or the keys of tokens, by option"
        self.key_reloads = Counter("key_reloads", reread, ("option", "result"), **own)
        kept = "Images selected for capture, by result"
        self.captured = Counter("captured_images", kept, ("result",), **own)
        by_version = "with a canary or shadow, by version"
        self.version_images = Counter("version_images", f"Answered images {by_version}", ("version",), **own)
        of_version: dict[str, Any] = {"labelnames": ("version",), **own}
        self.version_confidence = Histogram(
            "version_confidence", f"{sure} {by_version}", buckets=CONFIDENCE_BUCKETS, **of_version
        )
        self.version_inference = Histogram(
            "version_inference_duration_seconds",
            f"Inference time of a batch {by_version}",
            buckets=FINE_BUCKETS,
            **of_version,
        )
        failed = "Images that the canary failed to compute and the champion computed instead"
        self.canary_fallbacks = Counter("canary_fallbacks", failed, **own)
        compared = "Images selected for the shadow, by comparison with the answer"
        self.shadowed = Counter("shadow_images", compared, ("result",), **own)
        largest = "Largest difference of a probability between answer and shadow"
        self.shadow_difference = Histogram("shadow_difference", largest, buckets=DIFFERENCE_BUCKETS, **own)
        which = ("role", "version", "run_name")
        self.candidate = Gauge("candidate_info", "The canary or shadow, as labels", which, **own)
        facts = ("name", "version", "experiment_name", "run_name", "data_digest")
        self.model = Gauge("model_info", "The model that is served, as labels", facts, **own)
        self._begin_at_zero()
        self.drift = DriftWindow()
        registry.register(self.drift)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.observe_request = cache(self._get_observer)

    def _begin_at_zero(self) -> None:
        """Create counters with known labels at zero, so that Prometheus sees their first increase."""
        for reason in ("queue-full", "rate-limited", "deadline", "client_left"):
            self.rejected.labels(reason)
        for result in ("hit", "miss"):
            self.cache.labels(result)
        for result in ("done", "failed"):
            self.reloads.labels(result)
            for option in ("api_keys_file", "jwt_jwks"):
                self.key_reloads.labels(option, result)
        for result in ("written", "dropped", "failed"):
            self.captured.labels(result)
        for result in ("same_class", "other_class", "dropped", "failed"):
            self.shadowed.labels(result)

    def _get_observer(self, method: str, route: str, status: int) -> Callable[[float], None]:
        return self.requests.labels(method if method in METHODS else "_OTHER", route, str(status)).observe

    def show_model(self, name: str, model: PublishedModel) -> None:
        """Set the metric that names the champion."""
        self.model.clear()
        self.model.labels(name, model.version, model.experiment_name, model.run_name, model.data_digest).set(1)

    def show_candidate(self, role: str, model: PublishedModel) -> None:
        """Set the metric that names the canary or shadow."""
        self.candidate.clear()
        self.candidate.labels(role, model.version, model.run_name).set(1)

    def count_shadowed(self, result: str, number: int) -> None:
        """Count images of the shadow. Thread-safe."""
        self.shadowed.labels(result).inc(number)

    def on_batch(self, tickets: Sequence[Ticket], seconds: float) -> None:
        self.inference.observe(seconds)
        self.batch_size.observe(len(tickets))
        observe = self.queue_wait.observe
        for ticket in tickets:
            observe(ticket.taken_at - ticket.submitted_at)
        self.count_predictions(tickets)

    def count_predictions(self, tickets: Sequence[Ticket]) -> None:
        """Count predicted images, computed or from the cache."""
        classes = tickets[0].classifier.model.classes
        observe = self.confidence.observe
        counts: dict[int, int] = {}
        for ticket in tickets:
            best = ticket.order[0]
            observe(ticket.row[best])
            counts[best] = counts.get(best, 0) + 1
        for index, count in counts.items():
            self.predicted.labels(classes[index]).inc(count)
        self.drift.add(tickets)

    def count_refusal(self, kind: str) -> None:
        """Count a request that was refused for its load; `on_drop` counts deadlines."""
        if kind in ("queue-full", "rate-limited"):
            self.rejected.labels(kind).inc()

    def count_key_reload(self, option: str, is_done: bool) -> None:
        """Count an attempt to reload API keys or an issuer's keys."""
        self.key_reloads.labels(option, "done" if is_done else "failed").inc()

    def count_captured(self, result: str, number: int) -> None:
        """Count captured images. Thread-safe."""
        self.captured.labels(result).inc(number)

    def on_drop(self, ticket: Ticket, reason: str) -> None:
        self.rejected.labels(reason).inc()

    def render(self) -> bytes:
        """Render all metrics in Prometheus text format."""
        return generate_latest(self.registry)


class VersionMetrics(Observer):
    """Metrics by model version, for a server with a canary or shadow."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._has_failed = False

    def on_batch(self, tickets: Sequence[Ticket], seconds: float) -> None:
        metrics, version = self._metrics, tickets[0].classifier.model.version
        metrics.version_images.labels(version).inc(len(tickets))
        metrics.version_inference.labels(version).observe(seconds)
        observe = metrics.version_confidence.labels(version).observe
        for ticket in tickets:
            observe(ticket.row[ticket.order[0]])

    def on_fallback(self, tickets: Sequence[Ticket], error: Exception) -> None:
        self._metrics.canary_fallbacks.inc(len(tickets))
        if not self._has_failed:
            logger.error("the canary failed, the champion answers instead: %s", one_line(error))
        self._has_failed = True


class LineLimit(logging.Filter):
    """Limits log lines per second. The next line says how many were omitted.

    Errors have a separate limit of the same size, at least one line, so that requests cannot displace them. Critical
    lines, and lines about start and shutdown, are never omitted.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, lines_per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._room = (lines_per_s, max(1, lines_per_s))  # for other lines, and for errors
        self._written = [0, 0]
        self._second = 0
        self._num_omitted = 0
        self._lock = threading.Lock()  # several threads log

    def has_room(self, *, is_error: bool = False) -> bool:
        """Return whether a line may be written now, and count it."""
        second = int(self._clock())
        with self._lock:
            if second != self._second:
                self._second, self._written = second, [0, 0]
            if self._written[is_error] < self._room[is_error]:
                self._written[is_error] += 1
                return True
            self._num_omitted += 1
            return False

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass a record if the limit allows it, with the number of lines omitted before."""
        is_life = record.levelno >= logging.CRITICAL or (record.levelno == logging.INFO and record.name in LIFE_LOGGERS)
        is_counted = record.name == REQUEST_LOGGER and record.levelno < logging.ERROR
        if not (is_life or is_counted or self.has_room(is_error=record.levelno >= logging.ERROR)):
            return False
        with self._lock:
            num_omitted, self._num_omitted = self._num_omitted, 0
        if num_omitted:
            record.msg, record.args = f"{record.getMessage()} ({num_omitted} lines omitted before)", ()
            setattr(record, "labels.lines_left_out", num_omitted)
        return True


def log_request(method: str, path: str, status: int, seconds: float, fields: Mapping[str, Any]) -> None:
    """Log a request for which `LineLimit.has_room` returned True, without anything of its body.

    Args:
        fields: further fields of the Elastic Common Schema; empty ones are omitted.
    """
    extra: dict[str, Any] = {
        "http.request.method": method,
        "url.path": path[:256],
        "http.response.status_code": status,
        "event.duration": round(seconds * 1e9),
        **{name: value for name, value in fields.items() if value},
    }
    printable = path[:256].encode("unicode_escape").decode()
    request_logger.info("%s %s %d %.1f ms", method, printable, status, seconds * 1e3, extra=extra)


def build_formatter(log_format: LogFormat) -> logging.Formatter:
    """Build the formatter of log lines: plain text, or JSON in the Elastic Common Schema (ECS)."""
    if log_format == "plain":
        return logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    import ecs_logging

    class Formatter(ecs_logging.StdlibFormatter):
        def format_to_ecs(self, record: logging.LogRecord) -> dict[str, Any]:
            return {**super().format_to_ecs(record), "ecs.version": ECS_VERSION}

    # log.original repeats the message, and is not in this version of ECS.
    return Formatter(extra={"service": {"name": "image_classifier"}}, exclude_fields=["log.original"])


def configure_logging(log_format: LogFormat, limit: LineLimit) -> None:
    """Send all logs to stderr, as plain text or as JSON in the Elastic Common Schema."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(build_formatter(log_format))
    handler.addFilter(limit)
    logging.getLogger().handlers[:] = [handler]
    set_log_level("INFO")
