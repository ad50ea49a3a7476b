"""Streams of pipelined requests, and what this server, h11 and nginx take them for.

Each request of a stream has a name of its own in `X-Request-ID`, also one that lies in the body of another, so that the
answers say which requests a server saw. What it answers must be what h11 and nginx see, one after another, with bodies
of the same lengths; where it is not, the server must have closed the connection before. What nginx refuses it may
answer, if h11 sees the same: some fields that RFC 9110 allows, such as a tab before a value, nginx does not take.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import h11

from tests.conftest import find_port
from tests.hostile import (
    CODINGS,
    ODD_CODING_FIELDS,
    PIXELS,
    Draft,
    Exchange,
    cut,
    draw_chunks,
    draw_lengths,
)
from tests.hostile_bodies import Body
from tests.hostile_clients import Outcome, play

AT_ONCE = 64
LENGTH, CHUNKED = b"Content-Length: %d", b"Transfer-Encoding: chunked"
LONG_ZEROS = re.compile(rb"0{18,}")
"""Of which h11 takes no number to begin, though that number has no other reading."""

REFUSED_THERE = "which is refused there"
REFUSED = "refused"
"""In the place of a name: a refusal that closed, of which nginx in front makes an answer on a connection that stays."""


@dataclass(frozen=True)
class Seen:
    """A request that somebody made out.

    Attributes:
        size: bytes of the body; None where the answer does not say it.
        is_error: whether it was answered with an error.
    """

    name: str
    size: int | None
    is_error: bool = False


@dataclass(frozen=True)
class Parsed:
    """What somebody made of a stream.

    Attributes:
        end: `open` if more was waited for, `refused`, or `closed` as a request asked for it.
    """

    requests: tuple[Seen, ...]
    end: str


@dataclass(frozen=True)
class Difference:
    """A stream that the server takes for something else than a peer does."""

    name: str
    peer: str
    what: str
    content: bytes


@dataclass
class Comparison:
    """What came of many streams.

    Attributes:
        answered: requests that the server answered and did not refuse.
        refused_by_nginx: of these, those that h11 sees as the server does, and nginx refuses.
    """

    number: int = 0
    answered: int = 0
    with_nginx: bool = False
    differences: list[Difference] = field(default_factory=list)
    refused_by_nginx: list[Difference] = field(default_factory=list)


# The streams.


class Streams:
    """Streams for one server.

    Args:
        key: that the server accepts; without one it asks for none.
    """

    def __init__(self, seed: int, key: str = "") -> None:
        self._seed = seed
        self._fields = [f"Authorization: Bearer {key}".encode()] if key else []

    def _draft(self, name: str, body: bytes | None = None) -> Draft:
        draft = Draft(fields=[*self._fields, b"X-Request-ID: name-" + name.encode()])
        if body is None:
            draft.method, draft.target = b"GET", b"/x"
        else:
            draft.put(Body(body, b"application/octet-stream"))
        return draft

    def _close(self) -> bytes:
        """Build the request at the end of each stream, which is answered only by who is in step there."""
        draft = self._draft("end", PIXELS)
        draft.fields.append(b"Connection: close")
        return draft.build()

    def build(self, number: int) -> bytes:
        """Build the stream of a number: good requests, and one with odd framing that holds another one."""
        chance = Random(f"stream {self._seed}-{number}")
        before = [self._draft(f"before{place}", bytes(place)).build() for place in range(chance.choice((0, 0, 1, 2)))]
        draft = self._draft("odd", chance.choice((b"", b"abcde", bytes(20), self._draft("inner").build())))
        if chance.random() < 0.15:
            draft.method = chance.choice((b"GET", b"DELETE", b"PUT"))
        size = len(draft.payload)
        kind = chance.randrange(6)
        if kind <= 1:
            draft.framing = draw_lengths(chance, size)
        elif kind == 2:
            draft.framing, draft.payload = [b"Transfer-Encoding: chunked"], draw_chunks(chance, draft.payload)
        elif kind == 3:
            draft.framing = [b"Transfer-Encoding: " + chance.choice(CODINGS)]
            draft.payload = draw_chunks(chance, draft.payload)
        elif kind == 4:
            draft.framing = [chance.choice(ODD_CODING_FIELDS)]
            draft.payload = draw_chunks(chance, draft.payload)
        else:
            _spoil_lines(chance, draft)
        if kind >= 3 and chance.random() < 0.5:
            length = b"Content-Length: %d" % chance.choice((len(draft.payload), size, 0, 3))
            draft.framing.insert(chance.randrange(len(draft.framing) + 1), length)
        if chance.random() < 0.1:
            draft.version = chance.choice((b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/1.1 "))
        gap = chance.choice((b"", b"", b"", b"", b"\r\n", b"\n", b"\r\n\r\n", b"\r"))
        after = self._draft("after", b"xyz").build() if chance.random() < 0.5 else b""
        content = b"".join([*before, draft.build(), gap, after, self._close()])
        return LONG_ZEROS.sub(b"0", content)

    def build_classics(self) -> dict[str, bytes]:
        """Build those that have names."""
        inner = self._draft("inner").build()
        streams: dict[str, bytes] = {}

        def add(name: str, framing: Sequence[bytes], payload: bytes, **changes: object) -> None:
            draft = self._draft("odd", b"")
            draft.framing, draft.payload = list(framing), payload
            for part, value in changes.items():
                setattr(draft, part, value)
            streams[name] = draft.build() + self._close()

        for group in (_add_codings, _add_lengths, _add_fields):
            group(add, inner, b"0\r\n\r\n" + inner)
        return streams


def _add_codings(add: Callable[..., None], inner: bytes, ended: bytes) -> None:
    """Add those whose length two fields say, or a coding that is odd."""
    add("CL.TE", [LENGTH % len(ended), CHUNKED], ended)
    add("TE.CL", [CHUNKED, b"Content-Length: 4"], b"%x\r\n" % len(inner) + inner + b"\r\n0\r\n\r\n")
    add("CL.TE, HTTP/1.0", [LENGTH % len(ended), CHUNKED], ended, version=b"HTTP/1.0")
    add("TE in HTTP/1.0", [CHUNKED, b"Connection: keep-alive"], ended, version=b"HTTP/1.0")
    add("CL.0", [LENGTH % len(inner)], inner)
    add("GET with a body", [LENGTH % len(inner)], inner, method=b"GET", target=b"/x")
    add("no length", [], inner)
    add("a length of 0 and more", [b"Content-Length: 0"], inner)
    for place, coding in enumerate(CODINGS):
        add(f"TE.TE {place}: {coding!r}", [b"Transfer-Encoding: " + coding], ended)
        add(f"TE.TE {place} and a length", [LENGTH % len(ended), b"Transfer-Encoding: " + coding], ended)
        add(f"TE.TE {place} behind chunked", [CHUNKED, b"Transfer-Encoding: " + coding], ended)
    for odd in ODD_CODING_FIELDS:
        add(f"{odd!r}", [odd], ended)
        add(f"{odd!r} and a length", [odd, LENGTH % len(ended)], ended)


def _add_lengths(add: Callable[..., None], inner: bytes, ended: bytes) -> None:
    """Add those whose lengths, chunks and lines are odd."""
    for value in (
        b"+5",
        b"-5",
        b"0x5",
        b"5,5",
        b"5, 6",
        b"05",
        b" 5 ",
        b"5\x0b",
        b"5 5",
        b"",
        b"5;",
        b"1e0",
        b"\xb2",
        b"5_0",
    ):
        add(f"length {value!r}", [b"Content-Length: " + value], b"abcde")
    for first, second in ((5, 5), (5, 6), (0, 5), (5, 0)):
        add(f"lengths {first} and {second}", [LENGTH % first, LENGTH % second], b"abcde")
    for size in (
        b"0x5",
        b"+5",
        b"-5",
        b" 5",
        b"5 ",
        b"5;a\n",
        b"5;a\r",
        b"5\n",
        b"5\r",
        b"005",
        b"10000000000000005",
        b"5;",
        b"",
    ):
        add(f"chunk size {size!r}", [CHUNKED], size + b"\r\nabcde\r\n" + ended)
    for end in (b"\n", b"\r", b"", b"XX", b"\r\r\n", b"\n\r\n"):
        add(f"chunk that ends with {end!r}", [CHUNKED], b"5\r\nabcde" + end + ended)
        add(f"last chunk {end!r}", [CHUNKED], b"0" + end + b"\r\n" + inner)
        add(f"lines that end with {end!r}", [b"Content-Length: 5"], b"abcde", eol=end or b"\r\n ")
        add(f"a field behind {end!r}", [b"X: y" + end + b"Content-Length: 5"], b"abcde")


def _add_fields(add: Callable[..., None], inner: bytes, ended: bytes) -> None:
    """Add those with odd fields, with trailers, and with other ways than a length to end a request."""
    add("trailers", [CHUNKED], b"0\r\nX: y\r\nContent-Length: 90\r\n\r\n" + inner)
    add("a trailer without colon", [CHUNKED], b"0\r\nX\r\n\r\n" + inner)
    add("an extension with a line end", [CHUNKED], b'0;a="\r\n\r\n' + inner)
    add("space before the colon", [b"Content-Length : 5"], b"abcde")
    add("fold", [b"Content-Length:\r\n 5"], b"abcde")
    add("fold of a coding", [b"Transfer-Encoding:\r\n chunked"], ended)
    add("fold of the first field", [], b"", host=[b" X: y", b"Host: a"])
    for name, host in {
        "no Host": [],
        "two Hosts": [b"Host: a", b"Host: b"],
        "one Host twice": [b"Host: a", b"Host: a"],
        "empty Host": [b"Host:"],
        "Host with a space": [b"Host: a b"],
        "Host with a slash": [b"Host: a/b"],
        "Host with a comma": [b"Host: a,b"],
        "Host with a name": [b"Host: a@b"],
    }.items():
        add(name, [b"Content-Length: 5"], b"abcde", host=host)
    add("no Host in HTTP/1.0", [b"Content-Length: 5"], b"abcde", host=[], version=b"HTTP/1.0")
    add("absolute form against Host", [b"Content-Length: 5"], b"abcde", target=b"http://other/predict")
    add("absolute form without Host", [b"Content-Length: 5"], b"abcde", target=b"http://other/predict", host=[])
    add("upgrade", [b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 5"], b"abcde")
    add("upgrade without a body", [b"Connection: Upgrade", b"Upgrade: websocket"], b"")
    add("expect", [b"Expect: 100-continue", b"Content-Length: 5"], b"abcde")
    add("expect and smuggle", [b"Expect: 100-continue", LENGTH % len(inner)], inner)
    add("CONNECT", [b"Content-Length: 5"], b"abcde", method=b"CONNECT", target=b"localhost:80")
    add("NUL in a field", [b"X: \0", b"Content-Length: 5"], b"abcde")
    add("line end in the target", [], b"", target=b"/x HTTP/1.1\r\nHost: a\r\n\r\nGET /y")


def _spoil_lines(chance: Random, draft: Draft) -> None:
    ends = (b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n ", b" \r\n", b"\0\r\n", b"\x0b\r\n")
    kind = chance.randrange(3)
    if kind == 0:
        draft.eol = chance.choice(ends)
    elif kind == 1:
        draft.fields.append(b"X: y" + chance.choice(ends) + chance.choice((b"Content-Length: 5", b"X: z", b"Host: b")))
    else:
        draft.host = list(chance.choice(([], [b"Host: a"] * 2, [b"Host : a"], [b"Host: a", b" b"], [b"Host:\r\n a"])))


# What h11, nginx and the server make of a stream.


def parse_with_h11(content: bytes) -> Parsed:
    """Parse a stream as h11 does, without the empty lines between requests, which RFC 9112 (2.2) and nginx ignore."""
    seen: list[Seen] = []
    while content := content.lstrip(b"\r\n"):
        connection, name, size, stays = h11.Connection(h11.SERVER), "", 0, True
        connection.receive_data(content)
        is_whole = False
        while not is_whole:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError:
                return Parsed(tuple(seen), "refused")
            if event is h11.NEED_DATA:
                return Parsed(tuple(seen), "open")
            if isinstance(event, h11.Request):
                fields = dict(event.headers)
                name, wish = (fields.get(each, b"").decode("latin-1") for each in (b"x-request-id", b"connection"))
                stays = event.http_version != b"1.0" or wish.lower() == "keep-alive"
                stays = stays and "close" not in wish.lower().split(", ")
            elif isinstance(event, h11.Data):
                size += len(event.data)
            is_whole = isinstance(event, h11.EndOfMessage)
        seen.append(Seen(name, size))
        if not stays:
            return Parsed(tuple(seen), "closed")
        content = connection.trailing_data[0]
    return Parsed(tuple(seen), "open")


def read_own(outcome: Outcome, content: bytes) -> Parsed:
    """Read from the server's answers what it made of a stream; a refusal that closes counts as no answer."""
    answers = list(outcome.answers)
    is_closed = outcome.end in ("closed", "reset")
    if is_closed and answers and answers[-1].status >= 400:
        answers.pop()
    seen = []
    for answer in answers:
        with suppress(ValueError):
            document = json.loads(answer.body)
            length = re.search(r"got ([\d,]+)", str(document.get("detail", "")))
            size = int(length[1].replace(",", "")) if length else len(PIXELS) if answer.status == 200 else None
            name = document.get("request_id", REFUSED if answer.status >= 400 else "")
            seen.append(Seen(name if name == REFUSED or name.encode() in content else "", size, answer.status >= 400))
    return Parsed(tuple(seen), "closed" if is_closed else "open")


