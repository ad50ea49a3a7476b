"""Bodies of `POST /predict` to tickets: raw pixels, image files, multipart, or JSON with base64."""

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
"""Commas and brackets of a document beside those of its images; it is refused before it is parsed."""

COUNTED_BYTES = 2**18
"""Of a document in which marks are counted at a time."""

Parsed = tuple[list[Ticket], PredictOptions]


def parse_body(body: bytes, content_type: bytes, headers: Mapping[str, str], max_images: int, side: int) -> Parsed:
    """Read the images in a body, and the options that multipart and JSON may hold.

    Args:
        side: in pixels, of images that come as pixels.

    Raises:
        Problem: another type than is taken, or not what the type says, or too many images.
    """
    kind = content_type.partition(b";")[0].strip().lower()
    if headers.get("content-encoding", "identity") != "identity":
        raise Problem("unsupported-media-type", "bodies are taken as they are, without Content-Encoding")
    if kind == PIXELS:
        return _parse_pixels(body, max_images, side), PredictOptions()
    if kind in IMAGE_TYPES:
        if not body:
            raise Problem("no-image", "the body is empty; send the bytes of an image file")
        return [Ticket(None, body, IMAGE_TYPES[kind])], PredictOptions()
    if kind == JSON:
        return _parse_json(body, max_images)
    if kind == FORM:
        return _parse_multipart(content_type, body, max_images)
    types = ", ".join(name.decode() for name in TYPES)
    raise Problem("unsupported-media-type", f"Content-Type is none of {types}")


def describe_bodies(side: int) -> dict[str, Any]:
    """Describe the bodies that `parse_body` takes, as OpenAPI does."""
    becomes = f"An image file; it becomes {side} by {side} pixels"
    image = {"type": "string", "format": "binary", "description": becomes}
    document = PredictDocument.model_json_schema()
    options = {name: document["properties"][name] for name in PredictOptions.model_fields}
    pixels = {
        "type": "string",
        "format": "binary",
        "minLength": 3 * side**2,
        "description": _describe_pixels(side),
    }
    form = {
        "type": "object",
        "description": "Image files, one a part",
        "required": ["image"],
        "properties": {"image": {"type": "array", "items": image, "minItems": 1}, **options},
    }
    schemas: dict[bytes, Any] = {PIXELS: pixels, **dict.fromkeys(IMAGE_TYPES, image), FORM: form, JSON: document}
    content = {kind.decode(): {"schema": schemas[kind]} for kind in TYPES}
    return {"requestBody": {"required": True, "content": content}}


def _describe_pixels(side: int) -> str:
    return f"{3 * side**2:,} bytes an image: {side} rows of {side} pixels, each red, green, blue"


def _check_number(number: int, max_images: int) -> None:
    if number > max_images:
        raise Problem("too-many-images", f"a request may hold {max_images} images")
    if number == 0:
        raise Problem("no-image", "the request holds no image")


def check_parts(body: bytes, max_parts: int) -> None:
    """Refuse JSON of more values than any good request has, which would take many times its size when parsed.

    Raises:
        Problem: `too-many-images` or, where they are nested, `bad-request`.
    """
    if _has_more(body, b"[", max_parts) or _has_more(body, b"{", max_parts):
        raise Problem("bad-request", "the JSON has more lists and objects than any request")
    if _has_more(body, b",", max_parts):
        raise Problem("too-many-images", "the JSON has more values than a request of as many images as may be")


def _has_more(body: bytes, mark: bytes, most: int) -> bool:
    """Say whether a mark comes more often than that; stops counting soon after, and lets other threads in between."""
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
            f"{PIXELS.decode()} takes {_describe_pixels(side)}; got {len(body):,}. Declare the type of an image file, "
            "such as image/png",
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
        raise Problem("no-image", f"images.{document.images.index(b'')}: is empty")
    return [Ticket(None, content, FORMATS) for content in document.images], document


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


def _parse_multipart(content_type: bytes, body: bytes, max_images: int) -> Parsed:
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
    given = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    options = parse_options(given, "multipart: ")
    if not all(content for _, content in files):
        raise Problem("no-image", "multipart: a file is empty")
    _check_number(len(files), max_images)
    return [Ticket(None, content, IMAGE_TYPES.get(kind, FORMATS)) for kind, content in files], options


def parse_options(pairs: list[tuple[str, str]], where: str) -> PredictOptions:
    """Read options that came as text.

    Raises:
        Problem: one is unknown, does not take the value, or comes twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        raise Problem("bad-request", f"{where}an option comes twice")
    try:
        return PredictOptions.model_validate(values)
    except ValidationError as error:
        raise Problem("bad-request", where + explain_invalid(error)) from None
