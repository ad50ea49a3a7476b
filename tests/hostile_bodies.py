"""Bodies of requests that no well-meaning client sends, of every type that the server takes, and of others.

Each follows from the generator of random numbers that it is given.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from image_classifier.imaging import MAX_SCANS
from tests.bombs import SIDE_OF_MOST, build_chunk, build_png, build_progressive, build_run_lengths, save
from tests.mutate import change_bytes, change_jpeg, change_json, change_png, change_riff, mix

NUM_BYTES = 3072
"""Of one image as raw pixels."""

INFER = "/v2/models/image_classifier/infer"
SIDE = 5000
"""Of a square with as many pixels as the server decodes unless it is told otherwise."""


@dataclass(frozen=True)
class Body:
    """A body, where it goes, and the fields that go with it."""

    content: bytes
    content_type: bytes
    path: bytes = b"/predict"
    headers: tuple[bytes, ...] = ()


@cache
def build_corpus() -> Mapping[bytes, tuple[bytes, ...]]:
    """Build valid image files by their type."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    small, smooth = Image.fromarray(pixels[:24, :24]), Image.fromarray(pixels[:4, :4]).resize((80, 64))
    return {
        b"image/png": (
            save(small),
            save(smooth.convert("RGBA")),
            save(smooth.convert("P"), transparency=3),
            save(smooth.convert("1")),
            save(small, save_all=True, append_images=[smooth]),
        ),
        b"image/jpeg": (
            save(smooth, "JPEG"),
            save(smooth, "JPEG", progressive=True),
            save(smooth.convert("CMYK"), "JPEG", progressive=True),
            save(smooth, "JPEG", restart_marker_blocks=2, icc_profile=b"profile" * 20),
        ),
        b"image/webp": (save(smooth.convert("RGBA"), "WEBP"), save(small, "WEBP", lossless=True)),
        b"image/bmp": (save(small, "BMP"), save(smooth.convert("P"), "BMP"), save(smooth.convert("1"), "BMP")),
    }


_MUTATORS = {
    b"image/png": mix(change_png, change_png, change_bytes),
    b"image/jpeg": mix(change_jpeg, change_jpeg, change_bytes),
    b"image/webp": mix(change_riff, change_bytes),
    b"image/bmp": change_bytes,
}

