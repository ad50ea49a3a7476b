"""Batches: the same for any number of threads, from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.data import blocks
from image_classifier.data import loader as module
from image_classifier.data.augment import Augmentation, augment_images, compute_order
from image_classifier.data.loader import BLOCK_BYTES, Batch, Loader
from image_classifier.data.mixing import build_targets

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
LABELS = np.arange(50, dtype=np.int64) % 10
INDICES = np.arange(0, 50, 2)
AUGMENTATION = Augmentation(flip="random", translate=2)
UNLIKE = np.minimum(LABELS, 2)  # classes of 5, 5 and 40 images
TARGETS = build_targets(3, 0.1, np.array([1.0, 0.5, 2.0]))
MIXING: list[dict[str, Any]] = [
    {"mixup": 0.4, "sampler": "balanced"},
    {"cutmix": 1.0},
    {"sampler": "balanced"},
    {"shuffle_window": 3},
]


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks of two images."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks, "BLOCK_BYTES", 2 * 3072)
        yield


def make_loader(batch_size: int = 4, num_workers: int = 0, **values: Any) -> Loader:
    if values:
        augmentation = replace(AUGMENTATION, rand_augment=9, color_jitter=0.3, cutout=4)
        return Loader(IMAGES, UNLIKE, INDICES, batch_size, 3, augmentation, num_workers, targets=TARGETS, **values)
    return Loader(IMAGES, LABELS, INDICES, batch_size, 3, AUGMENTATION, num_workers)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        if one.targets is None or other.targets is None:
            assert one.targets is other.targets
        else:
            assert torch.equal(one.targets, other.targets)


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


@pytest.mark.parametrize("values", [{}, *MIXING])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_number_of_threads_changes_nothing(num_workers: int, values: dict[str, Any]) -> None:
    expected = list(make_loader(**values).iterate(3))
    assert_equal(list(make_loader(num_workers=num_workers, **values).iterate(3)), expected)


@settings(max_examples=40)
@given(st.integers(0, 21), st.integers(1, 9), st.integers(0, 2), st.sampled_from([{}, *MIXING]))
def test_batches_go_on_from_any_step_as_if_nothing_had_happened(
    first_step: int, batch_size: int, num_workers: int, values: dict[str, Any]
) -> None:
    whole = list(make_loader(batch_size, **values).iterate(3))
    resumed = make_loader(batch_size, num_workers, **values).iterate(3, first_step=first_step)
    assert_equal(list(resumed), whole[first_step:])


@pytest.mark.parametrize("values", MIXING)
def test_the_size_of_a_block_changes_nothing(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(make_loader(**values).iterate(2))
    monkeypatch.setattr(module, "BLOCK_BYTES", 9 * IMAGES[0].nbytes)
    assert_equal(list(make_loader(**values).iterate(2)), expected)


def test_targets_are_mixed_as_the_images_are() -> None:
    flat = np.broadcast_to(np.array([0, 100, 200], np.uint8)[UNLIKE][:, None, None, None], (50, 3, 32, 32))
    mixings: list[dict[str, Any]] = [{"mixup": 1.0}, {"cutmix": 1.0}]
    for mixing in mixings:
        flat_loader = Loader(flat, UNLIKE, INDICES, 4, 3, Augmentation(), 0, "uniform", np.eye(3, dtype="f"), **mixing)
        for batch in flat_loader.iterate(2):
            assert batch.targets is not None
            expected = batch.targets @ torch.tensor([0.0, 100.0, 200.0])
            found = batch.images.float().mean(dim=(1, 2, 3))
            assert torch.allclose(found, expected, atol=0.6)
            assert torch.allclose(batch.targets.sum(dim=1), torch.ones(len(batch.labels)))


def test_an_image_that_an_epoch_has_several_times_is_varied_each_time_in_another_way() -> None:
    batches = list(make_loader(25, sampler="balanced").iterate(1))
    (images,) = (batch.images[batch.labels == 0] for batch in batches)
    assert len(INDICES[UNLIKE[INDICES] == 0]) == 5
    assert len(images) == 13 and len({image.numpy().tobytes() for image in images}) == 13


def test_windows_are_read_ahead_when_the_one_before_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(module, "read_ahead", lambda images, chosen: events.append(f"read {len(chosen)}"))
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    loader = make_loader(4, shuffle_window=3)
    for number, _ in enumerate(loader.iterate(1, 1), 1):
        events.append(f"step {number}")
    windows = [int(event.split()[1]) for event in events if event.startswith("read")]
    assert windows == [0, *[3] * 7]  # 25 images, without those of the step that is passed over
    assert events[:5] == ["read 0", *["read 3"] * 3, "step 1"]  # its images end in the third window


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
