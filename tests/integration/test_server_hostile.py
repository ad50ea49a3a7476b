"""A server under hostile exchanges; `python -m benchmarks.hostile` has a hundred thousand of them.

What the campaigns found is here by name, with the answers that it must get.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.bombs import save
from tests.conftest import report_lack
from tests.hostile import MAX_BODY_BYTES, PIXELS, Exchange, Grammar, build_chunks
from tests.hostile_bodies import INFER
from tests.hostile_clients import Campaign, Outcome, judge, parse_answers, play
from tests.serving import Running, build_request, draw_images, encode, serving, write_model
from tests.smuggling import Comparison, Parsed, Seen, compare_streams, find_difference, find_nginx, parse_with_h11

NUM_EXCHANGES = 500
NUM_STREAMS = 400
WAIT_S = 25.0
MAX_MEMORY_MB = 300

GOOD = build_request(PIXELS)
SHORT = build_request(bytes(100))
LIVE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n%b\r\n"
CHUNKED = (
    b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
HUGE = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (2 * MAX_BODY_BYTES) + bytes(
    2 * MAX_BODY_BYTES
)
STRINGS = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": ["a" * 30_000] + [""] * 10_000}

FOUND: dict[str, Exchange] = {
    name: Exchange(number, "found", pieces, pause_s=0.1, ending=ending, expected=expected)
    for number, (name, pieces, ending, expected) in enumerate(
        [
            ("line end after an answer", (GOOD, b"\r\n"), "wait", (200,)),
            ("line ends after an answer", (GOOD, b"\r\n\r\n"), "wait", (200,)),
            ("line end before anything", (b"\r\n",), "wait", ()),
            ("half a head after an answer", (GOOD, b"POST /pre"), "wait", (200,)),
            ("large head behind a request", (GOOD + LIVE % (b"X: " + b"a" * 200_000 + b"\r\n"),), "read", (200, 431)),
            ("rubbish behind a request", (GOOD + b"\0\r\n\r\n",), "read", (200, 400)),
            ("rubbish behind a request for a page", (LIVE % b"" + b"rubbish\r\n\r\n",), "read", (200, 400)),
            ("bad chunk behind requests", (SHORT + LIVE % b"" + CHUNKED + b"xyz\r\n",), "read", (400, 200, 400)),
            ("many requests at once", ((LIVE % b"") * 100,), "read", (200,) * 25),
            ("large head in one packet", (LIVE % (b"X: a\r\n" * 8000),), "read", (431,)),
            ("large head in packets", tuple([LIVE[:-4], *[b"X: a\r\n" * 800] * 10]), "read", (431,)),
            ("two hosts", (LIVE % b"Host: b\r\n",), "read", (400,)),
            ("one host twice", (LIVE % b"Host: a\r\n",), "read", (400,)),
            ("no host", (b"GET /health/live HTTP/1.1\r\n\r\n",), "read", (400,)),
            ("no host for an image", (GOOD.replace(b"host: localhost\r\n", b""),), "read", (400,)),
            ("endless trailers", (CHUNKED + build_chunks([PIXELS])[:-2] + b"X: a\r\n" * 100_000,), "read", (431,)),
            ("body over the limit, all of it sent", (HUGE,), "read", (413,)),
            ("chunks over the limit, all of them sent", (CHUNKED + build_chunks([bytes(2**20)] * 20),), "read", (413,)),
        ]
    )
}
"""What was found, each with the statuses of the first answers; with `wait` the server must close by itself."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose timeouts pass while a test runs."""
    folder = tmp_path_factory.mktemp("hostile")
    options = ("--header_timeout_s", "2", "--body_timeout_s", "3", "--keep_alive_s", "3", "--allowed_hosts", "*")
    with serving(write_model(folder / "model.onnx"), folder / "log", *options) as running:
        yield running
        assert running.process.poll() is None, running.log.read_text()
        log = running.log.read_text()
        assert "Traceback" not in log and "unexpected error" not in log, log[log.find("Traceback") :][:5000]


@pytest.mark.parametrize("exchange", FOUND.values(), ids=FOUND.keys())
def test_what_was_found_is_answered_or_closed(server: Running, exchange: Exchange) -> None:
    outcome = asyncio.run(play(server.port, exchange, WAIT_S))
    assert judge(exchange, outcome) == "", outcome


