"""Exchanges that no well-meaning client has with a server, each a function of a seed and a number.

An exchange is what is sent on one connection, in which pieces, with which pauses, and how the client ends it. What the
first answers of it must be is known where it begins with requests that are good, or is wrong in one known way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from tests.hostile_bodies import INFER, NUM_BYTES, Body, draw_body, draw_bomb
from tests.mutate import change_bytes

MAX_HEAD_BYTES = 32 * 2**10
MAX_BODY_BYTES = 16 * 2**20
ANYTHING = 0
"""In the place of a status that is not known."""

PIXELS = b"\x80" * NUM_BYTES


@dataclass(frozen=True)
class Exchange:
    """What is sent on one connection.

    Attributes:
        kind: the rule of the grammar that it comes from.
        pieces: what is sent, each as one write.
        pause_s: after each piece.
        ending: `read` until nothing more comes; `wait` until the server closes; `leave` at the end of the pieces, with
            `reset` for a TCP reset; `half-close`, and read; `deaf`: read nothing, and leave.
        expected: statuses of the first answers; ANYTHING where the status is not known.
    """

    number: int
    kind: str
    pieces: tuple[bytes, ...]
    pause_s: float = 0.0
    ending: str = "read"
    expected: tuple[int, ...] = ()

    @property
    def content(self) -> bytes:
        """All that is sent."""
        return b"".join(self.pieces)


@dataclass
class Draft:
    """A request, in parts that can be changed one by one."""

    method: bytes = b"POST"
    target: bytes = b"/predict"
    version: bytes = b"HTTP/1.1"
    host: list[bytes] = field(default_factory=lambda: [b"Host: localhost"])
    fields: list[bytes] = field(default_factory=list)
    framing: list[bytes] = field(default_factory=list)
    payload: bytes = b""
    spaces: tuple[bytes, bytes] = (b" ", b" ")
    eol: bytes = b"\r\n"

    def build(self) -> bytes:
        """Build the bytes that are sent."""
        line = self.method + self.spaces[0] + self.target + self.spaces[1] + self.version
        return self.eol.join([line, *self.host, *self.fields, *self.framing, b"", b""]) + self.payload

    def put(self, body: Body) -> None:
        """Set the body, its path and its type."""
        self.target = body.path
        self.fields += [b"Content-Type: " + body.content_type, *body.headers]
        self.payload = body.content
        self.framing = [b"Content-Length: %d" % len(body.content)]


Rule = Callable[[Random, int], Exchange]


def _name(rule: Rule) -> str:
    return rule.__name__.removeprefix("_draw_")


class Grammar:
    """The rules, for one server.

    Args:
        seed: of all exchanges.
        key: that the server accepts; without one the server asks for none.
        is_costly: whether there are bodies of megabytes, and images that take a second to decode.
    """

    def __init__(self, seed: int, key: str = "", *, is_costly: bool = True) -> None:
        self._seed = seed
        self._fields = [f"Authorization: Bearer {key}".encode()] if key else []
        self._is_costly = is_costly

    def build(self, number: int) -> Exchange:
        """Build the exchange of a number."""
        rule, chance = self._choose(number)
        return replace(rule(chance, number), kind=_name(rule))

    def get_kind(self, number: int) -> str:
        """Get the kind of a number's exchange, without building it."""
        return _name(self._choose(number)[0])

    def _choose(self, number: int) -> tuple[Rule, Random]:
        chance = Random(f"{self._seed}-{number}")
        rules: dict[Rule, float] = {
            self._draw_changed: 40,
            self._draw_body: 30,
            self._draw_pipeline: 12,
            self._draw_head_of_size: 4,
            self._draw_hosts: 2,
            self._draw_trailers: 1.5,
            self._draw_idle: 1,
            self._draw_rubbish: 3,
            self._draw_lone_lines: 1,
            self._draw_late_body: 1.5,
        }
        if self._is_costly:
            rules |= {self._draw_bomb: 0.3, self._draw_large: 0.3}
        (rule,) = chance.choices(list(rules), list(rules.values()))
        return rule, chance

    def build_good(self, chance: Random, request_id: str = "") -> tuple[bytes, int]:
        """Build a request that is good, and the status of its answer."""
        draft = Draft(fields=list(self._fields))
        if request_id:
            draft.fields.append(f"X-Request-ID: {request_id}".encode())
        kind = chance.randrange(4)
        if kind == 0:
            draft.method, draft.target = b"GET", chance.choice((b"/health/live", b"/v2", b"/model", b"/metrics", b"/"))
        elif kind == 1:
            draft.put(Body(bytes(100), b"application/octet-stream"))
        else:
            draft.put(Body(PIXELS, b"application/octet-stream"))
        if kind == 3:
            half = len(PIXELS) // 2
            draft.framing = [b"Transfer-Encoding: chunked"]
            draft.payload = build_chunks([PIXELS[:half], PIXELS[half:]])
        return draft.build(), 400 if kind == 1 else 200

    def _begin(self, chance: Random) -> Draft:
        draft = Draft(fields=list(self._fields))
        if chance.random() < 0.5:
            draft.put(draw_body(chance))
        elif chance.random() < 0.5:
            draft.put(Body(PIXELS, b"application/octet-stream"))
        else:
            targets = (
                b"/health/live",
                b"/model",
                b"/metrics",
                b"/v2",
                b"/openapi.json",
                b"/",
                b"/v2/health/ready",
                b"/x",
            )
            draft.method, draft.target = b"GET", chance.choice(targets)
        return draft

    def _draw_changed(self, chance: Random, number: int) -> Exchange:
        """Change a request in one or two ways."""
        draft = self._begin(chance)
        for change in chance.sample(CHANGES, chance.choice((1, 1, 2))):
            change(chance, draft)
        content = draft.build()
        if chance.random() < 0.15:
            content = change_bytes(chance, content)
        return deliver(chance, number, content, ())

    def _draw_body(self, chance: Random, number: int) -> Exchange:
        """Send a strange body in a request that is good otherwise."""
        draft = Draft(fields=list(self._fields))
        draft.put(draw_body(chance))
        if chance.random() < 0.2:
            chunks = cut(chance, draft.payload, chance.choice((1, 3, 50)))
            draft.framing, draft.payload = [b"Transfer-Encoding: chunked"], build_chunks(chunks)
        return deliver(chance, number, draft.build(), ())

    def _draw_bomb(self, chance: Random, number: int) -> Exchange:
        draft = Draft(fields=list(self._fields))
        draft.put(draw_bomb(chance))
        return Exchange(number, "", (draft.build(),), ending=chance.choice(("read", "read", "read", "leave")))

    def _draw_pipeline(self, chance: Random, number: int) -> Exchange:
        """Send several requests at once, good ones first."""
        parts, expected = [], []
        for _ in range(chance.choice((1, 1, 2, 3, 30, 100))):
            content, status = self.build_good(chance)
            parts.append(content)
            expected.append(status)
        expected = expected[:25]  # how many may wait is the server's to decide
        for _ in range(chance.choice((0, 1, 1, 2))):
            if chance.random() < 0.3:
                parts.append(chance.choice((b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" ", b"\0")))
            draft = self._begin(chance)
            for change in chance.sample(CHANGES, chance.choice((0, 1, 1))):
                change(chance, draft)
            parts.append(draft.build())
        exchange = deliver(chance, number, b"".join(parts), tuple(expected))
        return exchange

    def _draw_head_of_size(self, chance: Random, number: int) -> Exchange:
        """Send a head of a size at, around or above the limit; alone, or behind a request that is good."""
        size = MAX_HEAD_BYTES + chance.choice((-1000, -64, -5, 5, 64, 1000, MAX_HEAD_BYTES, 10 * MAX_HEAD_BYTES))
        draft = Draft(b"GET", b"/health/live", fields=list(self._fields))
        missing = size - len(draft.build())
        kind = chance.randrange(3)
        if kind == 0:
            draft.fields += [b"X-A: " + b"a" * (missing - 7)]
        elif kind == 1:
            draft.target += b"?" + b"a" * (missing - 1)
        else:
            rows, rest = divmod(missing - 100, 8)
            draft.fields += [b"X-A: %d" % (row % 10) for row in range(rows)] + [b"X-B: " + b"b" * (rest + 93)]
        expected: tuple[int, ...] = (200 if size < MAX_HEAD_BYTES else 431,)
        if kind == 1 and expected == (200,):
            expected = (ANYTHING,)
        content = draft.build()
        if kind == 2 and size < MAX_HEAD_BYTES:
            expected = (ANYTHING,)  # a server may limit the number of fields
        if chance.random() < 0.4:
            good, status = self.build_good(chance)
            content, expected = good + content, (status, *expected)
        pieces = (content,) if chance.random() < 0.6 else tuple(cut(chance, content, chance.choice((2, 5, 200))))
        return Exchange(number, "", pieces, expected=expected)

    def _draw_hosts(self, chance: Random, number: int) -> Exchange:
        """Send no Host, or two, or one that is none."""
        wrong: tuple[list[bytes], ...] = (
            [],
            [b"Host: a", b"Host: a"],
            [b"Host: a", b"host: b"],
            [b"Host: a", b"X: b", b"HOST: a"],
        )
        draft = Draft(b"GET", b"/health/live", fields=list(self._fields), host=list(chance.choice(wrong)))
        if chance.random() < 0.5:
            draft.put(Body(PIXELS, b"application/octet-stream"))
            draft.method = b"POST"
        return Exchange(number, "", (draft.build(),), expected=(400,))

    def _draw_trailers(self, chance: Random, number: int) -> Exchange:
        """Send trailers behind the last chunk, of which there may be very many."""
        draft = Draft(fields=[*self._fields, b"Content-Type: application/octet-stream"])
        draft.framing = [b"Transfer-Encoding: chunked"]
        rows = chance.choice((1, 10, 1000, 20_000))
        trailer = chance.choice((b"X-A: b", b"Content-Length: 5", b"Host: b", b"X" * 30, b": ", b"X-A: " + b"a" * 1000))
        draft.payload = build_chunks([PIXELS])[:-2] + (trailer + b"\r\n") * rows
        draft.payload += chance.choice((b"\r\n", b""))
        return deliver(chance, number, draft.build(), ())

    def _draw_idle(self, chance: Random, number: int) -> Exchange:
        """Send a request, or a part of one, and then hardly anything, until the server closes."""
        good, status = self.build_good(chance)
        after = (
            b"",
            b"\r\n",
            b"\r\n\r\n",
            b"\n",
            b"G",
            b"GET / HTTP/1.1\r\n",
            b"POST /predict HTTP/1.1\r\nHost: a\r\n",
        )
        more = chance.choice((*after, *after, good[:-50], b"\r\n" * 2000))
        if chance.random() < 0.2:
            return Exchange(number, "", (chance.choice((b"", more)),), ending="wait")
        pieces = (good, more) if chance.random() < 0.7 else (good + more,)
        return Exchange(number, "", pieces, pause_s=0.2, ending="wait", expected=(status,))

    def _draw_rubbish(self, chance: Random, number: int) -> Exchange:
        """Send what is no HTTP, or HTTP of another kind."""
        content = chance.choice(
            (
                chance.randbytes(chance.choice((1, 10, 1000, 100_000))),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500),  # TLS
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
                b"\r\n" * chance.choice((1, 100, 100_000)),
                b"\0" * 1000,
                b"GET / HTTP/0.9\r\n\r\n",
                b"GET /\r\n",
                b"GET\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
                b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
                b"a" * chance.choice((10, 100_000)),
                b"GET " + b"/" * 100_000,
                b"SSH-2.0-a\r\n",
                b"*1\r\n$4\r\nPING\r\n",
            )
        )
        return deliver(chance, number, content, ())

    def _draw_lone_lines(self, chance: Random, number: int) -> Exchange:
        """Send a good request with line ends of another kind."""
        content, _ = self.build_good(chance)
        head, _, body = content.partition(b"\r\n\r\n")
        other = chance.choice((b"\n", b"\r", b"\r\r\n", b"\n\r", b"\x0b", b"\r\n\r", b" \r\n"))
        where = chance.randrange(3)
        lines = (head + b"\r\n").split(b"\r\n")
        if where == 0:
            head = other.join(lines)
        else:
            at = chance.randrange(1, len(lines))
            head = b"\r\n".join(lines[:at]) + other + b"\r\n".join(lines[at:])
        return deliver(chance, number, head + other + body, ())

    def _draw_late_body(self, chance: Random, number: int) -> Exchange:
        """Ask whether to go on, and send the body late, never, or without waiting for the answer."""
        draft = Draft(fields=[*self._fields, b"Expect: 100-continue", b"Content-Type: application/octet-stream"])
        size = chance.choice((NUM_BYTES, NUM_BYTES, 0, MAX_BODY_BYTES + 1, 10**12))
        draft.framing = [b"Content-Length: %d" % size] if chance.random() < 0.8 else [b"Transfer-Encoding: chunked"]
        body = chance.choice((b"", PIXELS, PIXELS * 3, b"5\r\nabcde\r\n0\r\n\r\n"))
        return Exchange(number, "", (draft.build(), body), pause_s=chance.choice((0, 0.1)))

    def _draw_large(self, chance: Random, number: int) -> Exchange:
        """Send a body of as many bytes as are taken, or more, all of it before anything is read of the answer."""
        draft = Draft(fields=[*self._fields])
        kind = chance.choice(
            (b"application/octet-stream", b"application/json", b"image/png", b"multipart/form-data; boundary=x")
        )
        path = chance.choice((b"/predict", INFER.encode(), b"/x", b"/model"))
        size = MAX_BODY_BYTES + chance.choice((-1000, 0, 1, 2**20))
        draft.put(Body(b"[" * size, kind, path))
        if chance.random() < 0.4:
            draft.framing, draft.payload = [b"Transfer-Encoding: chunked"], build_chunks([draft.payload])
        is_over = size > MAX_BODY_BYTES and path in (b"/predict", INFER.encode())
        ending = chance.choice(("read", "read", "leave"))
        return Exchange(number, "", (draft.build(),), ending=ending, expected=(413,) if is_over else ())


