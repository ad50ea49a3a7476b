"""Traces of the server, as a collector of OpenTelemetry gets them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.collector import Collector, collector
from tests.serving import PIXELS, serving, write_model

__all__ = ["collector"]

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_request_is_a_span_of_the_trace_that_it_came_with(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    headers = {**PIXELS, "traceparent": f"00-{TRACE}-{PARENT}-01"}
    with serving(write_model(tmp_path / "model.onnx"), tmp_path / "log", "--traces", "true") as server:
        answers = [
            httpx.post(f"{server.url}/predict", content=content, headers=headers) for content in (bytes(3072), b"few")
        ]
        assert [answer.status_code for answer in answers] == [200, 400]
        assert server.stop() == 0
    spans = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    assert [span.name for span in spans] == ["POST /predict"] * 2
    assert {span.parent_span_id.hex() for span in spans} == {PARENT}
    statuses = [
        attribute.value.int_value
        for span in spans
        for attribute in span.attributes
        if attribute.key in ("http.status_code", "http.response.status_code")
    ]
    assert statuses == [200, 400]
    names = {
        attribute.value.string_value
        for request in collector.exported
        for resource in request.resource_spans
        for attribute in resource.resource.attributes
        if attribute.key == "service.name"
    }
    assert names == {"image_classifier"}
