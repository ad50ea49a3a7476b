"""Batches: the same for any number of threads, from any step on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.data.augment import Augmentation, augment_images, compute_order
from image_classifier.data.loader import BLOCK_BYTES, Batch, Loader

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
LABELS = np.arange(50, dtype=np.int64) % 10
INDICES = np.arange(0, 50, 2)
AUGMENTATION = Augmentation(flip="random", translate=2)


def make_loader(batch_size: int = 4, num_workers: int = 0) -> Loader:
    return Loader(IMAGES, LABELS, INDICES, batch_size, 3, AUGMENTATION, num_workers)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("batch_size", [1, 4, 25, 100])
def test_an_epoch_goes_through_its_images_once_in_the_seeds_order(batch_size: int) -> None:
    loader = make_loader(batch_size)
    batches = list(loader.iterate(2))
    assert len(batches) == 2 * loader.steps_per_epoch
    for epoch in range(2):
        own = batches[epoch * loader.steps_per_epoch : (epoch + 1) * loader.steps_per_epoch]
        order = INDICES[compute_order(3, epoch, len(INDICES))]
        assert torch.cat([batch.labels for batch in own]).tolist() == LABELS[order].tolist()
        expected = augment_images(IMAGES, order, 3, epoch, AUGMENTATION)
        assert np.array_equal(torch.cat([batch.images for batch in own]).numpy(), expected)
        assert [len(batch.labels) for batch in own[:-1]] == [batch_size] * (loader.steps_per_epoch - 1)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_number_of_threads_changes_nothing(num_workers: int) -> None:
    assert_equal(list(make_loader(num_workers=num_workers).iterate(3)), list(make_loader().iterate(3)))


@settings(max_examples=25)
@given(st.integers(0, 21), st.integers(1, 9), st.integers(0, 2))
def test_batches_go_on_from_any_step_as_if_nothing_had_happened(
    first_step: int, batch_size: int, num_workers: int
) -> None:
    whole = list(make_loader(batch_size).iterate(3))
    assert_equal(list(make_loader(batch_size, num_workers).iterate(3, first_step=first_step)), whole[first_step:])


def test_an_error_in_a_thread_reaches_the_loop() -> None:
    loader = Loader(IMAGES, LABELS, np.array([0, 99]), 1, 0, AUGMENTATION, 2)
    with pytest.raises(IndexError):
        list(loader.iterate(1))


def test_a_loader_that_is_left_in_the_middle_ends_its_threads() -> None:
    import threading

    batches = make_loader(num_workers=2).iterate(50)
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_no_epochs_and_no_images_give_no_batches() -> None:
    assert list(make_loader().iterate(0)) == []
    assert list(Loader(IMAGES, LABELS, INDICES[:0], 4, 0, AUGMENTATION, 1).iterate(2)) == []


def test_large_images_are_prepared_in_blocks_of_no_more_bytes() -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 224, 224), dtype=np.uint8)
    loader = Loader(images, np.arange(200), np.arange(200), 10, 3, AUGMENTATION, 0)
    batches = list(loader.iterate(1))
    assert torch.cat([batch.labels for batch in batches]).tolist() == compute_order(3, 0, 200).tolist()
    sizes = {batch.images.untyped_storage().nbytes() for batch in batches}
    assert max(sizes) <= BLOCK_BYTES and max(sizes) > BLOCK_BYTES // 2
