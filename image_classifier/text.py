"""Text for messages: one line, printable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def one_line(error: object) -> str:
    """Format an error on one line without control characters, at most 300 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())[:300]


def make_printable(text: str) -> str:
    """Escape control characters in text from untrusted data."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def quote_unprintable(text: str) -> str:
    """Quote and escape a text that is not printable, unambiguously; return any other text unchanged."""
    return text if text.isprintable() else ascii(text)


def is_name(value: Any) -> bool:
    """Return whether a value is a non-empty printable text on one line."""
    return isinstance(value, str) and value.isprintable() and value.strip() != ""


def is_digest(value: Any) -> bool:
    """Return whether a value is a sha256 in lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def list_first(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join the first `most` texts, and add the number of the others."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def count(number: int, noun: str) -> str:
    """Format a number with a noun: 1 digest, 1,200 digests."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def list_classes(classes: Sequence[str]) -> str:
    """List the first ten class names for a message, and the number of all."""
    listed = ", ".join(classes[:10])
    return f"{listed}, … ({len(classes)})" if len(classes) > 10 else listed
