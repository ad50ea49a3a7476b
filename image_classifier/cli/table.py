"""Tables of text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


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


def make_printable(text: str) -> str:
    """Escape what would move the cursor or break the line: names come from data that others made."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
