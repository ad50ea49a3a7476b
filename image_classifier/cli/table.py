"""Tables of text, for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from image_classifier.text import make_printable

_FORMULA = re.compile(r"""(^|[,;|"'])(\s*)([=+\-@\uff1d\uff0b\uff0d\uff20])""")
"""What a spreadsheet takes for a formula, also one that splits cells at other characters."""


def format_table(rows: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """Format rows of cells, the first being the heading; columns after the num_left first are aligned to the right."""
    cells = [[make_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines)


def format_percentage(fraction: float | None) -> str:
    """Format a fraction in percent; a dash for one that is undefined."""
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def format_cell(text: str) -> str:
    """Write a text of others as a cell of CSV that no spreadsheet computes and no terminal obeys.

    A text that begins with an apostrophe, holds what begins a formula (= + - @), or is not printable is written after
    an apostrophe, with backslashes doubled and those characters as Python's escapes; any other as it is.
    """
    if text.isprintable() and not text.startswith("'") and not _FORMULA.search(text):
        return text
    escaped = make_printable(text.replace("\\", "\\\\"))
    return "'" + _FORMULA.sub(lambda match: match[1] + match[2] + _escape(match[3]), escaped)


def parse_cell(cell: str) -> str:
    """Recover the text that `format_cell` wrote."""
    return cell[1:].encode("ascii", "backslashreplace").decode("unicode_escape") if cell.startswith("'") else cell


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
