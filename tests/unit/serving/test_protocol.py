"""Connections that are no sockets: which way a request takes, that answers come in order, and that each has an end."""

from __future__ import annotations

import asyncio
import inspect
import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import uvicorn
from uvicorn.server import ServerState

from image_classifier.config import ImageSize
from image_classifier.serving.app import App
from image_classifier.serving.auth import Gate
from image_classifier.serving.batching import Batcher
from image_classifier.serving.protocol import MAX_HEAD_BYTES, Connection, SmallImage
from image_classifier.serving.service import Service
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import Metrics
from tests.serving import build_request, encode
from tests.unit.serving.test_batching import Gated, run, wait_until

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
GOOD = build_request(NOISE.tobytes())
HEALTH = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = b""
        self.reads = True
        self.has_ended = False

    def write(self, data: Any) -> None:
        assert not self.has_ended, "written after the end"
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        assert self.reads
        self.reads = False

    def resume_reading(self) -> None:
        assert not self.reads
        self.reads = True

    def close(self) -> None:
        self.has_ended = True

    def write_eof(self) -> None:
        self.has_ended = True

    def abort(self) -> None:
        self.has_ended = True


def build_app(gate: Gate | None = None, image_size: ImageSize = 32, **settings: Any) -> App:
    """Build an application whose batcher has not been started."""
    metrics = Metrics()
    classifier = Gated(seconds_per_image=1e-6, image_size=image_size)
    batcher = Batcher(classifier, max_batch=8, max_queue=64, timeout_s=5, observers=[metrics])
    chosen = ServerSettings(model="model", **settings)
    return App(chosen, Service(chosen, batcher, metrics, "model"), gate or Gate(), metrics)


class Connections:
    """An application, and connections to it that are no sockets."""

    def __init__(self, gate: Gate | None = None, **settings: Any) -> None:
        self.app = build_app(gate, **settings)
        self.batcher = self.app.service.batcher
        self.state = ServerState()
        self.batcher.start()

    def connect(self) -> tuple[Connection, Wire]:
        """Connect a client."""
        connection, wire = Connection(self.app, self.state), Wire()
        connection.connection_made(wire)
        return connection, wire


def find_statuses(wire: Wire) -> list[int]:
    """Find the statuses of the answers, each of which is whole."""
    statuses, rest = [], wire.written
    while rest:
        head, separator, rest = rest.partition(b"\r\n\r\n")
        assert separator and head.startswith(b"HTTP/1.1 "), head
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        assert length is not None
        assert len(rest) >= int(length[1])
        rest = rest[int(length[1]) :]
        statuses.append(int(head[9:12]))
    return statuses


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
        connection, wire = connections.connect()
        connection.data_received(build_request(content, content_type))
        assert isinstance(connection._exchanges[0], SmallImage) == is_short
        await wait_until(lambda: bool(wire.written))
        assert find_statuses(wire) == [415 if content_type == "image/tiff" else 200]
        connections.batcher.stop()

    run(work)


@pytest.mark.parametrize(("side", "is_short"), [(64, True), (96, False), (224, False)])
def test_the_pixels_of_an_image_take_the_short_way_up_to_64_pixels(side: ImageSize, is_short: bool) -> None:
    async def work() -> None:
        connections = Connections(image_size=side)
        for content, is_whole in ((bytes(3 * side**2), True), (NOISE.tobytes(), False)):
            connection, wire = connections.connect()
            connection.data_received(build_request(content))
            assert isinstance(connection._exchanges[0], SmallImage) == (is_short and is_whole)
            await wait_until(lambda wire=wire: bool(wire.written))  # type: ignore[misc]  # of this turn
            assert find_statuses(wire) == [200 if is_whole else 400]
        connections.batcher.stop()

    run(work)


def test_behind_a_trusted_proxy_the_client_is_the_one_that_it_names() -> None:
    async def work() -> None:
        connections = Connections(trusted_proxies="127.0.0.1", rate_limit=1)
        forwarded = [GOOD.replace(b"host:", b"x-forwarded-for: 1.2.3.%d\r\nhost:" % number) for number in (4, 4, 5)]
        connection, wire = connections.connect()
        connection.data_received(forwarded[0])
        assert isinstance(connection._exchanges[0], SmallImage)
        connection.data_received(b"".join(forwarded[1:]))
        await wait_until(lambda: find_statuses(wire) == [200, 429, 200])
        connections.batcher.stop()

    run(work)


