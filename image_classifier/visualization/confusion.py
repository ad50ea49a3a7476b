"""The confusion matrix as a picture, with classes that are confused with each other side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from image_classifier.visualization.figures import LIGHT, Theme, apply_style, build_figure, render_png, shorten

MAX_NUMBERED = 12
"""Classes up to which each cell has its number; with more a colour bar says what the colours mean."""
MAX_NAMED = 120
"""Classes up to which rows and columns have their names."""

_NUM_OF_USUAL_SIZE = 25  # classes; with more the picture grows
_MAX_NAME = 24  # characters
_SHADES = PowerNorm(0.5, vmin=0, vmax=1)  # of the square root: 1 % of a class can still be seen


def draw_confusion_matrix(evaluation: dict[str, Any], theme: Theme = LIGHT) -> bytes:
    """Draw how the images of each class (rows) were classified (columns), in the order of `order_by_similarity`; PNG.

    Args:
        evaluation: as in `evaluation.json`.
    """
    counts = np.asarray(evaluation["confusion_matrix"], dtype=np.float64)
    order = order_by_similarity(counts)
    rates = _compute_rates(counts, np.nan)[np.ix_(order, order)]
    names = [shorten(name, _MAX_NAME) for name in np.array(list(evaluation["per_class"]), dtype=object)[order]]
    with apply_style(theme):
        is_named = len(names) <= MAX_NAMED
        growth = max(0, 0.125 * (len(names) - _NUM_OF_USUAL_SIZE)) if is_named else 4  # inches
        figure = build_figure(5.6 + growth, 5.3 + growth)
        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("rates", [theme.background, theme.bar, theme.total])
        picture = axes.imshow(rates, cmap=colours, norm=_SHADES)
        axes.grid(False)
        axes.set_title("Confusion matrix, % of the true class")
        _name_classes(axes, names)
        if len(names) <= MAX_NUMBERED:
            _write_numbers(axes, rates, colours, theme)
        else:
            _add_colour_bar(figure, axes, picture)
        return render_png(figure)


def order_by_similarity(counts: NDArray[np.float64]) -> NDArray[np.int64]:
    """Order classes so that those that are confused with each other are neighbours.

    Clusters are joined by average linkage (Sokal and Michener, 1958), each time at those of their ends that are the
    most similar. Two classes are as similar as they are confused, in both directions. Ties keep the classes' order.

    Args:
        counts: float64 [C, C], images by true and predicted class.

    Returns:
        int64 [C], each class once.
    """
    rates = _compute_rates(counts, 0)
    similarity = rates + rates.T
    linkage = similarity.copy()
    np.fill_diagonal(linkage, -1)  # as whatever is no pair of clusters
    members = [[label] for label in range(len(counts))]
    for _ in range(len(counts) - 1):
        first, second = divmod(int(linkage.argmax()), len(counts))  # the first is the lower, as both are in it
        sizes = len(members[first]), len(members[second])
        members[first] = _join(members[first], members[second], similarity)
        mean = (sizes[0] * linkage[first] + sizes[1] * linkage[second]) / sum(sizes)
        linkage[first] = linkage[:, first] = mean
        linkage[second] = linkage[:, second] = linkage[first, first] = -1
    return np.array(members[0], dtype=np.int64)


def _join(first: list[int], second: list[int], similarity: NDArray[np.float64]) -> list[int]:
    ways = [(left, right) for left in (first, first[::-1]) for right in (second, second[::-1])]
    left, right = max(ways, key=lambda way: float(similarity[way[0][-1], way[1][0]]))
    return left + right


def _compute_rates(counts: NDArray[np.float64], empty: float) -> NDArray[np.float64]:
    """Divide each row by its sum; a row of a class without images is filled with `empty`."""
    support = counts.sum(axis=1, keepdims=True)
    rates = np.full_like(counts, empty)
    np.divide(counts, support, out=rates, where=support > 0)
    return rates


def _name_classes(axes: Axes, names: list[str]) -> None:
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(names) > MAX_NAMED:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    places = range(len(names))
    size = min(9.0, max(6.0, 180 / len(names)))
    slope = 45 if len(names) <= MAX_NUMBERED else 90
    style: dict[str, Any] = {"size": size, "parse_math": False}
    axes.set_xticks(places, names, rotation=slope, ha="right", va="center", rotation_mode="anchor", **style)
    axes.set_yticks(places, names, **style)


def _write_numbers(axes: Axes, rates: NDArray[np.float64], colours: Colormap, theme: Theme) -> None:
    for row, column in np.argwhere(rates > 0):
        rate = float(rates[row, column])
        cell = colours(_SHADES(rate))
        ink = max((theme.text, theme.background), key=lambda colour: compute_contrast(to_rgb(colour), cell))
        label = f"{100 * rate:.0f}" if rate >= 0.005 else "<1"
        axes.text(column, row, label, ha="center", va="center", size=8, color=ink)


def _add_colour_bar(figure: Figure, axes: Axes, picture: Any) -> None:
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar = figure.colorbar(picture, ax=axes, ticks=ticks, shrink=0.6, aspect=30, pad=0.02)
    bar.ax.set_yticklabels([f"{100 * tick:.0f} %" for tick in ticks])
    bar.outline.set_visible(False)


def compute_contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Compute the contrast of two colours, 1 to 21, as WCAG 2 has it; red, green and blue from 0 to 1."""

    def compute_luminance(colour: tuple[float, ...]) -> float:
        channels = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
        return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]

    darker, brighter = sorted((compute_luminance(first), compute_luminance(second)))
    return (brighter + 0.05) / (darker + 0.05)
