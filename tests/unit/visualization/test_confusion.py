"""The order of classes in the confusion matrix, and that its picture can be read with few and with many of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from image_classifier.visualization import confusion
from image_classifier.visualization.confusion import compute_contrast, draw_confusion_matrix, order_by_similarity
from image_classifier.visualization.figures import render_png
from tests.runs import compute_evaluation_of, draw_predictions


def build_groups(order: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """Build counts in which classes are confused within groups of this size alone, the groups shuffled."""
    place = np.argsort(order)
    same_group = (place[:, None] // size) == (place[None, :] // size)
    return np.where(np.eye(len(order), dtype=bool), 50, np.where(same_group, 5, 0)).astype(np.float64)


def test_classes_that_are_confused_are_neighbours() -> None:
    shuffled = np.random.default_rng(0).permutation(20)
    groups = shuffled[order_by_similarity(build_groups(np.argsort(shuffled), 4))] // 4
    assert (np.diff(groups) != 0).sum() == 4  # each of the five groups is in one piece


def test_a_chain_of_confusions_is_unrolled() -> None:
    shuffled = np.random.default_rng(1).permutation(9)
    distance = np.abs(shuffled[:, None] - shuffled[None, :])
    found = shuffled[order_by_similarity(np.where(distance == 0, 80, np.where(distance == 1, 10.0, 0)))]
    assert set(np.abs(np.diff(found))) == {1}


def test_each_class_comes_once_and_the_order_is_kept_where_nothing_is_confused() -> None:
    counts = np.random.default_rng(2).integers(0, 9, (30, 30)).astype(np.float64)
    counts[4] = 0  # a class without images
    assert sorted(order_by_similarity(counts)) == list(range(30))
    np.testing.assert_array_equal(order_by_similarity(np.diag(np.arange(5.0))), range(5))
    np.testing.assert_array_equal(order_by_similarity(np.ones((1, 1))), [0])


@pytest.mark.parametrize("num_classes", [10, 40, 100])
def test_no_text_overlaps_another(monkeypatch: pytest.MonkeyPatch, num_classes: int) -> None:
    names = [f"a class whose name has forty letters {number:03d}" for number in range(num_classes)]
    drawn: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        drawn.append(figure)
        return render_png(figure)

    monkeypatch.setattr(confusion, "render_png", keep)
    png = draw_confusion_matrix(compute_evaluation_of(*draw_predictions(0.7, 20 * num_classes, num_classes), names))

    (figure,) = drawn
    axes, canvas = figure.axes[0], figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]  # as the stubs have it
    for labels, side in ((axes.get_yticklabels(), 1), (axes.get_xticklabels(), 0)):
        assert len({label.get_text() for label in labels}) == num_classes
        boxes = [label.get_window_extent(renderer) for label in labels]
        if side or num_classes > confusion.MAX_NUMBERED:  # boxes of slanted names overlap, the names do not
            edges = sorted((box.y0, box.y1) if side else (box.x0, box.x1) for box in boxes)
            assert all(first[1] <= second[0] + 0.5 for first, second in zip(edges[:-1], edges[1:], strict=True))
        assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    with Image.open(io.BytesIO(png)) as image:
        assert image.width < 2400


def test_of_more_classes_than_have_room_the_picture_has_no_names() -> None:
    evaluation = compute_evaluation_of(*draw_predictions(0.7, 300, 150), [f"class {c}" for c in range(150)])
    with Image.open(io.BytesIO(draw_confusion_matrix(evaluation))) as image:
        assert image.width < 1500


def test_contrast_is_that_of_the_guidelines() -> None:
    assert compute_contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert compute_contrast((0.5, 0.5, 0.5, 1), (0.5, 0.5, 0.5)) == 1