def read_recorded(outcome: Outcome) -> Parsed:
    """Read from the answers of nginx with the recorder behind it what nginx made of a stream."""
    seen: list[Seen] = []
    for answer in outcome.answers:
        if answer.status != 200:
            return Parsed(tuple(seen), "refused")
        seen.append(Seen(**json.loads(answer.body)))
    return Parsed(tuple(seen), "closed" if outcome.end != "open" else "open")


def find_difference(own: Parsed, peer: Parsed) -> str:
    """Say in what the server's view differs from a peer's; nothing if it does not, or closed before."""
    for place, request in enumerate(own.requests):
        if place >= len(peer.requests):
            if peer.end != "closed" and request.is_error and place == len(own.requests) - 1:
                break  # nothing but an error; it may be answered before the request is whole
            return {
                "refused": f"answers {request.name}, {REFUSED_THERE}",
                "open": f"answers {request.name}, which is not whole there",
                "closed": f"answers {request.name} behind the close",
            }[peer.end]
        other = peer.requests[place]
        if request.name == REFUSED:
            continue
        if request.name != other.name:
            return f"answers {request.name}, which is {other.name} there"
        if None not in (request.size, other.size) and request.size != other.size:
            return f"reads {request.size} bytes as the body of {request.name}, which are {other.size} there"
    if own.end == "open" and len(own.requests) < len(peer.requests):
        return f"waits, where {peer.requests[len(own.requests)].name} is whole there"
    return ""


