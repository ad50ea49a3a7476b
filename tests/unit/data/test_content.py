"""`metadata.json`, and the choice of images to test with."""

from __future__ import annotations

import io
import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from image_classifier.access import Reading
from image_classifier.data.content import (
    CIFAR10_CLASSES,
    Content,
    Metadata,
    choose_test,
    decode_images,
    load_metadata,
    resize_content,
)
from image_classifier.errors import DataError, ImageError
from image_classifier.imaging import decode_image
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


@pytest.mark.parametrize("side", [32, 128, 224])
def test_batches_of_large_images_are_bounded_in_bytes_and_hold_all_in_order(side: int) -> None:
    def decode(number: int) -> NDArray[np.uint8]:
        return np.full((side, side, 3), number % 256, np.uint8)

    batches = list(decode_images(((number, number) for number in range(600)), decode))
    assert [label for _, labels in batches for label in labels.tolist()] == list(range(600))
    for images, labels in batches:
        assert images.shape[1:] == (3, side, side) and images.nbytes < 2**24 + 3 * side**2 and len(images) <= 500
        assert np.array_equal(images[:, 2, -1, 0], labels % 256)


def test_after_a_bad_image_no_more_are_kept() -> None:
    kept: list[weakref.ref[NDArray[np.uint8]]] = []

    def decode(number: int) -> NDArray[np.uint8]:
        if number == 0:
            raise ImageError("bad")
        image = np.zeros((3, 32, 3), np.uint8)
        kept.append(weakref.ref(image))
        if number == 900:
            assert sum(reference() is not None for reference in kept) < 100
        return image

    with pytest.raises(DataError, match="1 of the images cannot be read.*: bad"):
        list(decode_images(((number, 0) for number in range(1000)), decode))
    assert len(kept) == 999


def test_pixels_are_resized_as_files_are_and_counted() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    parts = {
        "train": [(images[:4], np.arange(4)), (images[4:6], np.arange(4, 6))],
        "test": [(images[6:], np.array([0]))],
    }
    content = Content("mine", ("a",) * 7, parts)
    assert resize_content(content, Reading(fit="refuse")) is content
    with pytest.raises(DataError, match="mine has images of 32 x 32 pixels instead of 64 x 64; choose --image_size 32"):
        resize_content(content, Reading(fit="refuse", image_size=64))
    resized = resize_content(content, Reading(image_size=64))
    assert resized.image_size == 64
    got = [np.concatenate([batch for batch, _ in resized.parts[part]]) for part in ("train", "test")]
    for image, expected in zip(np.concatenate(got), images, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(expected.transpose(1, 2, 0)).save(buffer, "PNG")
        assert np.array_equal(image.transpose(1, 2, 0), decode_image(buffer.getvalue(), side=64))
    assert resized.findings is not None
    assert resized.findings.describe() == ["7 images were resized to 64 x 64, from 32 x 32 (7)"]
