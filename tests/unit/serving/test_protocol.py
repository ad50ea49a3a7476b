"""The protocol's short way: when it is taken, and that a fault in one answer is that request's alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import uvicorn
from uvicorn.server import ServerState

from image_classifier.serving.app import App
from image_classifier.serving.auth import Gate
from image_classifier.serving.batching import Batcher
from image_classifier.serving.protocol import GuardedProtocol, ShortCycle
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import Metrics
from tests.serving import build_request, encode
from tests.unit.serving.test_batching import Gated, run, wait_until

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        """Be asked to wait."""

    def close(self) -> None:
        """Be told that nothing more comes."""


class Connections:
    """An application, and connections to it that are no sockets."""

    def __init__(self, gate: Gate | None = None) -> None:
        settings = ServerSettings(model="model")
        metrics = Metrics()
        self.batcher = Batcher(Gated(seconds_per_image=1e-6), max_batch=8, max_queue=8, timeout_s=5, observer=metrics)
        self.app = App(settings, self.batcher, gate or Gate(), metrics, "model")
        self._config = uvicorn.Config(self.app, interface="asgi3", lifespan="off", log_config=None, proxy_headers=False)
        self._config.load()
        self._state = ServerState()
        self.batcher.start()

    def connect(self) -> tuple[GuardedProtocol, Wire]:
        """Connect a client."""
        protocol, wire = GuardedProtocol(self._config, self._state, {}), Wire()
        protocol.connection_made(wire)
        return protocol, wire


def takes_short_way(protocol: GuardedProtocol) -> bool:
    """Say whether the last request did."""
    cycle: object = protocol.cycle
    return isinstance(cycle, ShortCycle)


@pytest.mark.parametrize(
    ("content", "content_type", "is_short"),
    [
        (NOISE.tobytes(), "application/octet-stream", True),
        (encode(NOISE), "image/png", True),
        (NOISE.tobytes() * 2, "application/octet-stream", False),
        (encode(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)), "image/png", False),
        (encode(NOISE), "image/tiff", False),
    ],
)
def test_one_small_image_takes_the_short_way(content: bytes, content_type: str, is_short: bool) -> None:
    async def work() -> None:
        connections = Connections()
        protocol, wire = connections.connect()
        protocol.data_received(build_request(content, content_type))
        assert takes_short_way(protocol) == is_short
        await wait_until(lambda: bool(wire.written))
        assert wire.written[9:12] == (b"415" if content_type == "image/tiff" else b"200")
        connections.batcher.stop()

    run(work)


def test_a_client_that_does_not_read_is_not_answered_without_end() -> None:
    async def work() -> None:
        connections = Connections()
        protocol, wire = connections.connect()
        protocol.pause_writing()
        protocol.data_received(build_request(NOISE.tobytes()))
        assert not takes_short_way(protocol)  # the other way waits until it reads
        protocol.resume_writing()
        await wait_until(lambda: bool(wire.written))
        connections.batcher.stop()

    run(work)


def test_a_client_that_leaves_during_its_body_is_counted() -> None:
    async def work() -> None:
        connections = Connections()
        protocol, wire = connections.connect()
        protocol.data_received(build_request(NOISE.tobytes())[:-1])
        assert takes_short_way(protocol)
        protocol.connection_lost(None)
        assert b'http_response_status_code="499",http_route="/predict"} 1.0' in connections.app.metrics.render()
        assert wire.written == b""
        connections.batcher.stop()

    run(work)


def test_a_fault_in_one_answer_is_that_requests_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        connections = Connections()
        build_answer = connections.app.build_answer

        def fail_once(*arguments: Any) -> bytes:
            monkeypatch.setattr(connections.app, "build_answer", build_answer)
            raise RuntimeError("out of order")

        monkeypatch.setattr(connections.app, "build_answer", fail_once)
        clients = [connections.connect() for _ in range(3)]
        for protocol, _ in clients:
            protocol.data_received(build_request(NOISE.tobytes()))
        await wait_until(lambda: all(wire.written for _, wire in clients))
        assert [wire.written[9:12] for _, wire in clients] == [b"500", b"200", b"200"]
        connections.batcher.stop()

    run(work)
    assert "out of order" in caplog.text


def test_a_fault_of_the_gate_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    class Closed(Gate):
        def recognise(self, headers: Mapping[bytes, bytes]) -> str:
            raise RuntimeError("no key fits")

    async def work() -> None:
        connections = Connections(Closed())
        protocol, wire = connections.connect()
        protocol.data_received(build_request(NOISE.tobytes()))
        assert wire.written[9:12] == b"500"
        connections.batcher.stop()

    run(work)
    assert "no key fits" in caplog.text