@asynccontextmanager
async def recording() -> AsyncIterator[int]:
    """Answer every request with its name and the length of its body; yield the port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, seen = h11.Connection(h11.SERVER), {"name": "", "size": 0}
        with suppress(h11.RemoteProtocolError, OSError, asyncio.CancelledError):  # the last: at the end of all
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Request):
                    seen = {"name": dict(event.headers).get(b"x-request-id", b"").decode("latin-1"), "size": 0}
                elif isinstance(event, h11.Data):
                    seen["size"] += len(event.data)  # type: ignore[operator]  # a number
                elif isinstance(event, h11.EndOfMessage):
                    body = json.dumps(seen).encode()
                    head = h11.Response(status_code=200, headers=[("Content-Length", str(len(body)))])
                    parts = [connection.send(each) for each in (head, h11.Data(body), h11.EndOfMessage())]
                    writer.write(b"".join(part for part in parts if part))
                    if connection.our_state is h11.MUST_CLOSE:
                        break
                    connection.start_next_cycle()
                else:
                    break
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log crit;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_max_body_size 0;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $http_host;
    upstream recorder {{ server 127.0.0.1:{recorder}; keepalive 4; keepalive_timeout 2s; }}
    upstream own {{ server 127.0.0.1:{own}; keepalive 4; keepalive_timeout 2s; }}
    server {{ listen 127.0.0.1:{ports[0]}; location / {{ proxy_pass http://recorder; }} }}
    server {{ listen 127.0.0.1:{ports[1]}; location / {{ proxy_pass http://own; }} }}
}}
"""