def build_chunks(chunks: Sequence[bytes]) -> bytes:
    """Build a body in chunks, with its end."""
    return b"".join(b"%x\r\n" % len(chunk) + chunk + b"\r\n" for chunk in chunks if chunk) + b"0\r\n\r\n"


def cut(chance: Random, content: bytes, number: int) -> list[bytes]:
    """Cut content into so many pieces at most, at random places."""
    if len(content) < 2:
        return [content]
    places = sorted({chance.randrange(1, len(content)) for _ in range(number - 1)})
    return [content[start:end] for start, end in zip([0, *places], [*places, len(content)], strict=True)]


def deliver(chance: Random, number: int, content: bytes, expected: tuple[int, ...]) -> Exchange:
    """Choose how content is sent: at once or in pieces, fast or slowly, to its end or not."""
    ways = ("at once", "pieces", "bytes", "slowly", "leave", "reset", "half-close", "deaf")
    (way,) = chance.choices(ways, (50, 15, 5, 6, 9, 4, 6, 3))
    if way in ("leave", "reset"):
        content = content[: chance.randrange(len(content) + 1)]
    pieces, pause_s, ending = [content], 0.0, way if way in ("leave", "reset", "half-close", "deaf") else "read"
    if way == "pieces":
        pieces = cut(chance, content, chance.choice((2, 3, 10)))
    elif way == "bytes":
        pieces = [content[at : at + 1] for at in range(min(len(content), 400))] + [content[400:]]
    elif way == "slowly":
        pieces = cut(chance, content, chance.choice((2, 5, 20)))
        pause_s = chance.choice((0.01, 0.05, 0.1))
    elif way == "deaf":
        pieces = [content] * chance.choice((1, 20, 200)) if len(content) < 10_000 else [content]
    return Exchange(number, "", tuple(piece for piece in pieces if piece), pause_s, ending, expected)