@pytest.mark.parametrize("name", ["strings in the place of numbers", "a WebP of a kilobyte and 25 million pixels"])
def test_a_small_body_takes_little_memory(server: Running, name: str) -> None:
    httpx.post(f"{server.url}/predict", content=encode(draw_images(1)[0]), headers={"content-type": "image/png"})
    if name.startswith("strings"):
        content = build_request(json.dumps({"inputs": [STRINGS]}).encode(), "application/json", INFER)
        exchange = Exchange(0, "large", (content,), expected=(400,))
    else:
        image = save(Image.new("RGBA", (5000, 5000), (1, 2, 3, 4)), "WEBP", lossless=True)
        exchange = Exchange(0, "bomb", (build_request(image, "image/webp"),), expected=(422,))
    process = Path(f"/proc/{server.process.pid}")
    (process / "clear_refs").write_text("5")  # its peak counts from now on
    before = server.measure_memory()
    outcome = asyncio.run(play(server.port, exchange, WAIT_S))
    assert judge(exchange, outcome) == "", outcome
    lines = (process / "status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    assert peak - before < MAX_MEMORY_MB


def test_hostile_exchanges_neither_break_the_server_nor_stay(server: Running) -> None:
    found: list[tuple[str, int, Outcome]] = []
    ended = []

    def note(exchange: Exchange, outcome: Outcome) -> None:
        ended.append(exchange.number)
        if what := judge(exchange, outcome):
            found.append((f"{exchange.kind}: {what}", exchange.number, outcome))

    campaign = Campaign(server.port, Grammar(0, is_costly=False), WAIT_S, note, at_once=50)
    asyncio.run(campaign.run(range(NUM_EXCHANGES), rate=1000))
    assert sorted(ended) == list(range(NUM_EXCHANGES))
    assert found == []
    answer = httpx.post(f"{server.url}/predict", content=PIXELS, headers={"content-type": "application/octet-stream"})
    assert answer.status_code == 200
    assert server.read_metric("image_classifier_pending_images") == 0
    assert server.read_metric("image_classifier_open_connections") == 1


def test_pipelined_requests_are_what_h11_takes_them_for(server: Running) -> None:
    comparison = asyncio.run(compare_streams(server.port, 0, NUM_STREAMS, program=None))
    check(comparison)


def test_pipelined_requests_are_what_nginx_takes_them_for(server: Running) -> None:
    program = find_nginx()
    if program is None:
        report_lack("nginx is not installed (Debian: nginx-light)")
    comparison = asyncio.run(compare_streams(server.port, 1, NUM_STREAMS, program=program))
    assert comparison.with_nginx
    check(comparison)


def check(comparison: Comparison) -> None:
    """Check that no stream is taken for something else, and that not all are refused."""
    assert [(found.name, found.peer, found.what) for found in comparison.differences] == []
    assert comparison.number >= NUM_STREAMS and comparison.answered > NUM_STREAMS / 5


@pytest.mark.parametrize("number", range(20))
def test_an_exchange_follows_from_seed_and_number(number: int) -> None:
    first, second = (Grammar(3, is_costly=False).build(number) for _ in range(2))
    assert first == second and first.content == b"".join(first.pieces)
    assert first != replace(Grammar(4, is_costly=False).build(number), number=number)
    assert Grammar(3, is_costly=False).get_kind(number) == first.kind


def test_what_a_server_must_not_do_is_seen() -> None:
    answers, rest = parse_answers(
        b"HTTP/1.1 500 Oops\r\nContent-Length: 1\r\n\r\naHTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\na"
    )
    assert [(answer.status, answer.body) for answer in answers] == [(500, b"a")] and rest.startswith(b"HTTP/1.1 200")
    exchange = Exchange(0, "", (b"GET",), expected=(422,))
    assert judge(exchange, Outcome(tuple(answers), "closed", 0)) == "status 500"
    assert "lost" in judge(exchange, Outcome((), "closed", 0))
    assert judge(exchange, Outcome((), "closed", 0, late_s=1)) == "", "it was the client that was late"
    assert judge(replace(exchange, expected=()), Outcome((), "reset", 0)) == "reset without a last answer"
    assert judge(replace(exchange, expected=()), Outcome((), "closed", 0)) == "closed without an answer"
    assert judge(replace(exchange, expected=(), ending="wait"), Outcome((), "open", 0)) == "never closed"


def test_a_smuggled_request_is_seen() -> None:
    stream = (
        b"POST / HTTP/1.1\r\nHost: a\r\nX-Request-ID: a\r\nContent-Length: 3\r\n\r\nabc" + LIVE % b"X-Request-ID: b\r\n"
    )
    peer = parse_with_h11(stream)
    assert peer == Parsed((Seen("a", 3), Seen("b", 0)), "open")
    assert find_difference(peer, peer) == ""
    assert "not whole" in find_difference(replace(peer, requests=(*peer.requests, Seen("c", 0))), peer)
    assert "which is a there" in find_difference(replace(peer, requests=peer.requests[1:]), peer)
    assert "bytes as the body" in find_difference(replace(peer, requests=(Seen("a", 0), Seen("b", 0))), peer)
    assert "waits" in find_difference(replace(peer, requests=peer.requests[:1]), peer)
    assert find_difference(Parsed(peer.requests[:1], "closed"), peer) == ""
    assert "refused" in find_difference(peer, parse_with_h11(stream.replace(b"Host: a", b"Host : a")))
