"""The content of the flow's cards: pictures and metrics of each step, as Metaflow card components."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaflow.cards import Image, Markdown, Table

from image_classifier.text import make_printable
from image_classifier.tracking.layout import FIGURE

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from image_classifier.data.snapshot import Snapshot

Picture = tuple[str, bytes]
"""A caption, which may be empty, and a PNG."""


def build_card(title: str, values: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> list[Any]:
    """Build a card's components: a title, the values that are plain, by name, and pictures."""
    plain = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    rows = [[name.replace("_", " "), format_value(value)] for name, value in plain.items()]
    return [Markdown(f"# {title}"), Table(rows), *(Image(picture, label=caption) for caption, picture in pictures)]


def format_value(value: Any) -> str:
    """Format a value for a card."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else make_printable(str(value))


def read_figure(run: str) -> list[Picture]:
    """Read the figure of a run's folder, if it has one: a trial that was pruned has none."""
    path = Path(run) / FIGURE
    return [(run, path.read_bytes())] if path.is_file() else []


def draw_data(snapshot: Snapshot) -> list[Picture]:
    """Draw the data set."""
    from image_classifier.visualization.dataset_sheet import draw_dataset_sheet

    return [(snapshot.name, draw_dataset_sheet(snapshot))]


def draw_sweep(told: Sequence[FrozenTrial], names: Sequence[str]) -> list[Picture]:
    """Draw Optuna's plots of a sweep; those that need two complete trials are left out where there are none."""
    import optuna
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    from image_classifier.studies.page import ACCURACY
    from image_classifier.studies.plan import DIRECTION

    study = optuna.create_study(direction=DIRECTION)
    study.add_trials(told)
    if sum(trial.state is optuna.trial.TrialState.COMPLETE for trial in told) < 2:
        return []
    draws: list[Callable[[], Any]] = [
        lambda: plots.plot_optimization_history(study, target_name=ACCURACY),
        lambda: plots.plot_param_importances(study, target_name=ACCURACY),
        lambda: plots.plot_parallel_coordinate(study, params=list(names), target_name=ACCURACY),
        lambda: plots.plot_slice(study, params=list(names), target_name=ACCURACY),
    ]
    drawn = []
    for draw in draws:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the functions are experimental, and too few trials for a plot
            draw()
            buffer = io.BytesIO()
            pyplot.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
            pyplot.close("all")
        drawn.append(("", buffer.getvalue()))  # the plots have titles
    return drawn