# The ways in which a request is changed.


def change_line(chance: Random, draft: Draft) -> None:
    """Change the request line."""
    kind = chance.randrange(5)
    if kind == 0:
        methods = (
            *(
                b"get",
                b"GET ",
                b"",
                b"FOO",
                b"HEAD",
                b"OPTIONS",
                b"TRACE",
                b"CONNECT",
                b"PUT",
                b"DELETE",
                b"PATCH",
                b"PRI",
            ),
            *(b"G\0T", b"G\xffT", b"A" * 100_000, b"\rGET", b"M-SEARCH", b"(", b'"', b"POST\t", b"PO ST", b"QUERY"),
        )
        draft.method = chance.choice(methods)
    elif kind == 1:
        draft.target = chance.choice(_TARGETS)
    elif kind == 2:
        versions = (
            *(b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"HTTP/1.10", b"http/1.1", b"HTTP/11", b"HTTP/", b""),
            *(
                b"HTTP/1.1 ",
                b"HTTP/1.1 a",
                b"HTTP /1.1",
                b"HTTP/1,1",
                b"HTTP/-1.1",
                b"HTTP/1.\xb1",
                b"ICE/1.0",
                b"RTSP/1.0",
            ),
            *(b"HTTP/1.1\0", b"HTTP/99999999999.1", b"HTTP/3", b"SHTTP/1.1"),
        )
        draft.version = chance.choice(versions)
    elif kind == 3:
        spaces = (b"  ", b"\t", b"", b" \t", b"\x0b", b"\x0c", b"\xa0", b"\r", b"\n", b"\r\n", b"\0", b" " * 5000)
        draft.spaces = chance.choice(((b" ", chance.choice(spaces)), (chance.choice(spaces), b" ")))
    else:
        draft.method = (
            chance.choice((b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b"\r\n" * 500)) + draft.method
        )