def test_a_client_that_does_not_read_is_not_answered_without_end() -> None:
    async def work() -> None:
        connections = Connections()
        connection, wire = connections.connect()
        connection.pause_writing()
        connection.data_received(GOOD * 3)
        await asyncio.sleep(0.1)
        assert (wire.written, wire.reads) == (b"", False)
        connection.resume_writing()
        await wait_until(lambda: find_statuses(wire) == [200] * 3)
        assert wire.reads
        connections.batcher.stop()

    run(work)


def test_an_answer_that_has_begun_is_not_mixed_with_another() -> None:
    async def work() -> None:
        connections = Connections()
        connection, wire = connections.connect()
        write = wire.write

        def write_and_be_full(data: Any) -> None:
            write(data)
            connection.pause_writing()

        wire.write = write_and_be_full  # type: ignore[method-assign]
        connection.data_received(b"POST /x HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        await wait_until(lambda: bool(wire.written))
        assert not wire.written.endswith(b"}")
        connection.data_received(b"no chunk\r\n")
        assert connection.deadline < asyncio.get_running_loop().time() + 100
        wire.write = write  # type: ignore[method-assign]
        connection.resume_writing()
        await wait_until(lambda: wire.has_ended)
        assert find_statuses(wire) == [404]
        connections.batcher.stop()

    run(work)


def test_a_client_that_leaves_during_its_body_is_counted() -> None:
    async def work() -> None:
        connections = Connections()
        connection, wire = connections.connect()
        connection.data_received(GOOD[:-1])
        connection.connection_lost(None)
        assert b'http_response_status_code="499",http_route="/predict"} 1.0' in connections.app.metrics.render()
        assert wire.written == b"" and connections.state.connections == set()
        connections.batcher.stop()

    run(work)


def test_a_fault_in_one_answer_is_that_requests_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        connections = Connections()
        service = connections.app.service
        build_answer = service.build_answer

        def fail_once(*arguments: Any) -> bytes:
            monkeypatch.setattr(service, "build_answer", build_answer)
            raise RuntimeError("out of order")

        monkeypatch.setattr(service, "build_answer", fail_once)
        clients = [connections.connect() for _ in range(3)]
        for connection, _ in clients:
            connection.data_received(GOOD)
        await wait_until(lambda: all(wire.written for _, wire in clients))
        assert [find_statuses(wire) for _, wire in clients] == [[500], [200], [200]]
        connections.batcher.stop()

    run(work)
    assert "out of order" in caplog.text


def test_a_fault_of_the_gate_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    class Closed(Gate):
        def recognise(self, headers: Mapping[bytes, bytes]) -> str:
            raise RuntimeError("no key fits")

    async def work() -> None:
        connections = Connections(Closed())
        connection, wire = connections.connect()
        connection.data_received(GOOD)
        assert find_statuses(wire) == [500]
        connections.batcher.stop()

    run(work)
    assert "no key fits" in caplog.text


LONG = b"x-long: " + b"a" * MAX_HEAD_BYTES + b"\r\n"
HEADS = {
    "too large in one read": (b"GET / HTTP/1.1\r\nhost: localhost\r\n" + LONG + b"\r\n", [431]),
    "too large, and behind another": (GOOD + b"GET / HTTP/1.1\r\nhost: localhost\r\n" + LONG + b"\r\n", [200, 431]),
    "target too large": (b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", [431]),
    "trailers without end": (
        b"POST /predict HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 10_000,
        [431],
    ),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", [400]),
    "two hosts": (b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n", [400]),
    "another host": (b"GET / HTTP/1.1\r\nhost: evil.example\r\n\r\n", [421]),
    "an address that looks like none": (b"GET /health/live HTTP/1.1\r\nhost: 127.0.0.1.evil.example\r\n\r\n", [421]),
    "an address": (b"GET /health/live HTTP/1.1\r\nhost: 10.1.2.3:8000\r\n\r\n", [200]),
    "an address of IPv6": (b"GET /health/live HTTP/1.1\r\nhost: [FE80::1]:80\r\n\r\n", [200]),
    "a host with a port": (b"GET /health/live HTTP/1.1\r\nhost: localhost:8000\r\n\r\n", [200]),
    "a target with another host": (b"GET http://a/ HTTP/1.1\r\nhost: localhost\r\n\r\n", [400]),
    "no path": (b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n", [404]),
    "a tunnel": (b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost:80\r\n\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "another coding": (
        b"GET / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        [400],
    ),
    "length twice": (b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\ncontent-length: 0\r\n\r\n", [400]),
    "a control character": (b"GET / HTTP/1.1\r\nhost: localhost\r\na: \x01\r\n\r\n", [400]),
    "an upgrade": (
        b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        [200],
    ),
    "after the last": (
        b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n" + HEALTH,
        [200],
    ),
    "HTTP/1.0": (b"GET /health/live HTTP/1.0\r\n\r\n", [200]),
    "line feeds between requests": (HEALTH + b"\r\n\r\n" + HEALTH, [200, 200]),
}


@pytest.mark.parametrize("is_whole", [True, False], ids=["in one read", "byte by byte"])
@pytest.mark.parametrize(("content", "statuses"), HEADS.values(), ids=HEADS.keys())
def test_heads_that_servers_in_a_row_could_read_differently(
    content: bytes, statuses: list[int], is_whole: bool
) -> None:
    async def work() -> None:
        connections = Connections()
        connection, wire = connections.connect()
        for part in [content] if is_whole else [content[at : at + 1] for at in range(len(content))]:
            connection.data_received(part)
        await wait_until(lambda: find_statuses(wire) == statuses)
        await asyncio.sleep(0.01)
        assert find_statuses(wire) == statuses
        connections.batcher.stop()

    run(work)


def test_line_feeds_do_not_keep_a_connection_open() -> None:
    async def work() -> None:
        connections = Connections()
        connection, wire = connections.connect()
        connection.data_received(HEALTH)
        await wait_until(lambda: find_statuses(wire) == [200])
        idle_by = connection.deadline
        connection.data_received(b"\r\n")
        assert connection.deadline == idle_by
        connection.sweep(idle_by)
        assert wire.has_ended
        connections.batcher.stop()

    run(work)


PIECES = (
    *(GOOD, HEALTH, b"\r\n", b"\n", b"\x00", b"GET ", b"POST /predict HTTP/1.1\r\n", b"host: localhost\r\n"),
    *(
        b"content-length: 3072\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n",
        b"5\r\nabcde\r\n",
        b"0\r\n\r\n",
        b"0\r\n",
    ),
    *(
        b"expect: 100-continue\r\n",
        b"connection: close\r\n",
        b"a: b\r\n",
        NOISE.tobytes()[:100],
        b"PUT /x HTTP/1.0\r\n\r\n",
    ),
    build_request(b"{}", "application/json"),
    build_request(NOISE.tobytes() * 2),
)


async def play(connections: Connections, numbers: random.Random) -> None:
    """Be one client that does what comes to its mind, and check the connection after each step."""
    connection, wire = connections.connect()
    loop = asyncio.get_running_loop()
    now = loop.time()
    is_writing_paused = False
    for _ in range(numbers.randrange(1, 40)):
        content = numbers.choice(PIECES)
        action = numbers.random()
        if action < 0.7 and wire.reads and not (wire.has_ended and numbers.random() < 0.5):
            for part in [content] if numbers.random() < 0.5 else [content[:7], content[7:]]:
                if part:
                    connection.data_received(part)
        elif action < 0.8:
            await asyncio.sleep(0)
        elif action < 0.85:
            is_writing_paused = not is_writing_paused
            (connection.pause_writing if is_writing_paused else connection.resume_writing)()
        elif action < 0.95:
            now += numbers.choice([0.1, 5.0, 20.0])
            connection.sweep(now)
        else:
            connection.shutdown()
        deadline = connection.deadline
        assert deadline < loop.time() + 200
    for _ in range(4):  # however it stands: after its deadline, and that of its end, it is over
        await asyncio.sleep(0)
        connection.sweep(connection.deadline)
    assert wire.has_ended
    connection.connection_lost(None)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_client_does_its_connection_has_a_deadline(seed: int) -> None:
    async def work() -> None:
        connections = Connections()
        numbers = random.Random(seed)
        for _ in range(250):
            await play(connections, numbers)
        await wait_until(lambda: not connections.state.tasks)
        assert connections.state.connections == set()
        await wait_until(lambda: connections.batcher.num_pending == 0)
        connections.batcher.stop()

    run(work)


def test_uvicorn_has_what_a_connection_needs_of_it() -> None:
    """Ours stands on these names of uvicorn; where one has moved, the upper bound of the requirement must stay."""
    state = ServerState()
    assert (state.connections, state.tasks, state.default_headers) == (set(), set(), [])
    server = uvicorn.Server(uvicorn.Config("app"))
    assert isinstance(server.server_state, ServerState)
    assert (server.should_exit, server.force_exit) == (False, False)
    assert "connection.shutdown()" in inspect.getsource(uvicorn.Server.shutdown)
