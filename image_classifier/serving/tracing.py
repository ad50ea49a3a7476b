"""OpenTelemetry traces with one span per request (`--traces true`)."""

from __future__ import annotations

from typing import Any

from image_classifier.extras import load_extra


def trace(app: Any) -> Any:
    """Wrap an ASGI application so that each request is a span. The `OTEL_` variables configure the export.

    Raises:
        SettingsError: the extra `traces` is not installed.
    """
    wrapper = load_extra("opentelemetry.instrumentation.asgi", "traces")
    sdk = load_extra("opentelemetry.sdk.trace", "traces")
    export = load_extra("opentelemetry.sdk.trace.export", "traces")
    otlp = load_extra("opentelemetry.exporter.otlp.proto.http.trace_exporter", "traces")
    resources = load_extra("opentelemetry.sdk.resources", "traces")
    provider = sdk.TracerProvider(resource=resources.Resource.create({"service.name": "image_classifier"}))
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    return wrapper.OpenTelemetryMiddleware(app, tracer_provider=provider, exclude_spans=["receive", "send"])