_TARGETS = (
    *(
        b"*",
        b"",
        b"//",
        b"///predict",
        b"/predict/",
        b"/predict?",
        b"/predict#a",
        b"/./predict",
        b"/../predict",
        b"/a/../predict",
    ),
    *(
        b"http://localhost/predict",
        b"http://other/predict",
        b"https://localhost:99999/predict",
        b"http://",
        b"http:///predict",
    ),
    *(
        b"localhost:80",
        b"localhost",
        b"predict",
        b"/pre dict",
        b"/pre\tdict",
        b"/\0",
        b"/\xff",
        b"/\xc3\xa4",
        b"/%",
        b"/%zz",
    ),
    *(b"/%00", b"/%2e%2e/etc/passwd", b"/../../etc/passwd", b"/%70redict", b"/PREDICT", b"/predict;a=b", b"/predict\\"),
    *(
        b"/" + b"a" * 30_000,
        b"/" + b"a" * 70_000,
        b"/" + b"../" * 5000,
        b"/?" + b"a=b&" * 5000,
        b"?",
        b"#",
        b"/\r\nX: y",
        b"/\x7f",
    ),
    *(
        b"/v2/models/a/infer",
        b"/v2/models//infer",
        b"/v2/models/%2f/infer",
        b"/v2/models/image_classifier/versions/x/infer",
    ),
    *(
        b"/v2/models/" + b"a" * 20_000 + b"/infer",
        b"/v2/models/image_classifier/versions//ready",
        b"/docs",
        b"/page/../../x",
    ),
    *(
        b"http://user:password@localhost/predict",
        b"ftp://a/b",
        b"/predict HTTP/1.1\r\nX:",
        b"http://[::1/predict",
        b"/metrics?a",
    ),
)


