"""`metadata.json`, and the choice of images to test with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from image_classifier.data.content import CIFAR10_CLASSES, Metadata, choose_test, decode_images, load_metadata
from image_classifier.errors import DataError, ImageError
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


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=8), st.integers(0, 3)), unique_by=lambda item: item[0]), st.data()
)
def test_the_choice_is_a_sixth_of_each_class_whatever_the_order(
    items: list[tuple[bytes, int]], data: st.DataObject
) -> None:
    keys, labels = [key for key, _ in items], [label for _, label in items]
    chosen = choose_test(keys, labels, 5)
    for label in range(4):
        of_class = np.array(labels) == label
        assert chosen[of_class].sum() == of_class.sum() // 6
    order = data.draw(st.permutations(range(len(items))))
    again = choose_test([keys[place] for place in order], [labels[place] for place in order], 5)
    assert again.tolist() == [bool(chosen[place]) for place in order]


def decode(number: int) -> NDArray[np.uint8]:
    """Decode a number to an image of it; those that end in 3 are bad."""
    if number % 10 == 3:
        raise ImageError(f"number {number}")
    return np.full((32, 32, 3), number % 256, np.uint8)


def test_bad_images_are_left_out_and_told_in_their_order() -> None:
    told: list[str] = []
    batches = list(decode_images(((number, number % 7) for number in range(1030)), decode, told))
    good = [number for number in range(1030) if number % 10 != 3]
    assert told == [f"number {number}" for number in range(3, 1030, 10)]
    assert np.concatenate([labels for _, labels in batches]).tolist() == [number % 7 for number in good]
    assert np.concatenate([images for images, _ in batches])[:, 0, 0, 0].tolist() == [number % 256 for number in good]
    assert list(decode_images([(3, 0), (13, 0)], decode, told)) == []


def test_bad_images_are_an_error_where_they_are_not_left_out() -> None:
    batches = decode_images(((number, 0) for number in range(1000)), decode)
    with pytest.raises(DataError, match="100 of the images cannot be read.*number 3; .*; and 95 more"):
        list(batches)


def test_images_are_not_read_far_ahead() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[tuple[int, int]]:
        for number in range(3000):
            taken.append(number)
            yield number * 10, 0

    next(decode_images(numbers(), decode))
    assert len(taken) < 520
