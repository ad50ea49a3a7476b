"""The picture of what changed between two data sets."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from image_classifier.data.diff import compute_difference
from image_classifier.data.snapshot import Snapshot
from image_classifier.visualization.difference_sheet import draw_difference_sheet


def make(colours: list[int], labels: list[int]) -> Snapshot:
    """Images of one colour each; the last one is the test set."""
    images = np.zeros((len(colours), 3, 32, 32), np.uint8)
    images[:, 1] = np.array(colours, np.uint8)[:, None, None]
    return Snapshot(images, np.array(labels), ("a class with a long name", "$b$"), len(colours) - 1, "0" * 64, "test")


def draw(old: Snapshot, new: Snapshot) -> Image.Image:
    content = draw_difference_sheet(old, new, compute_difference(old, new), "old → new")
    assert content == draw_difference_sheet(old, new, compute_difference(old, new), "old → new")
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_each_changed_image_is_shown() -> None:
    sheet = draw(make([50, 100, 150, 250], [0, 0, 0, 0]), make([100, 150, 200, 250], [1, 0, 0, 0]))
    shown = {colour for _, colour in sheet.getcolors(2**24) or []}
    assert {(0, 50, 0), (0, 100, 0), (0, 200, 0)} <= shown  # removed, relabelled, added
    assert (0, 150, 0) not in shown and (0, 250, 0) not in shown


def test_the_sheet_grows_with_what_changed_up_to_a_limit() -> None:
    none = make([1, 2], [0, 0])
    heights = [draw(none, make([1, *range(3, 3 + count), 2], [0] * (count + 2))).height for count in (0, 20, 100, 200)]
    assert heights[0] < heights[1] < heights[2] == heights[3]