@contextmanager
def proxying(program: str, recorder: int, own: int) -> Iterator[tuple[int, int]]:
    """Run nginx in front of the recorder and of the server; yield the ports of both."""
    with tempfile.TemporaryDirectory() as folder:
        ports = find_port(), find_port()
        path = Path(folder) / "nginx.conf"
        path.write_text(CONFIGURATION.format(folder=folder, recorder=recorder, own=own, ports=ports))
        log = Path(folder) / "error.log"
        process = subprocess.Popen([program, "-e", log, "-p", folder, "-c", path], stderr=subprocess.DEVNULL)
        try:
            ends = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", ports[0]), timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > ends:
                        raise AssertionError(f"nginx does not listen: {log.read_text()}") from None
                    time.sleep(0.05)
            yield ports
        finally:
            process.terminate()
            process.wait(20)


def find_nginx() -> str | None:
    """Find nginx, also where Debian puts it and a user's path does not lead."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


async def compare_streams(
    port: int, seed: int, number: int, key: str = "", program: str | None = find_nginx()
) -> Comparison:
    """Compare what a server, h11, and nginx if there is one make of the classics and of so many other streams.

    Args:
        number: of streams beside the classics; with 0 there are none at all.
    """
    comparison = Comparison(with_nginx=program is not None)
    if number == 0:
        return comparison
    source = Streams(seed, key)
    streams = source.build_classics() | {f"{seed}-{place}": source.build(place) for place in range(number)}
    room = asyncio.Semaphore(AT_ONCE)

    async def compare(name: str, content: bytes, proxies: tuple[int, int] | None) -> None:
        async with room:
            found, answered = await compare_stream(port, name, content, proxies)
        comparison.number += 1
        comparison.answered += answered
        is_bad = any(each.peer == "h11" for each in found)
        for each in found:
            is_allowed = not is_bad and each.what.endswith(REFUSED_THERE)
            (comparison.refused_by_nginx if is_allowed else comparison.differences).append(each)

    async with recording() as recorder:
        with proxying(program, recorder, port) if program else _without() as proxies:
            await asyncio.gather(*(compare(name, content, proxies) for name, content in streams.items()))
    comparison.differences.sort(key=lambda found: found.name)
    return comparison


@contextmanager
def _without() -> Iterator[None]:
    yield None


async def compare_stream(
    port: int, name: str, content: bytes, proxies: tuple[int, int] | None
) -> tuple[list[Difference], int]:
    """Compare what is made of one stream; return the differences, and how many requests the server answered."""
    chance = Random(name)
    is_classic = not name[0].isdigit()  # sent in one piece, so that it fails each time or never
    pieces = tuple(cut(chance, content, 1 if is_classic else chance.choice((1, 1, 2, 5))))
    exchange = Exchange(0, "stream", pieces, pause_s=0.005 if len(pieces) > 1 else 0)
    own = read_own(await play(port, exchange, 0), content)
    views = {"h11": (own, parse_with_h11(content))}
    if proxies is not None:
        recorded, behind = [await play(proxy, exchange, 0) for proxy in proxies]
        views["nginx"] = (own, read_recorded(recorded))
        views["nginx in front"] = (read_own(behind, content), read_recorded(recorded))
    found = [Difference(name, peer, what, content) for peer, pair in views.items() if (what := find_difference(*pair))]
    return found, len(own.requests)
