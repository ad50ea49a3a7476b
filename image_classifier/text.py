"""Text for messages: one line, printable."""

from __future__ import annotations


def one_line(error: object) -> str:
    """Write what an error says on one line without control characters, at most 300 characters of it."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())[:300]


def make_printable(text: str) -> str:
    """Return a text that a terminal shows on one line: itself, or escaped where it has control characters."""
    return text if text.isprintable() else ascii(text)