def change_fields(chance: Random, draft: Draft) -> None:
    """Add fields that are odd."""
    field = chance.choice(_ODD_FIELDS)
    number = chance.choice((1, 1, 1, 2, 100, 1000, 10_000))
    if number * len(field) > 2**20:
        number = 1
    at = chance.randrange(len(draft.fields) + 1)
    draft.fields[at:at] = [field] * number


_ODD_FIELDS = (
    *(
        b"a",
        b":",
        b": b",
        b"a:",
        b" a: b",
        b"a : b",
        b"a\t: b",
        b"a: b\r\n c",
        b"a: b\r\n\tc",
        b"a:\r\n b",
        b"\ta: b",
    ),
    *(
        b"a\0: b",
        b"a: b\0c",
        b"\xff: b",
        b"a: \xff\xfe",
        b"a: b\rc",
        b"a: b\nc: d",
        b"a: b\r",
        b"(a): b",
        b"a b: c",
    ),
    *(
        b'"a": b',
        b"a: " + b"b" * 10_000,
        b"a" * 10_000 + b": b",
        b"a: \x01\x02\x1b[31m",
        b"a: \x7f",
        b"\x80: \x80",
    ),
    *(
        b"Host : a",
        b"X-Request-ID: " + b"a" * 129,
        b"X-Request-ID: \xff",
        b"X-Request-ID: a\tb",
        b"X-Request-ID:",
    ),
    *(
        b"Accept: " + b"a/b, " * 3000,
        b"Cookie: " + b"a=b;" * 5000,
        b"Range: bytes=0-,0-,0-",
        b"Forwarded: for=a",
    ),
    *(
        b"X-Forwarded-For: 1.2.3.4, a",
        b"X-Forwarded-Proto: javascript",
        b"traceparent: 00-\xff-b-1",
        b"traceparent: ---",
    ),
    *(
        b"X-HTTP-Method-Override: DELETE",
        b"Content_Length: 5",
        b"Date: a",
        b"If-None-Match: *",
        b"TE: trailers",
    ),
)


