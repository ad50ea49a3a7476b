"""Figures of a run, as the bytes of PNG files: the same numbers give the same bytes.

Drawn on Agg canvases of their own, so that no display, global state or matplotlibrc matters. The colours are from
Okabe and Ito: Color Universal Design, 2008, and stay apart for the colour-blind.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from image_classifier.metrics import NUM_CALIBRATION_BINS
from image_classifier.progress import track

DOTS_PER_INCH = 150

_MAX_BARS = 25  # in one column; more classes are sorted into several
_MAX_NAME = 40  # characters
_USUAL_NAME = 18  # characters; for longer names a picture is wider


@dataclass(frozen=True)
class Theme:
    """The colours of a picture."""

    background: str
    text: str
    muted: str
    grid: str
    bar: str
    total: str
    training: str
    validation: str
    test: str


LIGHT = Theme(
    background="#ffffff",
    text="#1c2430",
    muted="#5d6875",
    grid="#e3e7ec",
    bar="#56b4e9",
    total="#0072b2",
    training="#0072b2",
    validation="#e69f00",
    test="#c14a00",
)
DARK = Theme(
    background="#161b22",
    text="#e6eaf0",
    muted="#9aa5b1",
    grid="#2b323c",
    bar="#3d8fc4",
    total="#8ad0f5",
    training="#56b4e9",
    validation="#f0b840",
    test="#ff8a4c",
)


@track("drawing the figures")
def draw_run_figure(evaluation: dict[str, Any], epochs: Sequence[dict[str, Any]], title: str) -> bytes:
    """Draw `metrics.png`: class-wise and total accuracy as labelled bars, loss and accuracy curves beside them.

    Args:
        evaluation: as in `evaluation.json`.
        epochs: the lines of `metrics.jsonl`; none where nothing was trained.
        title: of the figure, such as the names of experiment and run.
    """
    theme = LIGHT
    num_classes = len(evaluation["per_class"])
    num_columns = math.ceil(num_classes / _MAX_BARS)
    more_letters = count_more_letters(evaluation["per_class"])
    with apply_style(theme):
        if num_columns == 1:
            more = 0.085 * more_letters  # inches
            figure = build_figure(10 + more, max(5.2, 1.6 + 0.29 * (num_classes + 1)))
            left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[5.2 + more, 4.8]).flat
            _draw_class_bars(left.subplots(), evaluation, theme)
            loss_axes, accuracy_axes = right.subplots(2, 1, sharex=True)
            loss_axes.tick_params(labelbottom=False)
        else:
            height = 0.8 + 0.2 * math.ceil(num_classes / num_columns)
            figure = build_figure((2.6 + 0.07 * more_letters) * max(num_columns, 4), 3.2 + height)
            top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.2, height]).flat
            loss_axes, accuracy_axes = top.subplots(1, 2)
            loss_axes.set_xlabel("epoch")
            bottom.suptitle(_describe_accuracy(evaluation) + "; by class, from best to worst", **_PANEL_TITLE)
            _draw_class_columns(bottom.subplots(1, num_columns), evaluation, theme)
        _draw_loss(loss_axes, epochs, evaluation, theme)
        _draw_accuracy(accuracy_axes, epochs, evaluation, theme)
        figure.suptitle(shorten(title, 90), x=0.015, ha="left", size=13, weight="bold", parse_math=False)
        return render_png(figure)


def draw_curves(epochs: Sequence[dict[str, Any]], evaluation: dict[str, Any], theme: Theme = LIGHT) -> bytes:
    """Draw the loss by part of an epoch, and the accuracies by epoch, one above the other."""
    with apply_style(theme):
        figure = build_figure(5.6, 5.4)
        loss_axes, accuracy_axes = figure.subplots(2, 1, sharex=True)
        loss_axes.tick_params(labelbottom=False)
        _draw_loss(loss_axes, epochs, evaluation, theme)
        _draw_accuracy(accuracy_axes, epochs, evaluation, theme)
        return render_png(figure)


def draw_reliability(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], expected_error: float, theme: Theme = LIGHT
) -> bytes:
    """Draw the reliability diagram: accuracy by confidence, and how many images have each confidence.

    Args:
        probabilities: float32 [N, C].
        labels: int64 [N].
        expected_error: the expected calibration error, written into the picture.
    """
    count, confidence, accuracy = compute_calibration_bins(probabilities, labels)
    edges = np.linspace(0, 1, NUM_CALIBRATION_BINS + 1)
    centres, width = (edges[:-1] + edges[1:]) / 2, 1 / NUM_CALIBRATION_BINS
    filled = count > 0
    with apply_style(theme):
        figure = build_figure(5.6, 5.3)
        axes, histogram = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
        axes.bar(centres[filled], accuracy[filled], 0.9 * width, color=theme.bar, label="accuracy of a bin")
        axes.plot([0, 1], [0, 1], color=theme.muted, linestyle=_DASHES, label="perfect calibration")
        axes.plot(
            confidence[filled],
            accuracy[filled],
            "o",
            color=theme.test,
            markersize=4,
            label="mean confidence",
        )
        axes.set_title(f"Reliability diagram: expected calibration error {100 * expected_error:.1f} %")
        axes.set_ylabel("accuracy")
        axes.set(xlim=(0, 1), ylim=(0, _TOP), yticks=_TICKS)
        axes.tick_params(labelbottom=False)
        figure.legend(loc="outside lower center", ncols=3)
        histogram.bar(centres, 100 * count / max(count.sum(), 1), 0.9 * width, color=theme.muted)
        histogram.set_xlabel("confidence: probability of the predicted class")
        histogram.set_ylabel("% of images")
        for each in (axes.xaxis, axes.yaxis, histogram.xaxis):
            each.set_major_formatter(_PERCENT)
        return render_png(figure)


@track("drawing the figures")
def draw_comparison_figure(comparison: dict[str, Any]) -> bytes:
    """Draw the result of `compare_runs`: the accuracy of each run by group, and by class for up to 40 classes."""
    theme = LIGHT
    groups = comparison["groups"]
    classes = list(groups[0]["class_accuracy"])
    has_classes = len(classes) <= 40 and all(list(group["class_accuracy"]) == classes for group in groups)
    with apply_style(theme):
        height = max(3.4, 1.4 + 0.55 * len(groups), 1.6 + 0.25 * len(classes) if has_classes else 0)
        more = 0.085 * count_more_letters(classes)  # inches
        figure = build_figure(11 + more if has_classes else 6.5, height)
        columns = figure.subplots(1, 1 + has_classes, squeeze=False, width_ratios=[1.25, 1][: 1 + has_classes])[0]
        _draw_groups(columns[0], comparison, theme)
        if has_classes:
            _draw_classes_of_groups(columns[1], groups, theme)
            figure.legend(*columns[1].get_legend_handles_labels(), loc="outside lower right", ncols=12)
        return render_png(figure)


def compute_calibration_bins(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Compute the number of images, their mean confidence, and the part classified rightly, of each equal bin.

    Returns:
        int64, float64 and float64 [NUM_CALIBRATION_BINS]; an empty bin has 0 everywhere.
    """
    confidences = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidences * NUM_CALIBRATION_BINS).astype(np.int64), NUM_CALIBRATION_BINS - 1)
    count = np.bincount(bins, minlength=NUM_CALIBRATION_BINS)
    divisor = np.maximum(count, 1)
    confidence = np.bincount(bins, confidences, NUM_CALIBRATION_BINS) / divisor
    accuracy = np.bincount(bins, right.astype(np.float64), NUM_CALIBRATION_BINS) / divisor
    return count, confidence, accuracy


