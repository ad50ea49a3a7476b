"""Problem details for HTTP APIs (RFC 9457): every error that a client can get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

import orjson

CONTENT_TYPE = b"application/problem+json"
KINDS: Mapping[str, tuple[HTTPStatus, str]] = {
    "bad-request": (HTTPStatus.BAD_REQUEST, "The request is invalid"),
    "no-image": (HTTPStatus.BAD_REQUEST, "The request has no image"),
    "unknown-host": (HTTPStatus.MISDIRECTED_REQUEST, "The server does not serve this host name"),
    "unauthorized": (HTTPStatus.UNAUTHORIZED, "A valid API key or token is required"),
    "not-found": (HTTPStatus.NOT_FOUND, "Not found"),
    "method-not-allowed": (HTTPStatus.METHOD_NOT_ALLOWED, "The path does not support this method"),
    "request-timeout": (HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive in time"),
    "body-too-large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body exceeds the size limit"),
    "too-many-images": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request has too many images"),
    "unsupported-media-type": (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The media type is not supported"),
    "unreadable-image": (HTTPStatus.UNPROCESSABLE_ENTITY, "The image cannot be decoded"),
    "queue-full": (HTTPStatus.TOO_MANY_REQUESTS, "The queue is full"),
    "rate-limited": (HTTPStatus.TOO_MANY_REQUESTS, "The caller exceeds its rate limit"),
    "head-too-large": (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The head of the request exceeds the size limit"),
    "internal": (HTTPStatus.INTERNAL_SERVER_ERROR, "Unexpected error"),
    "deadline": (HTTPStatus.SERVICE_UNAVAILABLE, "The deadline passed before the answer"),
    "too-many-connections": (HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections are open"),
    "not-ready": (HTTPStatus.SERVICE_UNAVAILABLE, "The server is not ready"),
    "out-of-memory": (HTTPStatus.SERVICE_UNAVAILABLE, "Not enough memory for this request"),
}
"""Status and title of each kind of problem. The RFC's `type` is `urn:image-classifier:problem:<kind>`."""

RETRY_AFTER_S = dict.fromkeys(("queue-full", "deadline", "too-many-connections", "rate-limited"), 1)
RETRY_AFTER_S |= dict.fromkeys(("not-ready", "out-of-memory"), 5)


@dataclass
class Problem(Exception):
    """A request that cannot be answered.

    Attributes:
        kind: key of `KINDS`.
        detail: reason and remedy, shown to the client.
        headers: of the answer.
    """

    kind: str
    detail: str
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(KINDS[self.kind][0])

    @property
    def printable(self) -> str:
        """The detail with every control character and lone surrogate replaced: a library may quote the request."""
        text = self.detail.encode("utf-8", "replace").decode()
        return "".join(character if character.isprintable() else "?" for character in text)

    def build_headers(self) -> list[tuple[bytes, bytes]]:
        """Build the headers of the answer except Content-Type and Content-Length."""
        seconds = RETRY_AFTER_S.get(self.kind)
        if seconds is None or any(name == b"retry-after" for name, _ in self.headers):
            return self.headers
        return [*self.headers, (b"retry-after", b"%d" % seconds)]

    def build_body(self, request_id: str | None = None) -> bytes:
        """Build the problem details as JSON."""
        title = KINDS[self.kind][1]
        details = {"type": f"urn:image-classifier:problem:{self.kind}", "title": title, "status": self.status}
        details["detail"] = self.printable
        return orjson.dumps(details if request_id is None else {**details, "request_id": request_id})


def build_raw_head(problem: Problem) -> bytes:
    """Build the status line and the first headers of an HTTP answer; length, date and the empty line follow."""
    phrase = KINDS[problem.kind][0].phrase
    lines = [f"HTTP/1.1 {problem.status} {phrase}".encode(), b"content-type: " + CONTENT_TYPE]
    lines += [name + b": " + value for name, value in problem.build_headers()]
    return b"\r\n".join([*lines, b""])