def change_framing(chance: Random, draft: Draft) -> None:
    """Change how the length of the body is said."""
    size = len(draft.payload)
    kind = chance.randrange(5)
    if kind <= 1:
        draft.framing = draw_lengths(chance, size)
    elif kind == 2:
        draft.framing = [b"Transfer-Encoding: " + chance.choice(CODINGS)] * chance.choice((1, 1, 2))
        draft.payload = draw_chunks(chance, draft.payload)
    elif kind == 3:
        draft.framing = [chance.choice(ODD_CODING_FIELDS)]
        if chance.random() < 0.5:
            draft.framing.insert(chance.randrange(2), b"Content-Length: %d" % chance.choice((size, 0, 5, size + 10)))
        draft.payload = draw_chunks(chance, draft.payload)
    else:
        draft.framing = []


def draw_lengths(chance: Random, size: int) -> list[bytes]:
    """Draw Content-Length fields that are odd, for a body of so many bytes."""
    number = b"%d" % size
    values = (
        *(
            b"+" + number,
            b"-" + number,
            b"-1",
            b"0x%x" % size,
            b"%o" % size,
            b"0" + number,
            b"0" * 500 + number,
            number + b".0",
        ),
        *(
            number + b", " + number,
            number + b",",
            b"," + number,
            number + b" " + number,
            number + b";",
            b"",
            b" ",
            b"a",
        ),
        *(b"%d" % (size + 1), b"%d" % max(0, size - 1), b"0", b"1", b"99999999999999", b"9" * 30, b"9" * 5000),
        *(b"18446744073709551616", b"18446744073709551617", b"9223372036854775808", b"4294967296", b"4294967297"),
        *(
            b"\xb2",
            number + b"\0",
            number + b"\t",
            b"\t" + number,
            number + b"\x0b",
            number + b"\r",
            b"1e3",
            b"1_0",
            b"'5'",
        ),
    )
    name = chance.choice(
        (b"Content-Length: ", b"Content-Length: ", b"Content-Length:", b"content-length : ", b"CONTENT-LENGTH: ")
    )
    framing = [name + chance.choice(values)]
    if chance.random() < 0.3:
        framing.insert(chance.randrange(2), b"Content-Length: " + chance.choice((number, *values)))
    return framing


