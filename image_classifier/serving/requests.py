"""Bodies of `POST /predict` to tickets: raw pixels, image files, multipart, or JSON with base64."""

from __future__ import annotations

import binascii
from collections.abc import AsyncGenerator, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import orjson
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from image_classifier.imaging import FORMATS
from image_classifier.serving.batching import NUM_BYTES, Ticket
from image_classifier.serving.problems import Problem

PIXELS = b"application/octet-stream"
IMAGE_TYPES = {b"image/png": ("PNG",), b"image/jpeg": ("JPEG",), b"image/webp": ("WEBP",), b"image/bmp": ("BMP",)}
TYPES = (*IMAGE_TYPES, PIXELS, b"application/json", b"multipart/form-data")
DEFAULT_TOP_K = 5
MAX_REQUEST_ID = 128


@dataclass
class PredictRequest:
    """What a client asks for."""

    tickets: list[Ticket] = field(default_factory=list)
    top_k: int | None = None
    request_id: str | None = None
    show_input: bool = False

    def set_option(self, name: str, value: object) -> None:
        """Set `top_k`, `request_id` or `show_input` to what came as text or JSON.

        Raises:
            Problem: there is no such option, or it does not take the value.
        """
        if name == "top_k":
            if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 6:
                value = int(value)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise Problem("bad-request", "top_k takes a whole number of 1 or more")
            self.top_k = value
        elif name == "request_id":
            is_text = isinstance(value, str) and value.isascii() and value.isprintable()
            if not isinstance(value, str) or not is_text or not 0 < len(value) <= MAX_REQUEST_ID:
                raise Problem("bad-request", f"request_id takes 1 to {MAX_REQUEST_ID} printable ASCII characters")
            self.request_id = value
        elif name == "show_input":
            if value not in ("true", "false", True, False) or isinstance(value, (int, float)) > isinstance(value, bool):
                raise Problem("bad-request", "show_input takes true or false")
            self.show_input = value in ("true", True)
        else:
            raise Problem("bad-request", "there is no such option; the options are top_k, request_id and show_input")


def parse_query(query: bytes, request: PredictRequest) -> None:
    """Read the options in a query string.

    Raises:
        Problem: an option is unknown, has a wrong value, or comes twice.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, strict_parsing=True, max_num_fields=10)
    except (UnicodeDecodeError, ValueError) as error:
        raise Problem("bad-request", "the query string cannot be read") from error
    if len({name for name, _ in pairs}) < len(pairs):
        raise Problem("bad-request", "an option comes twice in the query string")
    for name, value in pairs:
        request.set_option(name, value)


def parse_body(
    content_type: bytes, headers: Mapping[bytes, bytes], body: bytes, request: PredictRequest, *, max_images: int
) -> None:
    """Read the images in a body, and the options that multipart and JSON may hold.

    Raises:
        Problem: another type than is taken, or not what the type says, or too many images.
    """
    kind, _, _ = content_type.partition(b";")
    kind = kind.strip().lower()
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise Problem("unsupported-media-type", "bodies are taken as they are, without Content-Encoding")
    if kind == PIXELS:
        _parse_pixels(body, request, max_images)
    elif kind in IMAGE_TYPES:
        if not body:
            raise Problem("no-image", "the body is empty; send the bytes of an image file")
        request.tickets.append(Ticket(None, body, IMAGE_TYPES[kind]))
    elif kind == b"application/json":
        _parse_json(body, request, max_images)
    elif kind == b"multipart/form-data":
        _parse_multipart(content_type, body, request, max_images)
    else:
        types = ", ".join(name.decode() for name in TYPES)
        raise Problem("unsupported-media-type", f"Content-Type is none of {types}")


def _check_number(number: int, max_images: int) -> None:
    if number > max_images:
        raise Problem("too-many-images", f"a request may hold {max_images} images")
    if number == 0:
        raise Problem("no-image", "the request holds no image")


def _parse_pixels(body: bytes, request: PredictRequest, max_images: int) -> None:
    number, rest = divmod(len(body), NUM_BYTES)
    if rest or not number:
        raise Problem(
            "bad-request",
            f"{PIXELS.decode()} takes {NUM_BYTES:,} bytes an image: 32 rows of 32 pixels, each red, green, blue; "
            f"got {len(body):,}. Declare the type of an image file, such as image/png",
        )
    _check_number(number, max_images)
    request.tickets += [Ticket(body[start : start + NUM_BYTES]) for start in range(0, len(body), NUM_BYTES)]


def _parse_json(body: bytes, request: PredictRequest, max_images: int) -> None:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem("bad-request", f"the body is no JSON: {str(error)[:100]}") from error
    if not isinstance(document, dict):
        raise Problem("bad-request", 'the body takes an object such as {"images": ["<base64>"]}')
    images = document.pop("images", None)
    if not isinstance(images, list):
        raise Problem("bad-request", "images takes a list of texts, each an image file in base64")
    for name, value in document.items():
        request.set_option(name, value)
    _check_number(len(images), max_images)
    for number, text in enumerate(images):
        try:
            content = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
        except (AttributeError, UnicodeEncodeError, binascii.Error) as error:
            raise Problem("bad-request", f"images[{number}] is no base64") from error
        if not content:
            raise Problem("no-image", f"images[{number}] is empty")
        request.tickets.append(Ticket(None, content, FORMATS))


class _Parser(MultiPartParser):
    spool_max_size = 2**62  # in memory, where the body lies already: a server may have no disk to write to


def _run(parsing: Coroutine[Any, Any, FormData]) -> FormData:
    """Run a coroutine that has nothing to wait for to its end, on whatever thread this is."""
    try:
        parsing.send(None)
    except StopIteration as end:
        form: FormData = end.value
        return form
    raise RuntimeError("the parser waits for something although all of the body is there")


def _parse_multipart(content_type: bytes, body: bytes, request: PredictRequest, max_images: int) -> None:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    headers = Headers(raw=[(b"content-type", content_type)])
    parser = _Parser(headers, stream(), max_files=max_images, max_fields=10)
    try:
        form = _run(parser.parse())
    except (MultiPartException, KeyError, UnicodeDecodeError, ValueError) as error:
        message = str(getattr(error, "message", "")) or "the body is not what its boundary says"
        is_many = message.startswith("Too many files")
        raise Problem("too-many-images" if is_many else "bad-request", f"multipart: {message[:100]}") from error
    files: list[tuple[bytes, bytes]] = []
    for _, value in form.multi_items():
        if isinstance(value, UploadFile):
            with value.file:
                declared = (value.content_type or "").partition(";")[0].strip().lower()
                files.append((declared.encode("latin-1", "replace"), value.file.read()))
    options = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    if len({name for name, _ in options}) < len(options):
        raise Problem("bad-request", "multipart: an option comes twice")
    for name, text in options:
        request.set_option(name, text)
    for kind, content in files:
        if not content:
            raise Problem("no-image", "multipart: a file is empty")
        request.tickets.append(Ticket(None, content, IMAGE_TYPES.get(kind, FORMATS)))
    _check_number(len(request.tickets), max_images)
