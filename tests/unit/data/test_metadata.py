"""`metadata.json`: what it may say, and how it is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from image_classifier.data.cifar import CIFAR10_CLASSES
from image_classifier.data.metadata import Metadata, load_metadata
from image_classifier.errors import DataError
from tests.conftest import PROJECT


def test_no_file_leaves_all_to_the_source(tmp_path: Path) -> None:
    assert load_metadata(tmp_path) == load_metadata(tmp_path / "none") == Metadata()


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    content = {"format_version": 1, "name": "mine", "classes": ["a", "ü"], "digest": "AB" * 32, "split_seed": 3}
    (tmp_path / "metadata.json").write_text(json.dumps(content), encoding="utf-8")
    assert load_metadata(tmp_path) == Metadata("mine", ("a", "ü"), "ab" * 32, 3)


def test_the_example_in_the_documentation_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(
        r"```json\n(.*?)```", (PROJECT / "data" / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "metadata.json").write_text(example, encoding="utf-8")
    metadata = load_metadata(tmp_path)
    assert (metadata.name, metadata.classes) == ("cifar10", CIFAR10_CLASSES)
    assert set(json.loads(example)) == {"format_version", "name", "classes", "digest", "split_seed"}


def test_each_part_is_optional(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"classes": ["a"]}', encoding="utf-8")
    assert load_metadata(tmp_path) == Metadata(classes=("a",))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (
            {"clases": ["a"]},
            "has the unknown key 'clases'; it may have format_version, name, classes, digest, split_seed",
        ),
        ({"format_version": 2}, "has format_version 2; this version of image_classifier reads 1"),
        ({"format_version": "1"}, 'format_version takes the number 1, got: "1"'),
        ({"format_version": True}, "format_version takes"),
        ({"name": ""}, 'name takes a text on one line, got: ""'),
        ({"name": "a\nb"}, "name takes a text on one line"),
        ({"name": 3}, "name takes a text on one line, got: 3"),
        ({"classes": []}, "classes takes a list of different names"),
        ({"classes": ["a", "a"]}, "classes takes a list of different names"),
        ({"classes": "plane car"}, 'classes takes a list of different names, got: "plane car"'),
        ({"classes": ["a", None]}, "classes takes"),
        ({"classes": None}, "classes takes"),
        ({"digest": "ab"}, 'digest takes 64 hexadecimal digits, got: "ab"'),
        ({"digest": 1}, "digest takes"),
        ({"split_seed": -1}, "split_seed takes a whole number"),
        ({"split_seed": 1.0}, "split_seed takes a whole number"),
        ([], "must hold a JSON object, got: list"),
        (None, "must hold a JSON object, got: NoneType"),
    ],
)
def test_wrong_content_gets_one_clear_line(content: Any, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_metadata(tmp_path)
    assert complaint in str(caught.value)
    assert str(tmp_path / "metadata.json") in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"name": "a",}'])
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_bytes(content)
    with pytest.raises(DataError, match=r"metadata\.json cannot be read as JSON: ."):
        load_metadata(tmp_path)
