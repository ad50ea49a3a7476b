"""Accuracy over time of the recipes and of what they are compared with, as the README's picture.

    python -m benchmarks.picture

Reads benchmarks/results and writes benchmarks/results/speed.png, which holds the digest of the figures it shows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from benchmarks.measure import RESULTS, load_result
from benchmarks.tables import COMPARISONS, RECIPES, load_recipe_result

OURS, THEIRS, LINK = "#1f5fa8", "#b5541c", "#9a9a9a"
BASELINES = {
    "time_to_accuracy_native": "record algorithm",
    "notebook_job_native": "notebook's own way",
}
PICTURE = RESULTS / "speed.png"
TICKS_S = (5, 10, 30, 60, 120, 300, 600, 1200)


def draw() -> Figure:
    """Draw a point a recipe and a baseline: mean seconds from the command, mean accuracy, ranges as whiskers."""
    figure = Figure(figsize=(8, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in RECIPES:
        result = load_recipe_result(name)
        if "accuracy" in result and "num_images" not in result:  # that of fewer images stands with nobody else's
            _draw_point(axes, result, name, OURS, "o")
    for comparison, label in BASELINES.items():
        result = load_result(comparison)
        _draw_point(axes, result["baseline"], label, THEIRS, "s")
        ours = load_recipe_result(COMPARISONS[comparison][0])
        ends = [(side["seconds"]["mean"], side["accuracy"]["mean"]) for side in (ours, result["baseline"])]
        axes.plot(*zip(*ends, strict=True), color=LINK, linewidth=1, linestyle=":", zorder=1)
    axes.set(xscale="log", xlim=(5, 1800), ylim=(0.5, 1.0))
    axes.xaxis.set_major_locator(FixedLocator(TICKS_S))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda seconds, _: f"{seconds:g} s" if seconds < 60 else f"{seconds / 60:g} min")
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("from the command to the result, 2 cores, no GPU")
    axes.set_ylabel("test accuracy, JPEG copy of CIFAR-10")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_point(axes: Axes, result: dict[str, Any], label: str, color: str, marker: str) -> None:
    seconds, accuracy = result["seconds"], result["accuracy"]
    whiskers = [[[value["mean"] - value["least"]], [value["most"] - value["mean"]]] for value in (seconds, accuracy)]
    axes.errorbar(
        seconds["mean"], accuracy["mean"], xerr=whiskers[0], yerr=whiskers[1], fmt=marker, color=color, markersize=8,
        elinewidth=1.5, zorder=3,
    )  # fmt: skip
    is_ours = color == OURS
    axes.annotate(
        f"{label}: {accuracy['mean']:.1%}".replace("%", " %"),
        (seconds["mean"], accuracy["mean"]),
        xytext=(0, -14 if is_ours else 12),
        textcoords="offset points",
        ha="center",
        va="top" if is_ours else "bottom",
        color=color,
        fontweight="bold",
    )


def compute_figures_digest() -> str:
    """Compute a digest of the figures that the picture shows."""
    ours = {name: load_recipe_result(name) for name in RECIPES}
    figures = ours | {name: load_result(name)["baseline"] for name in BASELINES}
    shown = {name: [figure.get("seconds"), figure.get("accuracy")] for name, figure in figures.items()}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def main() -> None:
    """Draw and save."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    draw().savefig(PICTURE, metadata={"Description": compute_figures_digest()})


if __name__ == "__main__":
    main()
