"""Tables on the terminal: aligned, and safe from what names hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from image_classifier.cli.table import format_percentage, format_table, make_printable


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
