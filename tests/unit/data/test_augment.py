"""Order and augmentation are functions of (seed, epoch, image), and do what they are named for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from image_classifier.data.augment import Augmentation, augment_images, compute_order
from image_classifier.data.distortion import GREY
from image_classifier.data.split import compute_validation_split
from image_classifier.randomness import draw_bits

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
ALL = np.arange(len(IMAGES))
SEEDS = st.integers(0, 2**63 - 1)


def augment(indices: NDArray[np.int64], epoch: int = 0, seed: int = 1, **values: object) -> NDArray[np.uint8]:
    augmentation = Augmentation(**values)  # type: ignore[arg-type]  # values of several types
    return augment_images(IMAGES, indices, seed, epoch, augmentation)


def test_random_bits_are_those_of_splitmix64() -> None:
    """The published first outputs for the state 1234567, which is what the counter starts from after keying."""

    def splitmix64(state: int) -> int:
        mask = 2**64 - 1
        mixed = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        return mixed ^ (mixed >> 31)

    assert splitmix64(1234567) == 6457827717110365317  # the reference implementation's first output
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    key = 42
    for part in (3, 5):
        key = splitmix64(((key ^ ((part + 1) * golden & mask)) - golden) & mask)
    expected = [splitmix64((key + index * golden) & mask) for index in range(4)]
    assert draw_bits(42, 3, 5, np.arange(4)).tolist() == expected


@given(SEEDS, st.integers(0, 1000), st.integers(0, 300))
def test_an_order_is_a_permutation(seed: int, epoch: int, num_images: int) -> None:
    assert sorted(compute_order(seed, epoch, num_images)) == list(range(num_images))


def test_orders_differ_by_epoch_and_by_seed_and_repeat() -> None:
    orders = {tuple(compute_order(seed, epoch, 50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    assert np.array_equal(compute_order(3, 4, 50), compute_order(3, 4, 50))


def test_every_place_in_the_order_is_as_likely_for_every_image() -> None:
    orders = np.array([compute_order(seed, 0, 10) for seed in range(4000)])
    counts = np.array([[(orders[:, place] == image).sum() for image in range(10)] for place in range(10)])
    assert counts.min() > 300 and counts.max() < 500  # 400 expected, 5 standard deviations are 95


@settings(max_examples=30)
@given(
    SEEDS,
    st.integers(0, 20),
    st.permutations(list(range(12))),
    st.sampled_from(["none", "random", "alternating"]),
    st.integers(0, 4),
    st.integers(0, 12),
    st.sampled_from([(0.0, 0), (0.4, 0), (0.0, 9), (1.0, 30)]),
    st.integers(1, 11),
)
def test_an_image_is_varied_the_same_in_any_batch(
    seed: int,
    epoch: int,
    order: list[int],
    flip: str,
    translate: int,
    cutout: int,
    colors: tuple[float, int],
    cut: int,
) -> None:
    values = {"flip": flip, "translate": translate, "cutout": cutout}
    values |= {"color_jitter": colors[0], "rand_augment": colors[1]}
    together = augment(np.array(order), epoch, seed, **values)
    apart = [augment(np.array(part), epoch, seed, **values) for part in (order[:cut], order[cut:])]
    assert np.array_equal(together, np.concatenate(apart))


def test_without_augmentation_the_images_are_as_they_were_and_copies() -> None:
    taken = augment(np.array([3, 1, 3]))
    assert np.array_equal(taken, IMAGES[[3, 1, 3]])
    taken[:] = 0
    assert IMAGES[3].any()


def test_alternating_flips_mirror_each_image_in_every_other_epoch() -> None:
    epochs = [augment(ALL, epoch, flip="alternating") for epoch in range(4)]
    mirrored = IMAGES[:, :, :, ::-1]
    first = np.array([np.array_equal(epochs[0][image], mirrored[image]) for image in ALL])
    assert 0 < first.sum() < len(ALL)
    for epoch, images in enumerate(epochs):
        expected = np.where((first ^ (epoch % 2 == 1))[:, None, None, None], mirrored, IMAGES)
        assert np.array_equal(images, expected)


def test_random_flips_mirror_about_half_of_the_images_each_epoch() -> None:
    flipped = [
        sum(
            np.array_equal(image, IMAGES[index, :, :, ::-1])
            for index, image in enumerate(augment(ALL, epoch, flip="random"))
        )
        for epoch in range(50)
    ]
    assert 0.45 < sum(flipped) / (50 * len(ALL)) < 0.55


def test_a_shift_is_a_window_of_the_reflected_image_and_every_window_occurs() -> None:
    found = set()
    for epoch in range(20):
        for index, image in enumerate(augment(ALL, epoch, translate=2)):
            padded = np.pad(IMAGES[index], ((0, 0), (2, 2), (2, 2)), mode="reflect")
            places = [
                (top, left)
                for top in range(5)
                for left in range(5)
                if np.array_equal(image, padded[:, top : top + 32, left : left + 32])
            ]
            assert len(places) == 1
            found.add(places[0])
    assert len(found) == 25


@pytest.mark.parametrize("side", [1, 8, 32])
def test_a_cutout_is_one_grey_square_around_a_centre_in_the_image(side: int) -> None:
    for index, image in enumerate(augment(ALL, 5, cutout=side)):
        changed = np.flatnonzero((image != IMAGES[index]).any(axis=(0, 2)))
        assert (image[:, changed] != IMAGES[index][:, changed]).any(axis=0).sum() <= side * side
        rows, columns = np.nonzero((image == GREY).all(axis=0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert min(side, 16) / 2 <= height <= side and min(side, 16) / 2 <= width <= side


@given(SEEDS, st.integers(1, 200), st.floats(0, 0.99))
def test_a_validation_split_parts_the_training_set(seed: int, num_images: int, fraction: float) -> None:
    train, validation = compute_validation_split(seed, num_images, fraction)
    assert sorted([*train, *validation]) == list(range(num_images))
    assert len(validation) == round(num_images * fraction)


def test_a_validation_split_depends_on_the_seed() -> None:
    parts = {tuple(compute_validation_split(seed, 100, 0.2)[1]) for seed in range(20)}
    assert len(parts) == 20


@pytest.mark.parametrize(("side", "reach"), [(32, 16), (64, 3), (96, 48), (224, 112)])
def test_shifts_and_mirrors_of_any_size_are_windows_of_the_padded_image(side: int, reach: int) -> None:
    image = np.random.default_rng(side).integers(0, 256, (1, 3, side, side), dtype=np.uint8)
    padded = np.pad(image[0], ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    seen = set()
    for epoch in range(12):
        (varied,) = augment_images(image, np.array([0]), 5, epoch, Augmentation("random", reach))
        rows = np.flatnonzero([np.isin(varied[0, 0], row).all() for row in padded[0, : 2 * reach + 1]])
        places = {
            (top, left, mirrored)
            for top in rows.tolist()
            for left in range(2 * reach + 1)
            for mirrored in (1, -1)
            if np.array_equal(padded[:, top : top + side, left : left + side][:, :, ::mirrored], varied)
        }
        assert places
        seen.update(places)
    assert len(seen) > 6
