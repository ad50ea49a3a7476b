"""Tables on the terminal: aligned, and safe from what names hold."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from image_classifier.cli.table import format_cell, format_percentage, format_table, parse_cell
from image_classifier.text import make_printable


def test_columns_are_aligned() -> None:
    rows = [["class", "accuracy", "images"], ["car", "9.00 %", "1,000"], ["caterpillar", "100.00 %", "7"]]
    assert format_table(rows).splitlines() == [
        "class        accuracy  images",
        "car            9.00 %   1,000",
        "caterpillar  100.00 %       7",
    ]
    assert format_table(rows, num_left=3).splitlines()[1] == "car          9.00 %    1,000"


def test_an_undefined_figure_is_a_dash() -> None:
    assert format_percentage(None) == "-"
    assert format_percentage(0.5) == "50.00 %"


@given(st.text())
def test_any_text_stays_on_its_line_and_plain_text_as_it_is(text: str) -> None:
    printable = make_printable(text)
    assert printable.isprintable()
    if text.isprintable():
        assert printable == text


HOSTILE = st.text(st.sampled_from("=+-@\uff1d;,|\t\r\n \"'\\\x1b\x9b\u202ea1"), max_size=8)


@settings(max_examples=1000)
@given(HOSTILE | st.text(st.characters(exclude_categories=()), max_size=20))
@example("\udcff")
@example("a;\t=1")
def test_a_cell_is_no_formula_and_can_be_recovered(text: str) -> None:
    cell = format_cell(text)
    assert parse_cell(cell) == text
    assert cell.isprintable()
    for part in re.split("[,;|\t]", cell):
        assert not part.strip(" \"'").startswith(("=", "+", "-", "@", "\uff1d")), part


@pytest.mark.parametrize(
    "name", ["a.png", "images/été/-a.png", "a+b=c@d.png", "C:\\images\\a.png", "it's.png", "a, b.png"]
)
def test_usual_names_are_cells_as_they_are(name: str) -> None:
    assert format_cell(name) == name


def test_what_a_cell_is_written_as_can_be_told_apart() -> None:
    assert format_cell("=1+1") == "'\\x3d1+1" and format_cell("'\\x3d1+1") == "''\\\\x3d1+1"
    assert format_cell("-a\\b\x1b") == "'\\x2da\\\\b\\x1b"
