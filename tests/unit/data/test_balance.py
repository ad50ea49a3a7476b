"""Classes that are out of balance: named, and only those."""

from __future__ import annotations

import numpy as np
import pytest

from image_classifier.data.balance import find_imbalances


def find(train: list[int], test: list[int]) -> list[str]:
    classes = [f"c{number}" for number in range(len(train))]
    return find_imbalances(classes, {"train": np.array(train), "test": np.array(test)})


@pytest.mark.parametrize(
    ("train", "test", "warnings"),
    [
        ([10, 100], [1, 1], []),
        ([10, 101], [1, 1], ["classes differ in size by 10 : 1: 101 images of c1 to train with, 10 of c0"]),
        ([50, 9, 50], [1, 1, 1], ["fewer than 10 images to train with: c1 (9)"]),
        ([50, 50], [1, 0], ["no image to test with: c1"]),
        ([50], [5], []),
        (
            [1000, 0, 1],
            [1, 1, 0],
            [
                "fewer than 10 images to train with: c1 (0), c2 (1)",
                "no image to test with: c2",
                "classes differ in size by 1000 : 1: 1,000 images of c0 to train with, 1 of c2",
            ],
        ),
        (
            [9] * 7,
            [1] * 7,
            ["fewer than 10 images to train with: c0 (9), c1 (9), c2 (9), c3 (9), c4 (9) and 2 more classes"],
        ),
    ],
)
def test_what_is_out_of_balance_is_named(train: list[int], test: list[int], warnings: list[str]) -> None:
    assert find(train, test) == warnings