_BOMBS: tuple[tuple[bytes, Callable[[], bytes]], ...] = (
    (b"image/png", lambda: build_png(SIDE, SIDE, content=bytes((SIDE + 1) * SIDE))),
    (b"image/png", lambda: build_png(SIDE, SIDE, depth=16, colour=6, content=bytes((8 * SIDE + 1) * SIDE))),
    (b"image/png", lambda: build_png(SIDE_OF_MOST, SIDE_OF_MOST, content=bytes((SIDE_OF_MOST + 1) * SIDE_OF_MOST))),
    (b"image/png", lambda: build_png(SIDE * SIDE, 1, depth=1, content=bytes(1 + SIDE * SIDE // 8))),
    (b"image/png", lambda: build_png(2**31 - 1, 2**31 - 1)),
    (
        b"image/png",
        lambda: build_png(
            SIDE,
            SIDE,
            colour=3,
            chunks=build_chunk(b"PLTE", bytes(768)) + build_chunk(b"tRNS", bytes(256)),
            content=bytes((SIDE + 1) * SIDE),
        ),
    ),
    (b"image/jpeg", lambda: build_progressive(MAX_SCANS, (2000, 2000))),
    (b"image/jpeg", lambda: build_progressive(1000)),
    (b"image/webp", lambda: save(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4)), "WEBP", lossless=True)),
    (b"image/bmp", lambda: build_run_lengths(1024, b"\0\2\xff\xff" * 100)),
)


@cache
def _build_bomb(number: int) -> Body:
    kind, build = _BOMBS[number]
    return Body(build(), kind)


def build_all_bombs() -> None:
    """Build all of them now: whoever has other clients to see to has no time for that later."""
    for number in range(len(_BOMBS)):
        _build_bomb(number)


def draw_bomb(chance: Random) -> Body:
    """Draw an image file that is small and takes much to decode, as itself or in a form."""
    body = _build_bomb(chance.randrange(len(_BOMBS)))
    return body if chance.random() < 0.8 else _wrap(chance, [body.content], body.content_type)


def draw_image(chance: Random) -> Body:
    """Draw a changed image file, now and then under another type."""
    kind = chance.choice(list(_MUTATORS))
    content = chance.choice(build_corpus()[kind])
    if chance.random() < 0.9:
        content = _MUTATORS[kind](chance, content)
    declared = (
        kind if chance.random() < 0.9 else chance.choice((*_MUTATORS, b"image/gif", b"image/*", b"IMAGE/PNG; a=b"))
    )
    return Body(content, declared)


def draw_pixels(chance: Random) -> Body:
    """Draw raw pixels: of one image, of many, of too many, or not of whole ones."""
    number = chance.choice((1, 1, 1, 2, 8, 63, 64, 65, 200))
    size = number * NUM_BYTES + chance.choice((0, 0, 0, 1, -1, 1024, -3071))
    path = b"/predict" + chance.choice(_QUERIES)
    return Body(bytes([chance.randrange(256)]) * size, b"application/octet-stream", path)


_QUERIES = (
    *(b"", b"", b"", b"?top_k=3", b"?top_k=0", b"?top_k=1e3", b"?top_k=99999999999999", b"?top_k=%D9%A3", b"?top_k=3&"),
    *(b"?show_input=true", b"?request_id=%00", b"?request_id=a%0d%0ab", b"?request_id=", b"?a", b"?&&&&", b"?%", b"?="),
    *(b"?request_id=\xff", b"?top_k=1&top_k=2", b"?" + b"a=b&" * 200, b"?request_id=" + b"a" * 2000, b"?top_k=1;a=b"),
)


def draw_form(chance: Random) -> Body:
    """Draw multipart with parts of all kinds, an odd boundary, or bytes that are changed."""
    files = [
        chance.choice(chance.choice(list(build_corpus().values()))) for _ in range(chance.choice((1, 1, 2, 5, 70)))
    ]
    return _wrap(chance, files, chance.choice(list(_MUTATORS)))


_BOUNDARIES = (b"x", b"x", b"-", b"", b"a" * 70, b"a" * 5000, b'"x y"', b"x;y", b"\xff", b"x\0", b"--", b"\xc3\xa4")


def _wrap(chance: Random, files: list[bytes], kind: bytes) -> Body:
    boundary = chance.choice(_BOUNDARIES)
    bare = boundary.strip(b'"')
    parts = [_build_part(chance, content, kind) for content in files]
    if chance.random() < 0.3:
        names = (b"top_k", b"request_id", b"show_input", b"", b"a" * 3000, b"images")
        parts += [
            b'Content-Disposition: form-data; name="%s"\r\n\r\n' % chance.choice(names)
            + chance.choice((b"3", b"", b"\xff"))
        ] * chance.choice((1, 2, 12, 2000))
    chance.shuffle(parts)
    content = b"".join(b"--" + bare + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + bare
    content += chance.choice((b"--\r\n", b"--\r\n", b"--\r\n", b"--", b"", b"\r\n", b"--\r\n" + b"tail" * 1000))
    if chance.random() < 0.4:
        content = change_bytes(chance, content)
    declared = b"multipart/form-data; boundary=" + boundary
    if chance.random() < 0.15:
        declared = chance.choice(
            (
                *(b"multipart/form-data", b"multipart/form-data; boundary", b"multipart/form-data; boundary="),
                *(b"multipart/mixed; boundary=x", b"multipart/form-data; boundary=x; boundary=y"),
                *(b"multipart/form-data; boundary=x; charset=utf-16", b"multipart/form-data; charset=nope; boundary=x"),
                *(b"multipart/form-data; boundary*=utf-8''x", b"multipart/form-data;boundary*0=x;boundary*1=y"),
            )
        )
    return Body(content, declared)


def _build_part(chance: Random, content: bytes, kind: bytes) -> bytes:
    disposition = b'form-data; name="image"; filename="a.png"'
    if chance.random() < 0.3:
        disposition = chance.choice(
            (
                *(
                    b"form-data",
                    b"",
                    b"attachment",
                    b'form-data; filename="a"',
                    b'form-data; name="a',
                    b"form-data; name=\xff",
                ),
                *(
                    b'form-data; name="image"; filename="' + b"a" * 20_000 + b'"',
                    b"form-data; name*=utf-8''%ff; filename=a",
                ),
                *(
                    b'form-data; name="image"; filename="\\"; x="',
                    b"form-data;" + b" a=b;" * 500,
                    b'form-data; name="\0"',
                ),
            )
        )
    lines = [b"Content-Disposition: " + disposition, b"Content-Type: " + kind]
    if chance.random() < 0.2:
        more = (
            b"Content-Transfer-Encoding: base64",
            b"Content-Length: 5",
            b"a" * 9000,
            b": b",
            b"\0: \0",
            b"a: b\r\n c",
        )
        lines += [chance.choice(more)] * chance.choice((1, 1, 300))
    if chance.random() < 0.1:
        lines.pop(0)
    return b"\r\n".join(lines) + b"\r\n\r\n" + content


def draw_json(chance: Random) -> Body:
    """Draw JSON for `/predict`."""
    text = base64.b64encode(chance.choice(build_corpus()[b"image/png"])).decode()
    document: dict[str, Any] = {"images": [text] * chance.choice((0, 1, 1, 2, 64, 65)), "top_k": 3, "request_id": "a"}
    kind = chance.randrange(6)
    if kind == 0:
        junk = (
            "====",
            "a",
            text[:-1],
            text + "=",
            " " + text,
            "\u00e4",
            "A" * 10**6,
            "\0",
            text.replace("+", "-"),
            "AAAA",
        )
        document["images"] = [chance.choice(junk)] * chance.choice((1, 64))
    elif kind == 1:
        document["images"] = chance.choice(([[]], [{}], [None], "", {}, 5, [[[[text]]]], [1e400], [True], [text, 5]))
    content = json.dumps(document).encode()
    if kind == 2:
        content = draw_nested(chance)
    elif kind == 3:
        content = change_bytes(chance, content)
    elif kind == 4:
        content = change_json(chance, content)
    return Body(content, b"application/json" + chance.choice((b"", b"", b"; charset=utf-8", b"; charset=utf-16")))


def draw_nested(chance: Random) -> bytes:
    """Draw JSON that lies deep, is long, or is none."""
    depth = chance.choice((100, 1000, 1024, 1025, 100_000, 1_000_000))
    return chance.choice(
        (
            b"[" * depth,
            b"[" * depth + b"]" * depth,
            b'{"images":' * depth,
            b'{"images": ' + b"[" * 900 + b"]" * 900 + b"}",
            b'{"images": [' + b'"",' * 50_000 + b'""]}',
            b"{" + b",".join(b'"%d": 0' % number for number in range(depth // 10)) + b"}",
            b'{"images": "' + b"a" * depth + b'"}',
            b'{"images": ["\xff\xfe"]}',
            b'{"images": ["\\ud800"]}',
            b'\xef\xbb\xbf{"images": []}',
            b'{"images": [' + b"9" * 5000 + b"]}",
            b'{"images": [-0.0, 1e309, NaN]}',
            b'{"images": [], "images": []}',
            b"",
            b" " * depth,
            b"null",
        )
    )


def draw_infer(chance: Random) -> Body:
    """Draw a request of the Open Inference Protocol: JSON, or JSON with a binary tensor behind it."""
    number = chance.choice((1, 1, 1, 2, 64, 65))
    tensor: dict[str, Any] = {"name": "images", "datatype": "UINT8", "shape": [number, 32, 32, 3]}
    document: dict[str, Any] = {"id": "a", "inputs": [tensor]}
    if chance.random() < 0.5:
        document["outputs"] = [{"name": "probabilities", "parameters": {"classification": 3, "binary_data": True}}]
    if chance.random() < 0.4:
        return _draw_binary(chance, document, number)
    kind = chance.randrange(8)
    if kind == 0:
        tensor["data"] = [chance.randrange(256) for _ in range(NUM_BYTES)]
    elif kind == 1:
        tensor["data"] = ["a" * chance.choice((1, 1000, 30_000))] + [""] * chance.choice((10, 1000, 10_000))
    elif kind == 2:
        tensor["data"] = [[0] * chance.randrange(40) for _ in range(chance.choice((2, 32, 3000)))]
    elif kind == 3:
        odd: tuple[Any, ...] = (1.5, -1, 256, 2**63, 2**64 - 1, None, True, "1", [], {}, 1e300)
        tensor["data"] = [chance.choice(odd) for _ in range(chance.choice((1, 5, NUM_BYTES)))]
    elif kind == 4:
        shapes: tuple[Any, ...] = (
            [0, 32, 32, 3],
            [-1, 32, 32, 3],
            [2**62, 32, 32, 3],
            [1, 32, 32],
            [1, 3072],
            "x",
            [1.0, 32, 32, 3],
            [[]],
        )
        tensor["shape"] = chance.choice(shapes)
        tensor["data"] = [0] * NUM_BYTES
    elif kind == 5:
        deep: Any = [0]
        for _ in range(chance.choice((4, 32, 33, 64, 65, 200, 900))):
            deep = [deep]
        tensor["data"] = deep
    content = json.dumps(document).encode()
    if kind == 6:
        content = draw_nested(chance)
    elif kind == 7:
        tensor["data"] = [0] * NUM_BYTES
        content = change_json(chance, json.dumps(document).encode())
    return Body(content, b"application/json", INFER.encode())


def _draw_binary(chance: Random, document: dict[str, Any], number: int) -> Body:
    size = number * NUM_BYTES
    parameters: dict[str, Any] = {
        "binary_data_size": chance.choice((size, size, size, 0, -1, size + 1, 2**63, "5", None, [], 1.5))
    }
    document["inputs"][0]["parameters"] = parameters
    head = json.dumps(document).encode()
    tail = bytes(size + chance.choice((0, 0, 0, 1, -1)))
    right = b"%d" % len(head)
    odd = (
        b"-1",
        b"+5",
        b"0x10",
        b"1e3",
        b"",
        b" ",
        b"99999999999999999999",
        b"5, 5",
        b"0",
        b"1",
        b"\xb2",
        right + b"0",
    )
    length = right if chance.random() < 0.6 else chance.choice(odd)
    fields = [b"Inference-Header-Content-Length: " + length]
    if chance.random() < 0.05:
        fields *= 2
    return Body(head + tail, b"application/octet-stream", INFER.encode(), tuple(fields))


def draw_other(chance: Random) -> Body:
    """Draw a body whose type is not taken, is none, or is not what the body is."""
    kinds = (b"", b"text/plain", b"application/x-www-form-urlencoded", b"a/b;" * 900, b"\xe9/;;;=", b"application/zip")
    content = chance.choice((b"", b"a", bytes(NUM_BYTES), b"a=b&" * 9000, chance.randbytes(500)))
    fields = (b"Content-Encoding: gzip", b"Content-Encoding: identity", b"Content-Encoding: \xff", b"Content-Type: a/b")
    return Body(content, chance.choice(kinds), b"/predict", (chance.choice(fields),) if chance.random() < 0.5 else ())


def draw_body(chance: Random) -> Body:
    """Draw a body of any kind."""
    weights = {draw_image: 30, draw_pixels: 15, draw_form: 15, draw_json: 15, draw_infer: 20, draw_other: 5}
    (draw,) = chance.choices(list(weights), list(weights.values()))
    return draw(chance)