_DASHES = (0, (4, 3))
_TOP = 1.04  # of an axis with percentages, so that a point at 100 % is whole
_TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)
_PANEL_TITLE: dict[str, Any] = {"x": 0.015, "ha": "left", "size": 10.5, "weight": "bold"}
_GROUP_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_GROUP_MARKERS = ("o", "s", "^", "v")
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")


def _draw_class_bars(axes: Axes, evaluation: dict[str, Any], theme: Theme) -> None:
    """All classes in their order, below the total."""
    rows = [("all classes", evaluation["accuracy"]), *_list_class_accuracies(evaluation)]
    _draw_bars(axes, rows, evaluation["accuracy"], theme)
    axes.patches[0].set_facecolor(theme.total)
    if evaluation["accuracy"] > 0.15:
        axes.texts[0].set_color(theme.background)  # the number is then wholly on the dark bar
    axes.set_title(_describe_accuracy(evaluation))


def _draw_class_columns(columns: Sequence[Axes], evaluation: dict[str, Any], theme: Theme) -> None:
    """For many classes: sorted by accuracy, the best first, in several columns."""
    rows = sorted(_list_class_accuracies(evaluation), key=lambda row: -1 if row[1] is None else row[1], reverse=True)
    num_rows = math.ceil(len(rows) / len(columns))
    for number, axes in enumerate(columns):
        column = rows[number * num_rows : (number + 1) * num_rows]
        _draw_bars(axes, column, evaluation["accuracy"], theme, num_rows=num_rows, size=7.5)


