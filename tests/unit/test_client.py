"""The client against servers that misbehave; tests/integration/test_client.py has it against the real one."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from image_classifier import client as client_module
from image_classifier.client import AsyncClient, Client, read_retry_after
from image_classifier.errors import ServerError, SettingsError

PNG = b"\x89PNG and what follows"
GOOD = (
    200,
    {"content-type": "application/json"},
    b'{"predictions": [{"class": "cat", "probability": 0.5, "top_k": [{"class": "cat", "probability": 0.5}]}],'
    b' "request_id": "1", "model_version": "v", "api_version": "1"}',
)
Reply = tuple[int, dict[str, str], bytes]


@contextmanager
def replying(*replies: Reply | None) -> Iterator[tuple[str, list[bytes]]]:
    """Answer POSTs with these replies in turn, the last one again and again; None breaks the connection off."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            reply = replies[min(len(bodies), len(replies)) - 1]
            if reply is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, body = reply
            self.send_response(status)
            for name, value in ({"content-length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", bodies
        finally:
            server.shutdown()
            thread.join()


def ask(url: str, *images: bytes, **options: Any) -> str:
    with Client(url, **options) as client:
        return client.predict(*(images or (PNG,))).predictions[0].label


def ask_async(url: str, *images: bytes, **options: Any) -> str:
    async def run() -> str:
        async with AsyncClient(url, **options) as client:
            return (await client.predict(*(images or (PNG,)))).predictions[0].label

    return asyncio.run(run())


BOTH = pytest.mark.parametrize("ask", [ask, ask_async])
Ask = Callable[..., str]


@BOTH
@pytest.mark.parametrize(
    "replies",
    [
        (None, GOOD),
        ((503, {"retry-after": "0"}, b""), GOOD),
        ((429, {"retry-after": format_datetime(datetime.now(UTC), usegmt=True)}, b""), (502, {}, b""), GOOD),
    ],
    ids=["broken off", "503", "429 and 502"],
)
def test_what_fails_for_the_moment_is_sent_again_whole(ask: Ask, replies: Sequence[Reply | None]) -> None:
    with replying(*replies) as (url, bodies):
        assert ask(url, PNG, PNG + b"!") == "cat"
    assert len(bodies) == len(replies)
    assert len(set(bodies)) == 1 and PNG + b"!" in bodies[0]


@BOTH
def test_the_wait_is_what_the_server_asks_for(ask: Ask) -> None:
    with replying((429, {"retry-after": "1"}, b""), GOOD) as (url, bodies):
        began = time.monotonic()
        assert ask(url) == "cat"
    assert 1 <= time.monotonic() - began < 5 and len(bodies) == 2


@BOTH
def test_a_server_that_asks_for_too_long_a_wait_is_not_asked_again(ask: Ask) -> None:
    with replying((503, {"retry-after": "99999999999999999999"}, b"")) as (url, bodies):
        with pytest.raises(ServerError, match="503") as caught:
            ask(url)
    assert len(bodies) == 1 and caught.value.status == 503


@BOTH
def test_attempts_end(ask: Ask) -> None:
    with replying((503, {"retry-after": "0"}, b"")) as (url, bodies), pytest.raises(ServerError):
        ask(url, num_retries=2)
    assert len(bodies) == 3
    with socket.socket() as listener:  # which nobody listens at
        listener.bind(("127.0.0.1", 0))
        with pytest.raises(ServerError, match="cannot be reached") as caught:
            ask(f"http://127.0.0.1:{listener.getsockname()[1]}", num_retries=1)
    assert caught.value.status == 0


def test_what_is_wrong_with_the_request_is_not_sent_again() -> None:
    body = b'{"type": "urn:image-classifier:problem:unreadable-image", "detail": "no\\u001b[2J PNG"}'
    with replying((422, {"content-type": "application/problem+json"}, body)) as (url, bodies):
        with pytest.raises(ServerError) as caught:
            ask(url)
    assert str(caught.value) == "the server refuses with 422 unreadable-image: no?[2J PNG"
    assert (caught.value.status, caught.value.kind, len(bodies)) == (422, "unreadable-image", 1)


@pytest.mark.parametrize(
    "reply",
    [
        (200, {}, b"<html>"),
        (200, {}, b"[" * 100_000),
        (200, {}, b"[]"),
        (200, {}, b'{"predictions": [{"class": "cat", "probability": "much", "top_k": []}]}'),
        (301, {"location": "http://127.0.0.1:1/"}, b""),
        (400, {"content-type": "application/problem+json"}, b"[1]"),
        (200, {"content-encoding": "gzip"}, b"no gzip"),
    ],
    ids=["page", "deep", "list", "no number", "elsewhere", "no problem", "no gzip"],
)
def test_an_answer_of_another_kind_is_an_expected_error(reply: Reply) -> None:
    with replying(reply) as (url, _), pytest.raises(ServerError):
        ask(url, num_retries=0)


@BOTH
def test_a_key_is_shown_nowhere(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with replying((401, {}, b"")) as (url, _), pytest.raises(ServerError) as caught:
        ask(url, key="hunter2")
    assert caplog.records and "hunter2" not in caplog.text
    frames = [entry for entry in caught.traceback if entry.path == Path(client_module.__file__)]
    assert frames and "hunter2" not in str(caught.value) + repr([entry.locals for entry in frames])
    client = Client("http://127.0.0.1", key="hunter2")
    with client:
        assert "hunter2" not in repr(vars(client))
    for key in ("hunter2\r\nX: 1", "hünter2", "hunter 2", ""):
        with pytest.raises(SettingsError) as refused:
            Client("http://127.0.0.1", key=key)
        assert "hunter" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("127.0.0.1:8000", {}),
        ("ftp://host", {}),
        ("http://", {}),
        ("http://me:hunter2@host", {}),
        ("http://host:port", {}),
        ("http://host", {"timeout_s": 0}),
        ("http://host", {"timeout_s": float("nan")}),
        ("http://host", {"num_retries": -1}),
        ("http://host", {"max_wait_s": float("inf")}),
    ],
)
def test_settings_that_cannot_be_are_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as refused:
        Client(url, **options)
    assert "hunter2" not in str(refused.value)


def test_images_that_cannot_be_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with Client("http://127.0.0.1:1") as client:
        for images in ((), (b"",), (b"GIF89a",), (tmp_path / "none.png",)):
            with pytest.raises(SettingsError):
                client.predict(*images)
        with pytest.raises(SettingsError, match="uint8"):
            client.predict_pixels(memoryview(b"12345678").cast("d"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("7", 7), ("", None), ("-1", None), ("nan", None), ("1e9", None), ("²", None), ("soon", None)],
)
def test_retry_after_is_read_as_it_is_meant(text: str, seconds: float | None) -> None:
    assert read_retry_after(text) == seconds


def test_retry_after_may_be_a_date() -> None:
    future = datetime.now(UTC) + timedelta(seconds=10)
    wait_s = read_retry_after(format_datetime(future, usegmt=True))
    assert wait_s is not None and 8 < wait_s <= 10
    assert read_retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert read_retry_after("Thu, 01 Jan 1970 00:00:00") == 0
