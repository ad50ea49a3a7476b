"""What is told of two data sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.diff import Relabelled, compute_difference
from image_classifier.data.snapshot import Snapshot

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)


def make(chosen: list[int], labels: list[int], num_train: int, classes: tuple[str, ...] = ("a", "b")) -> Snapshot:
    images: NDArray[np.uint8] = IMAGES[chosen]
    return Snapshot(images, np.array(labels, np.int64), classes, num_train, "0" * 64, "test")


def count(num_train: int, num_test: int, num_validation: int = 0) -> dict[str, int]:
    return {"train": num_train, "validation": num_validation, "test": num_test}


def test_equal_data_sets_do_not_differ() -> None:
    old = make([0, 0, 1, 2], [0, 1, 0, 1], 3)
    difference = compute_difference(old, old)
    assert (difference.added, difference.removed, difference.relabelled) == ((), (), ())
    assert difference.num_unchanged == count(3, 1)


def test_added_removed_and_relabelled_images_are_told_apart() -> None:
    difference = compute_difference(make([0, 1, 2], [0, 1, 0], 2), make([3, 1, 2, 4], [0, 1, 1, 0], 2))
    assert (difference.added, difference.removed) == ((0, 3), (0,))
    assert difference.relabelled == (Relabelled(2, 2, 0, 1),)
    assert (difference.num_added, difference.num_removed) == (count(1, 1), count(1, 0))
    assert (difference.num_relabelled, difference.num_unchanged) == (count(0, 1), count(1, 0))


def test_an_image_that_is_there_twice_counts_twice() -> None:
    difference = compute_difference(make([0, 1], [0, 1], 1), make([0, 0, 1], [0, 0, 1], 2))
    assert difference.added == (1,) and difference.num_unchanged == count(1, 1)


def test_an_image_that_moved_to_the_test_set_is_another() -> None:
    difference = compute_difference(make([0, 1, 2], [0, 0, 0], 2), make([0, 1, 2], [0, 0, 0], 1))
    assert (difference.added, difference.removed) == ((1,), (1,))


def test_classes_are_compared_by_name() -> None:
    difference = compute_difference(make([0, 1], [0, 1], 1), make([0, 1], [1, 0], 1, ("b", "a")))
    assert difference.relabelled == () and difference.num_unchanged == count(1, 1)


def test_an_image_that_moved_to_the_validation_part_is_another() -> None:
    old = make([0, 1, 2], [0, 0, 0], 2)
    difference = compute_difference(old, replace(old, num_train=1, num_validation=1))
    assert (difference.added, difference.removed) == ((1,), (1,))
    assert (difference.num_added, difference.num_unchanged) == (count(0, 0, 1), count(1, 1))