def _describe_accuracy(evaluation: dict[str, Any]) -> str:
    return f"Test accuracy: {100 * evaluation['accuracy']:.1f} % of {evaluation['num_images']:,} images"


def _list_class_accuracies(evaluation: dict[str, Any]) -> list[tuple[str, float | None]]:
    return [(shorten(name), scores["accuracy"]) for name, scores in evaluation["per_class"].items()]


def _draw_bars(
    axes: Axes,
    rows: Sequence[tuple[str, float | None]],
    total: float,
    theme: Theme,
    *,
    num_rows: int = 0,
    size: float = 9,
) -> None:
    positions = range(len(rows))
    num_rows = num_rows or len(rows)
    axes.barh(positions, [accuracy or 0 for _, accuracy in rows], height=min(0.75, 0.1 * num_rows), color=theme.bar)
    axes.axvline(total, color=theme.total, linewidth=1, linestyle=_DASHES)
    for position, (_, accuracy) in zip(positions, rows, strict=True):
        # At the foot of the bar, where numbers are below each other and the line of the total seldom passes.
        label = "no images" if accuracy is None else f"{100 * accuracy:.1f} %"
        colour = theme.muted if accuracy is None else theme.text
        axes.text(0.015, position, label, va="center_baseline", size=size, color=colour)
    axes.set_yticks(positions, [name for name, _ in rows], size=size, color=theme.text, parse_math=False)
    axes.set(xlim=(0, 1), ylim=(num_rows - 0.4, -0.6), xticks=[0, 0.5, 1])
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.tick_params(axis="x", labelsize=size)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def _draw_loss(axes: Axes, epochs: Sequence[dict[str, Any]], evaluation: dict[str, Any], theme: Theme) -> None:
    """The training loss by part of an epoch; the validation loss at the end of each epoch."""
    axes.set_title("Loss (cross entropy)")
    if not epochs:
        return _draw_no_training(axes, f"no curve, as nothing was trained; test loss {evaluation['loss']:.3f}", theme)
    position = [
        epoch["epoch"] - 1 + (part + 0.5) / len(epoch["loss_by_part"])
        for epoch in epochs
        for part in range(len(epoch["loss_by_part"]))
    ]
    losses = [_to_number(loss) for epoch in epochs for loss in epoch["loss_by_part"]]
    axes.plot(position, losses, color=theme.training, label="training", marker="o" if len(losses) == 1 else "")
    _draw_by_epoch(axes, epochs, "validation_loss", "validation", theme.validation, "s")
    _draw_test(axes, epochs, evaluation["loss"], f"test {evaluation['loss']:.3f}", theme)
    highest = max((loss for loss in [*losses, evaluation["loss"]] if not math.isnan(loss)), default=0.0) or 1.0
    validation = [_to_number(epoch["validation_loss"]) for epoch in epochs if "validation_loss" in epoch]
    # A validation loss far above, as early batch statistics give, leaves the picture.
    axes.set_ylim(0, 1.15 * max([highest, *(loss for loss in validation if loss < 2 * highest)]))
    axes.legend()


def _draw_accuracy(axes: Axes, epochs: Sequence[dict[str, Any]], evaluation: dict[str, Any], theme: Theme) -> None:
    axes.set_title("Accuracy")
    test = evaluation["accuracy"]
    if not epochs:
        return _draw_no_training(axes, f"no curve, as nothing was trained; test accuracy {100 * test:.1f} %", theme)
    _draw_by_epoch(axes, epochs, "train_accuracy", "training", theme.training, "o")
    _draw_by_epoch(axes, epochs, "validation_accuracy", "validation", theme.validation, "s")
    _draw_test(axes, epochs, test, f"test {100 * test:.1f} %", theme)
    axes.set(ylim=(0, _TOP), yticks=_TICKS, xlabel="epoch")
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.legend()


def _draw_by_epoch(
    axes: Axes, epochs: Sequence[dict[str, Any]], field: str, label: str, colour: str, marker: str
) -> None:
    points = [(epoch["epoch"], _to_number(epoch[field])) for epoch in epochs if field in epoch]
    if points:
        marker = marker if len(points) <= 40 else ""
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=3.5)


