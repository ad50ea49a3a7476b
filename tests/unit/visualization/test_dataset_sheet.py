"""The sheet of a data set: its pixels show the images, its size follows the classes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from image_classifier.data.snapshot import Snapshot
from image_classifier.visualization.dataset_sheet import draw_dataset_sheet


def build_snapshot(num_classes: int, num_per_class: int, name: str = "sheet") -> Snapshot:
    """Build a data set in which the images of each class have a colour of its own."""
    labels = np.repeat(np.arange(num_classes), num_per_class)
    colours = np.stack([labels * 20 % 256, 255 - labels * 20 % 256, labels * 70 % 256], axis=1).astype(np.uint8)
    images = np.broadcast_to(colours[:, :, None, None], (len(labels), 3, 32, 32)).copy()
    classes = tuple(f"class {number}" for number in range(num_classes))
    images, labels = np.concatenate([images, images]), np.concatenate([labels, labels])
    return Snapshot(images, labels, classes, len(labels) // 2, "ab" * 32, name)


def draw(snapshot: Snapshot) -> NDArray[np.uint8]:
    """Draw and decode."""
    with Image.open(io.BytesIO(draw_dataset_sheet(snapshot))) as image:
        return np.array(image.convert("RGB"))


def test_each_class_has_a_row_of_its_images() -> None:
    snapshot = build_snapshot(6, 20)
    picture = draw(snapshot)
    rows = []
    for label in range(6):
        colour = snapshot.images[label * 20, :, 0, 0]
        found = (np.abs(picture.astype(int) - colour) <= 2).all(axis=2)
        assert found.sum() > 12 * 50 * 50  # twelve of them, of at least 50 x 50 dots
        rows.append(np.argwhere(found)[:, 0].mean())
    assert rows == sorted(rows)


def test_equal_data_give_equal_bytes() -> None:
    assert draw_dataset_sheet(build_snapshot(3, 5)) == draw_dataset_sheet(build_snapshot(3, 5))


@pytest.mark.parametrize("num_classes, num_per_class", [(1, 1), (2, 3), (26, 1), (100, 2), (230, 1)])
def test_any_number_of_classes_fits(num_classes: int, num_per_class: int) -> None:
    height, width, _ = draw(build_snapshot(num_classes, num_per_class)).shape
    assert 150 < height < 5000 and 900 < width < 7000


def test_a_class_without_images_and_odd_names_are_drawn(tmp_path: Path) -> None:
    snapshot = build_snapshot(3, 4, name="a $name$ \x1b[2J 数据")
    snapshot = Snapshot(snapshot.images, snapshot.labels, ("$x^", "y" * 99, "\n", "none"), 12, "0" * 64, snapshot.name)
    assert draw(snapshot).shape[2] == 3
