"""Images are decoded in threads, in their order, with bounded memory."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from image_classifier.access import Reading
from image_classifier.data.content import Content
from image_classifier.data.decoding import decode_images, resize_content
from image_classifier.errors import DataError, ImageError
from image_classifier.imaging import decode_image


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
    assert resized.findings.describe() == ["7 images were resized to 64 x 64, from 32 x 32"]
