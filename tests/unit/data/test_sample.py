"""The sample set: the same bits everywhere, balanced, in CIFAR-10's layout, and not to be mistaken for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from image_classifier.data.dataset import load_snapshot
from image_classifier.data.sample import CLASSES, draw_sample, write_sample
from image_classifier.errors import DataError, SettingsError, StorageError
from image_classifier.storage import locked_folder

DIGEST = "8211832c239963764c088866198a2a177d1b7f39a866a7ee857f605d83c4a23b"


def test_the_bits_are_those_of_every_other_machine() -> None:
    images, labels = draw_sample(300, split=0, seed=0)
    assert images.shape == (300, 3, 32, 32) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == DIGEST


def test_images_differ_from_each_other_and_by_seed_and_split() -> None:
    images, labels = draw_sample(150, split=0, seed=3)
    again, again_labels = draw_sample(150, split=0, seed=3)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, again_labels)
    assert len({image.tobytes() for image in images}) == 150
    for other, _ in (draw_sample(150, split=1, seed=3), draw_sample(150, split=0, seed=4)):
        assert (images == other).all(axis=(1, 2, 3)).sum() == 0


@pytest.mark.parametrize("num_images, counts", [(100, {10}), (25, {2, 3}), (3, {0, 1})])
def test_classes_are_balanced_and_mixed(num_images: int, counts: set[int]) -> None:
    _, labels = draw_sample(num_images, split=0, seed=0)
    assert set(np.bincount(labels, minlength=10).tolist()) == counts
    assert labels.tolist() != sorted(labels)


def test_nearest_means_find_some_classes_but_not_all() -> None:
    """Something is to be learned, and something is left to learn."""
    images, labels = draw_sample(1000, split=0, seed=0)
    test_images, test_labels = draw_sample(200, split=1, seed=0)
    grey, test_grey = (
        np.abs(part.mean(axis=1) - part.mean(axis=(1, 2, 3))[:, None, None]) for part in (images, test_images)
    )
    means = np.stack([grey[labels == label].mean(axis=0) for label in range(10)])
    guesses = np.square(test_grey[:, None] - means).sum(axis=(2, 3)).argmin(axis=1)
    assert 0.15 < (guesses == test_labels).mean() < 0.6


def test_it_is_written_in_the_binary_layout_and_says_sample(tmp_path: Path) -> None:
    write_sample(tmp_path / "a" / "sample", num_train=53, num_test=11, seed=5)
    snapshot = load_snapshot(tmp_path / "a" / "sample")
    assert (snapshot.name, snapshot.classes, snapshot.num_train) == ("sample", CLASSES, 53)
    for (images, labels), split, count in ((snapshot.train, 0, 53), (snapshot.test, 1, 11)):
        expected_images, expected_labels = draw_sample(count, split=split, seed=5)
        np.testing.assert_array_equal(images, expected_images)
        np.testing.assert_array_equal(labels, expected_labels)
    (tmp_path / "a" / "sample" / "metadata.json").unlink()  # the layout's own file has the names too
    assert load_snapshot(tmp_path / "a" / "sample").classes == CLASSES


def test_it_is_written_beside_what_a_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    write_sample(tmp_path, num_train=10, num_test=5)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    assert json.loads((tmp_path / "metadata.json").read_bytes())["name"] == "sample"
    assert load_snapshot(tmp_path).num_train == 10


def test_two_sets_in_one_folder_are_never_mixed(tmp_path: Path) -> None:
    """Two processes that found the folder without a data set write to it, one after the other or at once."""
    write_sample(tmp_path, num_train=10, num_test=5, seed=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="has a sample set already"):
        write_sample(tmp_path, num_train=10, num_test=5, seed=2)
    with locked_folder(tmp_path), pytest.raises(DataError, match="another process writes a data set to .*; wait"):
        write_sample(tmp_path, num_train=10, num_test=5, seed=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "test_batch.bin").unlink()  # what a killed process left is no set, and is written anew
    write_sample(tmp_path, num_train=10, num_test=5, seed=2)
    np.testing.assert_array_equal(load_snapshot(tmp_path).test[0], draw_sample(5, split=1, seed=2)[0])


@pytest.mark.parametrize(
    "options", [{"num_train": 0}, {"num_test": -1}, {"num_train": 10**9}, {"seed": -1}, {"seed": 2**63}]
)
def test_options_out_of_range_are_refused(options: dict[str, int], tmp_path: Path) -> None:
    (name,) = options
    with pytest.raises(SettingsError, match=f"--{name} takes a whole number from .*, got: {options[name]}"):
        write_sample(tmp_path / "sample", **options)
    assert not (tmp_path / "sample").exists()


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write .*sample"):
        write_sample(tmp_path / "file" / "sample", num_train=10, num_test=5)
