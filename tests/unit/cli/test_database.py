"""What the actions on a database take on their command line."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from image_classifier.cli.database import parse_conditions, parse_time
from image_classifier.data.corrections import MAX_CORRECTIONS_BYTES, Correction, read_corrections
from image_classifier.errors import SettingsError


def test_conditions_are_names_with_values() -> None:
    assert parse_conditions([]) == {}
    assert parse_conditions(["class=cat,dog", "source=a=b"]) == {"class": ["cat", "dog"], "source": ["a=b"]}


@pytest.mark.parametrize("text", ["class", "class=", "label=3", "=cat", ""])
def test_a_condition_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--where takes NAME=VALUE"):
        parse_conditions([text])


def test_a_condition_comes_once() -> None:
    with pytest.raises(SettingsError, match="at most once"):
        parse_conditions(["class=cat", "class=dog"])


def test_times_are_in_iso_8601() -> None:
    assert parse_time(None) is None
    assert parse_time("2026-11-21T09:30:00+01:00") == datetime(2026, 11, 21, 8, 30, tzinfo=UTC)
    local = parse_time("2026-11-21")
    assert local is not None and local.tzinfo is not None
    for text in ("monday", "", "2026-13-01", "0001-01-01T00:00:00+23:59"):
        with pytest.raises(SettingsError, match="--as_of takes a time"):
            parse_time(text)


def test_corrections_are_read_from_a_table(tmp_path: Path) -> None:
    path = tmp_path / "corrections.csv"
    path.write_text("label,image,note\ncat,17,\n dog , 3,really\n")
    assert read_corrections(path) == [Correction(17, "cat"), Correction(3, "dog")]


@pytest.mark.parametrize(
    "content",
    [
        "image,label\nx,cat\n",
        "image\n3\n",
        "number,label\n3,cat\n",
        "image,label\n-1,cat\n",
        f"image,label\n{'9' * 5000},cat\n",
    ],
)
def test_a_table_without_numbers_or_labels_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "corrections.csv"
    path.write_text(content)
    with pytest.raises(SettingsError, match="--corrections: line 2 of .* needs a number"):
        read_corrections(path)


@pytest.mark.parametrize("content", [b"\xff", b'image,label\n"' + b"x" * 2**18, b" " * (MAX_CORRECTIONS_BYTES + 1)])
def test_a_file_that_is_no_table_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "corrections.csv").write_bytes(content)
    with pytest.raises(SettingsError, match="--corrections: .*corrections.csv cannot be read: .*; correct it"):
        read_corrections(tmp_path / "corrections.csv")
    with pytest.raises(SettingsError, match="none.csv cannot be read: No such file or directory; correct it"):
        read_corrections(tmp_path / "none.csv")
