"""Text for messages: one line, printable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def one_line(error: object) -> str:
    """Write what an error says on one line without control characters, at most 300 characters of it."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())[:300]


def make_printable(text: str) -> str:
    """Escape what would move the cursor or break the line: names come from data that others made."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def quote_unprintable(text: str) -> str:
    """Quote and escape a text that is not printable, so that it is taken for no other; return any other as it is."""
    return text if text.isprintable() else ascii(text)


def is_name(value: Any) -> bool:
    """Say whether a value is a printable text on one line."""
    return isinstance(value, str) and value.isprintable() and value.strip() != ""


def is_digest(value: Any) -> bool:
    """Say whether a value is a sha256 in lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def list_first(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """List the first of some texts, and how many more there are."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def count(number: int, noun: str) -> str:
    """Say how many there are: 1 digest, 1,200 digests."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def list_classes(classes: Sequence[str]) -> str:
    """List the names of classes for a message: the first ten, and how many there are."""
    listed = ", ".join(classes[:10])
    return f"{listed}, … ({len(classes)})" if len(classes) > 10 else listed
