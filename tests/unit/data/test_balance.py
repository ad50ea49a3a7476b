"""Classes that are out of balance: named, and only those; weighted, and drawn equally often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.data.augment import compute_order
from image_classifier.data.balance import compute_balanced_order, compute_class_weights, find_imbalances


def find(train: list[int], test: list[int]) -> list[str]:
    classes = [f"c{number}" for number in range(len(train))]
    return find_imbalances(classes, {"train": np.array(train), "test": np.array(test)})


@pytest.mark.parametrize(
    ("train", "test", "warnings"),
    [
        ([10, 100], [1, 1], []),
        ([10, 101], [1, 1], ["classes differ in size by 10 : 1: 101 training images of c1, 10 of c0"]),
        ([50, 9, 50], [1, 1, 1], ["fewer than 10 training images: c1 (9)"]),
        ([50, 50], [1, 0], ["no test image: c1"]),
        (
            [50],
            [5],
            [
                "only one class has training images, c0, so the network can learn nothing; "
                "of a folder of images, each subfolder is a class"
            ],
        ),
        (
            [1000, 0, 1],
            [1, 1, 0],
            [
                "fewer than 10 training images: c1 (0), c2 (1)",
                "no test image: c2",
                "classes differ in size by 1000 : 1: 1,000 training images of c0, 1 of c2",
            ],
        ),
        (
            [9] * 7,
            [1] * 7,
            ["fewer than 10 training images: c0 (9), c1 (9), c2 (9), c3 (9), c4 (9) and 2 more"],
        ),
    ],
)
def test_what_is_out_of_balance_is_named(train: list[int], test: list[int], warnings: list[str]) -> None:
    assert find(train, test) == warnings


def test_the_weights_of_all_images_have_the_mean_1_and_each_class_has_as_much() -> None:
    labels = np.array([0] * 6 + [2] * 3 + [3])
    weights = compute_class_weights(labels, 5)
    assert weights[1] == weights[4] == 0 and weights[labels].mean() == pytest.approx(1)
    assert np.allclose(np.bincount(labels, weights[labels])[[0, 2, 3]], 10 / 3)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 2**63 - 1), st.integers(0, 9))
def test_a_balanced_epoch_has_as_many_images_of_each_class(labels: list[int], seed: int, epoch: int) -> None:
    array = np.array(labels)
    times, places = np.divmod(compute_balanced_order(seed, epoch, array), len(labels))
    counts = np.bincount(array[places])[np.unique(array)]
    assert len(places) == len(labels) and counts.max() - counts.min() <= 1
    for label in np.unique(array):  # no image comes again before all of its class have come
        comes = np.bincount(places[array[places] == label], minlength=len(labels))[array == label]
        assert comes.max() - comes.min() <= 1
    assert len(set(zip(times.tolist(), places.tolist(), strict=True))) == len(labels)
    assert all(set(range(time)) <= set(times[places == place]) for time, place in zip(times, places, strict=True))


def test_over_the_epochs_each_image_of_a_class_comes_as_often() -> None:
    labels = np.array([0] * 90 + [1] * 7 + [2] * 3)
    counts = np.zeros(100)
    for epoch in range(600):
        counts += np.bincount(compute_balanced_order(3, epoch, labels) % 100, minlength=100)
    for label, size in enumerate((90, 7, 3)):
        own = counts[labels == label]
        assert own.sum() == 20_000 and np.allclose(own, 20_000 / size, rtol=0.2)


def test_of_classes_of_one_size_the_balanced_order_is_the_uniform_one() -> None:
    labels = np.arange(60) % 6
    for epoch in range(5):
        assert np.array_equal(compute_balanced_order(9, epoch, labels), compute_order(9, epoch, 60))
