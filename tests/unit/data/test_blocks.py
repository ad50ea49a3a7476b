"""The order by blocks: a permutation in which blocks stay in one window, and in which nothing else can be foreseen."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from image_classifier.data.augment import compute_order
from image_classifier.data.blocks import BLOCK_BYTES, compute_windows, count_block_images, read_ahead

SEEDS, SIZES = st.integers(0, 2**63 - 1), st.integers(1, 40)


def draw(seed: int, epoch: int, num: int, num_block: int, num_window: int) -> list[NDArray[np.int64]]:
    return compute_windows(seed, epoch, np.arange(num), num_block, num_window)


@given(SEEDS, st.integers(0, 100), st.lists(st.integers(0, 2000), unique=True, min_size=1), SIZES, SIZES)
def test_each_image_comes_once_and_a_block_in_one_window(
    seed: int, epoch: int, chosen: list[int], num_block: int, num_window: int
) -> None:
    indices = np.array(sorted(chosen))
    windows = compute_windows(seed, epoch, indices, num_block, num_window)
    assert sorted(np.concatenate(windows).tolist()) == list(range(len(indices)))
    blocks = [set((indices[window] // num_block).tolist()) for window in windows]
    assert sum(map(len, blocks)) == len(set.union(*blocks))
    sizes = [len(block) for block in blocks]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) < 1.5 * num_window + 1


@given(SEEDS, st.integers(0, 100), st.integers(1, 300))
def test_one_window_is_the_order_of_all_images(seed: int, epoch: int, num_images: int) -> None:
    (window,) = draw(seed, epoch, num_images, 7, 300)
    assert np.array_equal(window, compute_order(seed, epoch, num_images))


def test_an_image_comes_at_any_place_and_in_another_order_each_epoch() -> None:
    orders = np.array([np.concatenate(draw(3, epoch, 240, 4, 10)) for epoch in range(3000)])
    places = np.argsort(orders, axis=1)
    for image in (0, 100, 239):
        counts, _ = np.histogram(places[:, image], 10, (0, 240))
        assert abs(counts - 300).max() < 90  # 5 standard deviations
    first = places[:, [0, 1, 200]] // 40  # windows of ten blocks of four images
    assert (first[:, 0] == first[:, 1]).all() and 0.1 < (first[:, 0] == first[:, 2]).mean() < 0.22
    assert abs(places[:, 0] - places[:, 1]).mean() == pytest.approx(40 / 3, rel=0.1)
    assert len({tuple(order) for order in orders}) == 3000


def test_blocks_are_read_ahead_from_the_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.ones((9, 3, 512, 512), np.uint8))
    images = np.asarray(np.load(tmp_path / "images.npy", mmap_mode="c"))
    assert count_block_images(images.shape[1:]) == BLOCK_BYTES // (3 * 512 * 512) == 1
    advised: list[tuple[int, int]] = []

    class Map(mmap.mmap):
        def madvise(self, advice: int, start: int = 0, length: int = 0) -> None:
            assert advice == mmap.MADV_WILLNEED
            advised.append((start, length))
            super().madvise(advice, start, length)

    with open(tmp_path / "images.npy", "rb") as file:
        mapped = Map(file.fileno(), 0, access=mmap.ACCESS_COPY)
    copy = np.ndarray(images.shape, np.uint8, mapped, 128)
    read_ahead(copy, np.array([7, 2, 2]))
    assert [(start + 4096) // (3 * 512 * 512) for start, _ in advised] == [2, 7]
    assert all(length >= 3 * 512 * 512 for _, length in advised)
    read_ahead(np.ones((2, 3, 32, 32), np.uint8), np.array([1]))  # which is no mapping
