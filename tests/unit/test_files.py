"""Files of others: read as they are, or refused for a reason, whatever is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from image_classifier.files import (
    MAX_DEPTH,
    MAX_JSON_BYTES,
    MAX_JSON_VALUES,
    MAX_YAML_BYTES,
    LimitError,
    check_yaml,
    load_json,
    load_json_lines,
    load_yaml,
    parse_json,
    read_file,
)
from tests.bombs import build_laughs

KEYS = st.text(max_size=10)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    # What JSON can escape and UTF-8 cannot hold is in paths that are no UTF-8.
    | st.text(st.characters(exclude_categories=()), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(DOCUMENTS, st.booleans())
def test_what_json_can_hold_comes_out_equal(document: Any, escaped: bool) -> None:
    text = json.dumps(document, ensure_ascii=escaped, indent=1)
    assert parse_json(text) == document
    if escaped:
        assert parse_json(text.encode()) == document


@settings(max_examples=300)
@given(DOCUMENTS, st.data())
def test_changed_json_is_read_as_the_standard_library_does_or_refused(document: Any, data: st.DataObject) -> None:
    content = bytearray(json.dumps(document).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = parse_json(bytes(content))
    except ValueError:
        return
    assert parsed == json.loads(bytes(content))


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"[" * 100_000, "nested deeper than the 32 levels"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested deeper than the 32 levels"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "nested deeper than the 32 levels"),
        (b"[" + b"{}," * MAX_JSON_VALUES + b"{}]", "more than the 2,000,000 values"),
        (b" " * (MAX_JSON_BYTES + 1), "more than the 33,554,432 bytes"),
        (b'{"a": 1, "b": {"a": 1, "a": 2}}', "the key 'a' twice"),
        (b"[NaN]", "the number NaN, which is not finite"),
        (b"-Infinity", "the number -Infinity, which is not finite"),
        (b"1e999", "the number 1e999, which is not finite"),
        (b"9" * 5000, "the whole number 9+, which is out of range"),
        (b"18446744073709551616", "the whole number 18446744073709551616, which is out of range"),
    ],
    ids=lambda value: value[:8] if isinstance(value, bytes) else value,
)
def test_json_beyond_a_limit_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(LimitError, match=reason):
        parse_json(content)


def test_brackets_in_texts_are_no_levels() -> None:
    document = ["[[[" * 50, '\\"[' * 50, "\\"] * 10
    assert parse_json(json.dumps(document)) == document
    at_the_limit: list[Any] = []
    for _ in range(MAX_DEPTH - 1):
        at_the_limit = [at_the_limit]
    assert parse_json(json.dumps(at_the_limit)) == at_the_limit


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"{'a': 1}", b"\x00", b'"\x01"', b"[1,]"])
def test_what_is_no_json_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(content)


def test_what_windows_puts_before_a_text_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert load_json(tmp_path / "file") == load_yaml(tmp_path / "file") == {"a": 1}


def test_lines_are_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\r\n')
    assert load_json_lines(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"a": ')
    with pytest.raises(ValueError):
        load_json_lines(path)
    for content in (b"1\n" * (MAX_JSON_VALUES + 1), b"{}\n" * (MAX_JSON_VALUES + 1)):
        path.write_bytes(content)
        with pytest.raises(LimitError, match="more than the 2,000,000"):
            load_json_lines(path)


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS.filter(lambda document: "\\ud" not in json.dumps(document)))  # libyaml takes no surrogates
@example({"a": [1, {"b": None}]})
def test_what_yaml_can_hold_comes_out_equal(tmp_path_factory: pytest.TempPathFactory, document: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "document.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert load_yaml(path) == document


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab:-[]{}&*!?|>'\"# \n\t0129.,<x"), max_size=60))
def test_any_text_is_yaml_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_yaml(path)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text, reason",
    [
        (build_laughs(), r"the alias \*a0; aliases are not supported"),
        ("{a: " * 3000 + "1" + "}" * 3000, "nested deeper than the 32 levels"),
        ("- " * 3000 + "1", "nested deeper than the 32 levels"),
        ("a: " + "x" * MAX_YAML_BYTES, "more than the 65,536 bytes"),
        ("a: 1\nb: {c: 1, c: 2}", "the key 'c' twice"),
        ("a: 1" + ":1" * 1000, "the whole number 1:1:.*, which is out of range"),
        ("a: 0x" + "f" * 1000, "the whole number 0xff.*, which is out of range"),
        ("a: !!int ''", "."),
        ("a: !!timestamp x", "."),
        ("a: 2001-99-99", "month must be"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: 1\n---\na: 2", "expected a single document"),
        ("a: *b", r"the alias \*b"),
        ("? [1, 2]\n: 3", "unhashable key"),
        ("\ta: 1", "."),
    ],
)
def test_yaml_beyond_a_limit_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason) as caught:
        load_yaml(tmp_path / "file.yaml")
    assert str(caught.value).isprintable()


def test_a_value_that_is_yaml_has_the_same_limits() -> None:
    with pytest.raises(LimitError, match="more than the 65,536 characters"):
        check_yaml("x" * (MAX_YAML_BYTES + 1))
    check_yaml("[16, 24]")


def test_a_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(LimitError, match="more than the 4 bytes allowed"):
        read_file(tmp_path / "file", 4)
    os.truncate(tmp_path / "file", 2**40)  # a hole, of which nothing may be read
    with pytest.raises(LimitError, match="more than the 1,048,576 bytes"):
        read_file(tmp_path / "file", 2**20)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(LimitError, match="it is not a regular file"):
            read_file(path, 100)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path, 100)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none", 100)