CODINGS = (
    *(
        b"chunked",
        b"chunked",
        b"chunked",
        b"Chunked",
        b"CHUNKED",
        b"chunked ",
        b"\tchunked",
        b"\x0bchunked",
        b"chunked\x0b",
    ),
    *(
        b"chunked, chunked",
        b"identity",
        b"identity, chunked",
        b"chunked, identity",
        b"gzip, chunked",
        b"gzip",
        b"chunked, gzip",
    ),
    *(
        b"xchunked",
        b"chunkedx",
        b"chunked;q=1",
        b'"chunked"',
        b"'chunked'",
        b",chunked",
        b"chunked,",
        b"",
        b"chunk",
        b"x, y",
    ),
    *(
        b"chunked\0",
        b"chu\0nked",
        b"\xffchunked",
        b"chunked\r\n\t",
        b"\r\n chunked",
        b"trailers",
        b"deflate;chunked",
        b"chun ked",
    ),
)

ODD_CODING_FIELDS = (
    *(
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding\t: chunked",
        b"Transfer-Encoding:chunked",
        b" Transfer-Encoding: chunked",
    ),
    *(b"Transfer_Encoding: chunked", b"X: y\nTransfer-Encoding: chunked", b"X: y\rTransfer-Encoding: chunked"),
    *(
        b"Transfer-Encoding\0: chunked",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: identity",
        b"Transfer\xadEncoding: chunked",
    ),
    *(b"TRANSFER-ENCODING: chunked", b"Transfer-Encoding", b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked"),
)


def draw_chunks(chance: Random, payload: bytes) -> bytes:
    """Draw a body in chunks, most often with something odd in one of them."""
    chunks = cut(chance, payload, chance.choice((1, 2, 3, 10))) if payload else []
    if chance.random() < 0.2:
        return build_chunks(chunks)
    parts = [[b"%x" % len(chunk), b"\r\n", chunk, b"\r\n"] for chunk in chunks] + [[b"0", b"\r\n", b"", b"\r\n"]]
    part = chance.choice(parts)
    kind = chance.randrange(4)
    size = part[0]
    if kind == 0:
        part[0] = _draw_size(chance, size)
    elif kind == 1:
        part[0] += chance.choice(_EXTENSIONS)
    elif kind == 2:
        part[1] = chance.choice((b"\n", b"\r", b"\r\r\n", b"", b"\r\n\r\n", b"\r\n ", b"\rX", b"\nX"))
    else:
        part[3] = chance.choice((b"\n", b"\r", b"", b"XX", b"\r\n\r\n", b"\rX", b" \r\n", b"X: y\r\n\r\n", b"\r\nX"))
    return b"".join(b"".join(part) for part in parts)


def _draw_size(chance: Random, size: bytes) -> bytes:
    return chance.choice(
        (
            *(
                b"0x" + size,
                b"+" + size,
                b"-" + size,
                b" " + size,
                size + b" ",
                size + b"\t",
                b"\t" + size,
                b"",
                b"g",
            ),
            *(
                b"0" * 20 + size,
                b"0" * 5000 + size,
                b"f" * 15,
                b"f" * 16,
                b"f" * 17,
                b"1" + b"0" * 16,
                b"10000000000000005",
            ),
            *(
                b"80000000",
                b"100000005",
                size.upper(),
                size + b"\0",
                size + b"h",
                size + b" 5",
                b"5 5",
                b"7fffffffffffffff",
            ),
            *(b"-1", b"-0", size + b"\xff", b"\xef\xbc\x95"),
        )
    )


_EXTENSIONS = (
    *(
        b";a",
        b";a=b",
        b';a="b"',
        b";",
        b";;",
        b"; a=b",
        b" ;a=b",
        b';a="\r\n"',
        b";a=\rb",
        b";a\n",
        b";\0",
        b";\xff",
    ),
    *(
        b';a="',
        b";a=b;" * 100,
        b";a=" + b"b" * 5000,
        b";a=" + b"b" * 100_000,
        b";\r",
        b";\n",
        b";a=b\n0\r\n\r\n",
    ),
)


def change_connection(chance: Random, draft: Draft) -> None:
    """Ask to keep, close or change the connection, in odd ways."""
    value = chance.choice(
        (
            *(
                b"close",
                b"keep-alive",
                b"Close",
                b"close, keep-alive",
                b"keep-alive, close",
                b"upgrade",
                b"",
                b",",
                b"\xff",
                b"x",
            ),
            *(
                b"Content-Length",
                b"Transfer-Encoding",
                b"Host",
                b"close\0",
                b"TE",
                b"a" * 9000,
                b"close;q=0",
                b"Authorization",
            ),
        )
    )
    draft.fields.append(b"Connection: " + value)
    if chance.random() < 0.2:
        draft.fields += [b"Connection: close", b"Keep-Alive: timeout=99999, max=-1", b"Proxy-Connection: keep-alive"]
    if chance.random() < 0.2:
        draft.version = b"HTTP/1.0"


def change_upgrade(chance: Random, draft: Draft) -> None:
    """Ask for another protocol."""
    value = chance.choice((b"websocket", b"h2c", b"TLS/1.0", b"", b"websocket, h2c", b"\xff", b"HTTP/2.0"))
    draft.fields += [
        b"Upgrade: " + value,
        b"Connection: Upgrade, HTTP2-Settings",
        b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    ]
    if chance.random() < 0.5:
        draft.fields += [b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13"]


def change_expect(chance: Random, draft: Draft) -> None:
    """Expect something."""
    values = (
        b"100-continue",
        b"100-Continue",
        b"200-ok",
        b"",
        b"100-continue, 100-continue",
        b"100-continue ",
        b"\xff",
    )
    draft.fields += [b"Expect: " + chance.choice(values)] * chance.choice((1, 1, 2))


def change_host(chance: Random, draft: Draft) -> None:
    """Change the Host."""
    hosts = (
        b"",
        b"a b",
        b"a/b",
        b"a@b",
        b"[::1",
        b"\xff",
        b"a" * 5000,
        b"a,b",
        b"localhost:99999",
        b"a\0b",
        b"../..",
        b"a:b:c",
        b"*",
    )
    kind = chance.randrange(4)
    if kind == 0:
        draft.host = []
    elif kind == 1:
        draft.host.append(b"Host: " + chance.choice((b"localhost", b"other")))
    else:
        draft.host = [b"Host: " + chance.choice(hosts)]


def change_authorization(chance: Random, draft: Draft) -> None:
    """Change the key."""
    values = (
        *(
            b"",
            b"Bearer",
            b"Bearer ",
            b"Bearer  x",
            b"bearer x",
            b"Basic YTpi",
            b"Bearer " + b"a" * 20_000,
            b"Bearer \xff\xfe",
        ),
        *(
            b"Bearer a.b.c",
            b"Bearer eyJhbGciOiJub25lIn0.e30.",
            b"Bearer ..",
            b"Bearer a\0b",
            b"Bearer a b",
            b"Digest " + b"a=b," * 500,
        ),
        *(
            b"Bearer eyJhbGciOiJIUzI1NiIsImtpZCI6IlwwIn0.e30.AAAA",
            b"Bearer " + b"." * 5000,
            b"Bearer " + b"A" * 4000 + b".e30.a",
        ),
    )
    others = [field for field in draft.fields if not field.startswith(b"Authorization")]
    given = [b"Authorization: " + chance.choice(values)] * chance.choice((0, 1, 1, 1, 2, 50))
    draft.fields = given + others
    if chance.random() < 0.2:
        draft.fields.append(b"X-API-Key: " + chance.choice(values))


def change_payload(chance: Random, draft: Draft) -> None:
    """Send more or less than was said."""
    draft.payload = chance.choice(
        (draft.payload[:-1], draft.payload + b"\r\n", draft.payload + b"X", b"", draft.payload * 2)
    )


def change_line_ends(chance: Random, draft: Draft) -> None:
    """End lines in another way."""
    draft.eol = chance.choice((b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n ", b" \r\n", b"\0\r\n"))


CHANGES: tuple[Callable[[Random, Draft], None], ...] = (
    *(change_line, change_line, change_fields, change_fields, change_framing, change_framing, change_framing),
    *(
        change_connection,
        change_upgrade,
        change_expect,
        change_host,
        change_authorization,
        change_payload,
        change_line_ends,
    ),
)
