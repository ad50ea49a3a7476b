"""The pictures, judged by their pixels: what is drawn, how long the bars are, and that nothing else has a say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageColor

from image_classifier.metrics import compute_metrics
from image_classifier.tracking.compare import compare_runs
from image_classifier.visualization.confusion import draw_confusion_matrix
from image_classifier.visualization.figures import (
    DARK,
    LIGHT,
    Theme,
    compute_calibration_bins,
    draw_comparison_figure,
    draw_curves,
    draw_reliability,
    draw_run_figure,
    shorten,
)
from tests.runs import CLASSES, build_epochs, compute_evaluation_of, draw_predictions, write_run

HOSTILE_NAMES = [
    "$\\frac{",
    "<script>",
    "two\nlines",
    "名前",
    "\x1b[31m",
    "a name that is far too long to be shown",
    "_^",
]


def build_evaluation(accuracy: float = 0.8, num_classes: int = 10, num_images: int = 400) -> dict[str, Any]:
    classes = CLASSES if num_classes == len(CLASSES) else [f"class {c}" for c in range(num_classes)]
    return compute_evaluation_of(*draw_predictions(accuracy, num_images, num_classes), classes)


def read_pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def find_colour(png: bytes, colour: str) -> NDArray[np.bool_]:
    """Which pixels [height, width] have exactly this colour."""
    return np.asarray((read_pixels(png) == ImageColor.getrgb(colour)).all(axis=2))


def test_bars_are_as_long_as_the_accuracies() -> None:
    evaluation = build_evaluation(num_classes=2)
    accuracies = {"class 0": 0.25, "class 1": 1.0}
    for name, accuracy in accuracies.items():
        evaluation["per_class"][name]["accuracy"] = accuracy
    evaluation["accuracy"] = 0.625

    png = draw_run_figure(evaluation, [], "")

    lengths = find_colour(png, LIGHT.bar).sum(axis=1)
    first, second = np.split(lengths[lengths > 0], [len(lengths[lengths > 0]) // 2])
    # A bar's longest row of pixels is one that no text lies on.
    assert first.max() / second.max() == pytest.approx(0.25, abs=0.01)
    half = slice(0, find_colour(png, LIGHT.total).shape[1] // 2)
    assert find_colour(png, LIGHT.total)[:, half].sum(axis=1).max() / second.max() == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize(("num_classes", "num_epochs"), [(10, 0), (10, 1), (2, 300), (26, 2), (100, 8)])
def test_a_picture_of_any_run_can_be_drawn(num_classes: int, num_epochs: int) -> None:
    evaluation = build_evaluation(num_classes=num_classes)
    pixels = read_pixels(draw_run_figure(evaluation, build_epochs(num_epochs), "experiment / run"))
    height, width, _ = pixels.shape
    assert 700 <= width <= 1600
    assert height <= 1600
    margin = np.concatenate([pixels[:5].reshape(-1, 3), pixels[:, :5].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    assert (margin == 255).all()  # nothing is cut off at the edge


def test_curves_are_there_if_something_was_trained_and_validated() -> None:
    def count(epochs: list[dict[str, Any]], colour: str) -> int:
        return int(find_colour(draw_curves(epochs, build_evaluation()), colour).sum())

    assert count(build_epochs(0), LIGHT.training) == 0
    assert count(build_epochs(5), LIGHT.training) > 1000
    assert count(build_epochs(5), LIGHT.validation) == 0
    assert count(build_epochs(5, validation=True), LIGHT.validation) > 1000
    assert count(build_epochs(1), LIGHT.test) > 200


def test_what_is_at_the_edge_of_the_curves_is_drawn_whole() -> None:
    evaluation, epochs = build_evaluation(), build_epochs(3, validation=True)

    def draw(name: str, value: float) -> int:
        png = draw_curves([{**epoch, name: value} for epoch in epochs], {**evaluation, "accuracy": 0.1, "loss": 1.0})
        return int(find_colour(png, LIGHT.validation).sum())

    learned = [{**epoch, "loss_by_part": [0.0]} for epoch in build_epochs(2)]
    assert find_colour(draw_curves(learned, {**evaluation, "loss": 0.0}), LIGHT.training).any()
    assert draw("validation_accuracy", 1.0) >= 0.98 * draw("validation_accuracy", 0.75)
    highest = max(loss for epoch in epochs for loss in epoch["loss_by_part"])
    assert draw("validation_loss", 1.7 * highest) >= 0.98 * draw("validation_loss", 0.5)
    assert draw("validation_loss", 9 * highest) < 0.98 * draw("validation_loss", 0.5)


def test_a_class_without_images_has_no_bar_and_breaks_nothing() -> None:
    probabilities, labels = draw_predictions(0.8, 300, 3)
    probabilities = np.pad(probabilities, ((0, 0), (0, 1)))  # a fourth class that is neither met nor predicted
    evaluation = compute_evaluation_of(probabilities, labels, ["a", "b", "c", "none"])

    png = draw_run_figure(evaluation, build_epochs(2), "")
    draw_confusion_matrix(evaluation)

    is_bar_row = find_colour(png, LIGHT.bar)[:, : read_pixels(png).shape[1] // 2].sum(axis=1) > 30
    assert (np.diff(is_bar_row.astype(int)) == 1).sum() == 3


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_names_are_text_whatever_they_hold(theme: Theme) -> None:
    probabilities, labels = draw_predictions(0.8, 100, len(HOSTILE_NAMES))
    evaluation = compute_evaluation_of(probabilities, labels, HOSTILE_NAMES)

    draw_run_figure(evaluation, build_epochs(1), "$\\hostile{ \x00 title" * 20)
    draw_confusion_matrix(evaluation, theme)


def test_the_same_figures_give_the_same_bytes_whatever_the_users_style() -> None:
    evaluation, epochs = build_evaluation(), build_epochs(3)
    before = draw_run_figure(evaluation, epochs, "run")
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "savefig.dpi": 30, "text.usetex": True}):
        assert draw_run_figure(evaluation, epochs, "run") == before
        assert matplotlib.rcParams["font.size"] == 20
    assert b"tEXt" not in before  # such as a date, or matplotlib's version


def test_long_names_are_shown_whole_or_with_both_ends() -> None:
    names = [f"a name of forty characters, number {number:05d}" for number in range(10)]
    evaluation = build_evaluation()
    usual = read_pixels(draw_run_figure(evaluation, [], "")).shape[1]
    evaluation["per_class"] = dict(zip(names, evaluation["per_class"].values(), strict=True))
    assert [shorten(name) for name in names] == names
    assert read_pixels(draw_run_figure(evaluation, [], "")).shape[1] > usual + 200
    assert shorten(names[7], 20) == "a name of …ber 00007"


def test_a_diagonal_confusion_matrix_is_strong_on_the_diagonal_alone() -> None:
    labels = np.arange(300, dtype=np.int64) % 3
    perfect = compute_evaluation_of(np.eye(3, dtype=np.float32)[labels], labels, ["a", "b", "c"])

    strong = find_colour(draw_confusion_matrix(perfect), LIGHT.total)

    rows, columns = np.nonzero(strong)
    edges = np.linspace(rows.min(), rows.max() + 1, 4), np.linspace(columns.min(), columns.max() + 1, 4)
    cells = np.histogram2d(rows, columns, bins=edges)[0]
    assert (np.diag(cells) > 0.8 * cells.sum() / 3).all()
    assert cells.sum() - np.trace(cells) < 0.02 * cells.sum()


def test_the_bins_of_the_diagram_add_up_to_the_calibration_error() -> None:
    probabilities, labels = draw_predictions(0.7, 1000, 10)
    count, confidence, accuracy = compute_calibration_bins(probabilities, labels)

    error = (np.abs(confidence - accuracy) * count).sum() / count.sum()

    metrics = compute_metrics(probabilities, labels, CLASSES)
    assert error == pytest.approx(metrics["expected_calibration_error"], abs=1e-6)
    assert count.sum() == 1000


def test_nothing_covers_the_bars_of_the_reliability_diagram() -> None:
    confidence = np.linspace(0.52, 0.99, 60, dtype=np.float32)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    png = draw_reliability(probabilities, np.zeros(60, np.int64), 0.2)
    heights = find_colour(png, LIGHT.bar).sum(axis=0)
    assert heights[heights > 100].min() > 0.9 * heights.max()


def test_a_certain_prediction_is_in_the_last_bin() -> None:
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    count, confidence, accuracy = compute_calibration_bins(probabilities, np.array([0, 1], dtype=np.int64))
    assert (count[-1], confidence[-1], accuracy[-1]) == (2, 1.0, 0.5)


def test_a_comparison_shows_each_group_in_its_colour(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"e/{c}-{s}", seed=s, cutout=c, accuracy=0.7 + c / 100) for c in (0, 8) for s in (0, 1)]
    single = write_run(tmp_path, "e/single", cutout=4)

    png = draw_comparison_figure(compare_runs([*runs, single]))

    for colour in ("#0072b2", "#d55e00"):  # the intervals are drawn opaque
        assert find_colour(png, colour).sum() > 100


def test_a_comparison_of_many_groups_and_classes_can_be_drawn(tmp_path: Path) -> None:
    classes = [f"class {c}" for c in range(60)]
    runs = [write_run(tmp_path, f"e/{c}", cutout=c, translate=c % 5, classes=classes) for c in range(9)]
    assert read_pixels(draw_comparison_figure(compare_runs(runs))).shape[1] < 1600