def _draw_test(axes: Axes, epochs: Sequence[dict[str, Any]], value: float, label: str, theme: Theme) -> None:
    """A line at the final test value, with a marker at the last epoch."""
    last = epochs[-1]["epoch"]
    axes.plot([0, last], [value, value], color=theme.test, linewidth=1, linestyle=_DASHES, label=label, zorder=4)
    axes.lines[-1].set(marker="D", markevery=[1], clip_on=False)
    axes.set_xlim(0, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))


def _draw_no_training(axes: Axes, message: str, theme: Theme) -> None:
    axes.text(0, 0.9, message, va="center", color=theme.muted, transform=axes.transAxes)
    axes.set_axis_off()


def _draw_groups(axes: Axes, comparison: dict[str, Any], theme: Theme) -> None:
    """A dot a run; for several seeds their mean and its interval above."""
    labels = []
    for position, group in enumerate(comparison["groups"]):
        colour = _GROUP_COLOURS[position % len(_GROUP_COLOURS)]
        accuracies = [run["accuracy"] for run in comparison["runs"] if run["group"] == group["name"]]
        sample = group["figures"]["accuracy"]
        label, height = f"{100 * sample['mean']:.2f} %", float(position)
        if sample["interval"] is not None:
            label += f" ± {100 * sample['standard_deviation']:.2f}"
            height = position - 0.12
            axes.plot(sample["interval"], [height] * 2, color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot([sample["mean"]], [height], "D", color=colour, markersize=7)
        axes.plot(accuracies, [2 * position - height] * len(accuracies), "o", color=colour, markersize=6, alpha=0.75)
        axes.annotate(label, (sample["mean"], height), (0, 8), textcoords="offset points", ha="center", size=8.5)
        settings = [f"{name} {values[group['name']]}" for name, values in comparison["settings"].items()]
        num_runs = len(group["runs"])
        runs = group["runs"][0] if num_runs == 1 else f"{num_runs} runs, {group['runs'][0]} to {group['runs'][-1]}"
        more = [f"and {len(settings) - 3} more"] if len(settings) > 3 else []
        lines = [f"{group['name']}: {runs}", *settings[:3], *more]
        labels.append("\n".join(shorten(line, 34) for line in lines))
    has_intervals = any(group["figures"]["accuracy"]["interval"] for group in comparison["groups"])
    axes.set_title("Test accuracy: runs" + (", mean, 95 % interval of the mean" if has_intervals else ""))
    axes.set_yticks(range(len(labels)), labels, color=theme.text, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.65)
    axes.margins(x=0.18)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


def _draw_classes_of_groups(axes: Axes, groups: Sequence[dict[str, Any]], theme: Theme) -> None:
    names = [shorten(name) for name in groups[0]["class_accuracy"]]
    for position, group in enumerate(groups):
        accuracies = [_to_number(accuracy) for accuracy in group["class_accuracy"].values()]
        marker = _GROUP_MARKERS[position % len(_GROUP_MARKERS)]
        colour = _GROUP_COLOURS[position % len(_GROUP_COLOURS)]
        axes.plot(accuracies, range(len(names)), marker, color=colour, markersize=6, alpha=0.85, label=group["name"])
    axes.set_title("Accuracy by class" + (", mean of the seeds" if any(len(g["seeds"]) > 1 for g in groups) else ""))
    axes.set_yticks(range(len(names)), names, color=theme.text, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="y", length=0)


def _to_number(value: float | None) -> float:
    return math.nan if value is None else value  # a loss that is no number leaves a gap


def shorten(text: str, length: int = _MAX_NAME) -> str:
    """Keep printable characters on one line; cut the middle out of long text, as names often differ at the end."""
    line = "".join(character if character.isprintable() else " " for character in text)
    num_last = (length - 1) // 2
    return line if len(line) <= length else f"{line[: length - 1 - num_last]}…{line[-num_last:]}"


def count_more_letters(names: Iterable[str]) -> int:
    """Count the letters for which a picture has to be wider than for names of the usual length."""
    return max(0, max((len(shorten(name)) for name in names), default=0) - _USUAL_NAME)


def build_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def apply_style(theme: Theme) -> Iterator[None]:
    """Draw as matplotlib ships it, in the colours of the theme, whatever the user's matplotlibrc says."""
    style: dict[str, Any] = {
        "figure.constrained_layout.w_pad": 0.1,  # inches
        "figure.constrained_layout.h_pad": 0.08,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.text,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.color": theme.text,
        "text.parse_math": False,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "font.size": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, style))
        # A class name in a script that the font lacks is drawn as boxes, and that is all there is to say.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def render_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # its version would change the bytes
    return buffer.getvalue()
