"""The fields of the Elastic Common Schema that log lines have, with their types, and a check of a line against them."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

FIELDS = {
    "@timestamp": "date",
    "client.ip": "ip",
    "ecs.version": "keyword",
    "error.message": "match_only_text",
    "error.stack_trace": "wildcard",
    "error.type": "keyword",
    "event.duration": "long",
    "http.request.id": "keyword",
    "http.request.method": "keyword",
    "http.response.status_code": "long",
    "log.level": "keyword",
    "log.logger": "keyword",
    "log.origin.file.line": "long",
    "log.origin.file.name": "keyword",
    "log.origin.function": "keyword",
    "message": "match_only_text",
    "process.name": "keyword",
    "process.pid": "long",
    "process.thread.id": "long",
    "process.thread.name": "keyword",
    "service.name": "keyword",
    "trace.id": "keyword",
    "url.path": "wildcard",
    "user.name": "keyword",
}
"""As ECS 9.0.0 defines them; all that stands below `labels` is a keyword."""


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_address(value: object) -> bool:
    return isinstance(value, str) and bool(ipaddress.ip_address(value))


def is_date(value: object) -> bool:
    return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None


def is_long(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


CHECKS: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("keyword", "match_only_text", "wildcard"), is_text),
    "ip": is_address,
    "date": is_date,
    "long": is_long,
}


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten a document: each value with its dotted name."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_line(line: str) -> dict[str, Any]:
    """Check that a line is a document of ECS, and return its fields."""
    pairs = list(flatten(json.loads(line)))
    fields = dict(pairs)
    assert len(fields) == len(pairs), f"a field comes twice: {line}"
    for name, value in pairs:
        if name.startswith("labels."):
            assert isinstance(value, str | int | bool), f"{name}: {value!r}"
        else:
            assert name in FIELDS and CHECKS[FIELDS[name]](value), f"{name}: {value!r}"
    assert fields.keys() >= {"@timestamp", "ecs.version", "log.level", "message"}
    return fields
