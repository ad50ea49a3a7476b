"""Parses bodies of `POST /predict` into tickets: raw pixels, image files, multipart, or JSON with base64."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from image_classifier.imaging import FORMATS
from image_classifier.serving.batching import Ticket
from image_classifier.serving.problems import Problem
from image_classifier.serving.schemas import PredictDocument, PredictOptions, explain_invalid

PIXELS = b"application/octet-stream"
JSON = b"application/json"
FORM = b"multipart/form-data"
IMAGE_TYPES = {b"image/png": ("PNG",), b"image/jpeg": ("JPEG",), b"image/webp": ("WEBP",), b"image/bmp": ("BMP",)}
TYPES = (*IMAGE_TYPES, PIXELS, JSON, FORM)
MAX_JSON_PARTS = 1000
"""Limit of commas and brackets outside the images of a JSON document; more are refused before parsing."""

COUNTED_BYTES = 2**18
"""Bytes in which characters are counted at a time."""

Parsed = tuple[list[Ticket], PredictOptions]


def parse_body(body: bytes, content_type: bytes, headers: Mapping[str, str], max_images: int, side: int) -> Parsed:
    """Parse the images of a body, and the options of multipart and JSON bodies.

    Args:
        side: of raw images in pixels.

    Raises:
        Problem: the media type is not supported, the body does not match it, or there are too many images.
    """
    kind = content_type.partition(b";")[0].strip().lower()
    check_encoding(headers)
    if kind == PIXELS:
        return _parse_pixels(body, max_images, side), PredictOptions()
    if kind in IMAGE_TYPES:
        if not body:
            raise Problem("no-image", "the body is empty; send an image file")
        return [Ticket(None, body, IMAGE_TYPES[kind])], PredictOptions()
    if kind == JSON:
        return _parse_json(body, max_images)
    if kind == FORM:
        return _parse_multipart(content_type, body, max_images)
    types = ", ".join(name.decode() for name in TYPES)
    raise Problem("unsupported-media-type", f"Content-Type must be one of {types}")


def check_encoding(headers: Mapping[str, str]) -> None:
    """Refuse a compressed body.

    Raises:
        Problem: `unsupported-media-type`.
    """
    if headers.get("content-encoding", "identity") != "identity":
        raise Problem("unsupported-media-type", "Content-Encoding is not supported; send the body uncompressed")


def describe_bodies(side: int) -> dict[str, Any]:
    """Describe the bodies that `parse_body` accepts, in OpenAPI."""
    resized = f"An image file, which is resized to {side} x {side} pixels"
    image = {"type": "string", "format": "binary", "description": resized}
    document = PredictDocument.model_json_schema()
    options = {name: document["properties"][name] for name in PredictOptions.model_fields}
    pixels = {"type": "string", "format": "binary", "minLength": 3 * side**2, "description": _describe_pixels(side)}
    form = {
        "type": "object",
        "description": "Image files, one per part",
        "required": ["image"],
        "properties": {"image": {"type": "array", "items": image, "minItems": 1}, **options},
    }
    schemas: dict[bytes, Any] = {PIXELS: pixels, **dict.fromkeys(IMAGE_TYPES, image), FORM: form, JSON: document}
    content = {kind.decode(): {"schema": schemas[kind]} for kind in TYPES}
    return {"requestBody": {"required": True, "content": content}}


def _describe_pixels(side: int) -> str:
    return f"{3 * side**2:,} bytes per image: {side} rows of {side} RGB pixels"


def _check_number(number: int, max_images: int) -> None:
    if number > max_images:
        raise Problem("too-many-images", f"a request may have {max_images} images")
    if number == 0:
        raise Problem("no-image", "the request has no image")


def check_parts(body: bytes, max_parts: int) -> None:
    """Refuse JSON with more values than a valid request can have: parsed, it would take many times its size.

    Raises:
        Problem: `bad-request` for too many lists or objects, `too-many-images` for too many values.
    """
    if _has_more(body, b"[", max_parts) or _has_more(body, b"{", max_parts):
        raise Problem("bad-request", "the JSON has too many lists and objects")
    if _has_more(body, b",", max_parts):
        raise Problem("too-many-images", "the JSON has too many values")


def _has_more(body: bytes, mark: bytes, most: int) -> bool:
    """Return whether a character occurs more than `most` times. Counting in pieces lets other threads run."""
    number = 0
    for start in range(0, len(body), COUNTED_BYTES):
        number += body.count(mark, start, start + COUNTED_BYTES)
        if number > most:
            return True
    return False


def _parse_pixels(body: bytes, max_images: int, side: int) -> list[Ticket]:
    num_bytes = 3 * side**2
    number, rest = divmod(len(body), num_bytes)
    if rest or not number:
        raise Problem(
            "bad-request",
            f"{PIXELS.decode()} takes {_describe_pixels(side)}; got {len(body):,} bytes. An image file needs its own "
            "Content-Type, such as image/png",
        )
    _check_number(number, max_images)
    return [Ticket(body[start : start + num_bytes]) for start in range(0, len(body), num_bytes)]


def _parse_json(body: bytes, max_images: int) -> Parsed:
    check_parts(body, max_images + MAX_JSON_PARTS)
    try:
        document = PredictDocument.model_validate_json(body)
    except ValidationError as error:
        raise Problem("bad-request", explain_invalid(error)) from None
    _check_number(len(document.images), max_images)
    if not all(document.images):
        raise Problem("no-image", f"images.{document.images.index(b'')} is empty")
    return [Ticket(None, content, FORMATS) for content in document.images], document


class _Parser(MultiPartParser):
    spool_max_size = 2**62  # keeps files in memory, as the body is: a server may have no writable disk


def _run(parsing: Coroutine[Any, Any, FormData]) -> FormData:
    """Run a coroutine that never waits, without an event loop."""
    try:
        parsing.send(None)
    except StopIteration as end:
        form: FormData = end.value
        return form
    raise RuntimeError("the multipart parser waits although it has the whole body")


def _parse_multipart(content_type: bytes, body: bytes, max_images: int) -> Parsed:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    headers = Headers(raw=[(b"content-type", content_type)])
    parser = _Parser(headers, stream(), max_files=max_images, max_fields=10)
    try:
        form = _run(parser.parse())
    except (MultiPartException, KeyError, UnicodeDecodeError, ValueError) as error:
        message = str(getattr(error, "message", "")) or "the body does not match its boundary"
        is_many = message.startswith("Too many files")
        raise Problem("too-many-images" if is_many else "bad-request", f"multipart: {message[:100]}") from error
    files: list[tuple[bytes, bytes]] = []
    for _, value in form.multi_items():
        if isinstance(value, UploadFile):
            with value.file:
                declared = (value.content_type or "").partition(";")[0].strip().lower()
                files.append((declared.encode("latin-1", "replace"), value.file.read()))
    given = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    options = parse_options(given, "multipart: ")
    if not all(content for _, content in files):
        raise Problem("no-image", "multipart: a file is empty")
    _check_number(len(files), max_images)
    return [Ticket(None, content, IMAGE_TYPES.get(kind, FORMATS)) for kind, content in files], options


def parse_options(pairs: list[tuple[str, str]], where: str) -> PredictOptions:
    """Parse options that came as text.

    Raises:
        Problem: an option is unknown, invalid or repeated.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        raise Problem("bad-request", f"{where}an option is repeated")
    try:
        return PredictOptions.model_validate(values)
    except ValidationError as error:
        raise Problem("bad-request", where + explain_invalid(error)) from None
