"""What goes wrong with a request, as RFC 9457 has it: a status, a kind, a title and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson

CONTENT_TYPE = b"application/problem+json"
KINDS: Mapping[str, tuple[HTTPStatus, str]] = {
    "bad-request": (HTTPStatus.BAD_REQUEST, "The request is not as it should be"),
    "no-image": (HTTPStatus.BAD_REQUEST, "The request holds no image"),
    "unknown-host": (HTTPStatus.MISDIRECTED_REQUEST, "The server does not answer for this name"),
    "unauthorized": (HTTPStatus.UNAUTHORIZED, "A valid key or token is needed"),
    "not-found": (HTTPStatus.NOT_FOUND, "There is nothing at this path"),
    "method-not-allowed": (HTTPStatus.METHOD_NOT_ALLOWED, "The path does not take this method"),
    "request-timeout": (HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive in time"),
    "body-too-large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is larger than is taken"),
    "too-many-images": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "More images than one request may hold"),
    "unsupported-media-type": (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body is of a type that is not taken"),
    "unreadable-image": (HTTPStatus.UNPROCESSABLE_ENTITY, "The image cannot be read"),
    "queue-full": (HTTPStatus.TOO_MANY_REQUESTS, "As many images wait as may wait"),
    "rate-limited": (HTTPStatus.TOO_MANY_REQUESTS, "The caller asks for more than one caller may"),
    "head-too-large": (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The head of the request is larger than is taken"),
    "internal": (HTTPStatus.INTERNAL_SERVER_ERROR, "An unexpected error"),
    "deadline": (HTTPStatus.SERVICE_UNAVAILABLE, "The answer would have come too late"),
    "too-many-connections": (HTTPStatus.SERVICE_UNAVAILABLE, "As many connections are open as may be"),
    "not-ready": (HTTPStatus.SERVICE_UNAVAILABLE, "The server is not ready"),
    "out-of-memory": (HTTPStatus.SERVICE_UNAVAILABLE, "The request needs more memory than there is"),
}
"""Each kind of problem with its status and title; the type is `urn:image-classifier:problem:<kind>`."""

RETRY_AFTER_S = {
    "queue-full": 1,
    "deadline": 1,
    "too-many-connections": 1,
    "not-ready": 5,
    "out-of-memory": 5,
    "rate-limited": 1,
}


@dataclass
class Problem(Exception):
    """A request that cannot be answered, for a reason that the client may read."""

    kind: str
    detail: str
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(KINDS[self.kind][0])

    @property
    def printable(self) -> str:
        """The detail without control characters and half characters, which a library may quote."""
        text = self.detail.encode("utf-8", "replace").decode()
        return "".join(character if character.isprintable() else "?" for character in text)

    def build_headers(self) -> list[tuple[bytes, bytes]]:
        """Build the headers of the answer, without its type and length."""
        seconds = RETRY_AFTER_S.get(self.kind)
        if seconds is None or any(name == b"retry-after" for name, _ in self.headers):
            return self.headers
        return [*self.headers, (b"retry-after", b"%d" % seconds)]

    def build_body(self, request_id: str | None = None) -> bytes:
        """Build the problem details as JSON."""
        return orjson.dumps(self.describe(request_id))

    def describe(self, request_id: str | None = None) -> dict[str, Any]:
        """Describe the problem as RFC 9457 has it."""
        title = KINDS[self.kind][1]
        details = {"type": f"urn:image-classifier:problem:{self.kind}", "title": title, "status": self.status}
        details["detail"] = self.printable
        return details if request_id is None else {**details, "request_id": request_id}


def build_raw_head(problem: Problem) -> bytes:
    """Build the beginning of the head of an HTTP answer, up to and with the problem's own headers."""
    phrase = KINDS[problem.kind][0].phrase
    lines = [f"HTTP/1.1 {problem.status} {phrase}".encode(), b"content-type: " + CONTENT_TYPE]
    lines += [name + b": " + value for name, value in problem.build_headers()]
    return b"\r\n".join([*lines, b""])
