"""Which test images are published for people to try a model on, and that they come back as they were."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from image_classifier.errors import SettingsError
from image_classifier.publishing.samples import MAX_SAMPLES, check_num_samples, choose_samples, encode_samples

LABELS = np.array([2, 2, 0, 1, 0, 2, 4, 4, 1])  # no image of class 3


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [
        (1, [2]),
        (2, [2, 6]),
        (4, [2, 3, 0, 6]),
        (6, [2, 3, 0, 6, 4, 8]),
        (20, [2, 3, 0, 6, 4, 8, 1, 7, 5]),
    ],
)
def test_each_class_is_shown_before_one_is_shown_twice(num_samples: int, expected: list[int]) -> None:
    assert choose_samples(LABELS, num_samples).tolist() == expected


def test_fewer_than_classes_are_spread_over_them() -> None:
    chosen = choose_samples(np.arange(100), 5)
    assert chosen.tolist() == [0, 25, 50, 74, 99]


def test_images_lie_side_by_side_bit_by_bit() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_samples(images))) as strip:
        shown = np.split(np.asarray(strip), 3, axis=1)
    np.testing.assert_array_equal(np.stack(shown).transpose(0, 3, 1, 2), images)


@pytest.mark.parametrize("num_samples", [-1, MAX_SAMPLES + 1])
def test_their_number_is_bounded(num_samples: int) -> None:
    with pytest.raises(SettingsError, match=f"--num_samples takes 0 to 24, got: {num_samples}"):
        check_num_samples(num_samples)
