"""A page about a sweep: a single HTML file with Optuna's plots, which works offline."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import (
    plot_optimization_history,
    plot_parallel_coordinate,
    plot_param_importances,
    plot_slice,
)
from plotly.offline import get_plotlyjs

from image_classifier.studies.plan import DIRECTION, find_best
from image_classifier.studies.space import Space

ACCURACY = "validation accuracy"


def build_page(
    title: str,
    facts: Mapping[str, str],
    space: Space,
    told: Sequence[FrozenTrial],
    refits: Sequence[tuple[int, float]] = (),
) -> str:
    """Build the page. All names and values on it are escaped.

    Args:
        facts: about the sweep, in words by name.
        refits: seed and test accuracy of each run of the best settings on all training images.
    """
    template = Template(resources.files(__package__).joinpath("sweep.html").read_text(encoding="utf-8"))
    best = find_best(told)
    figures = {
        "best validation accuracy": "–" if best is None or best.value is None else format_percentage(best.value),
        "best trial": "–" if best is None else str(best.number),
        **{f"trials {name}": str(sum(trial.state is state for trial in told)) for name, state in _STATES.items()},
    }
    if refits:
        figures["test accuracy of the best settings, refitted"] = describe_spread([value for _, value in refits])
    return template.substitute(
        title=escape(title),
        script=get_plotlyjs(),
        figures=_build_list(figures),
        facts=_build_list(facts),
        best=_build_list({} if best is None else {name: _format(best.params[name]) for name in best.params}),
        plots="\n".join(_build_plots(space, told)),
        trials="\n".join(_build_row(space, trial) for trial in told),
        heading="".join(f"<th>{escape(parameter.name)}</th>" for parameter in space.parameters),
        refits=_build_refits(refits),
    )


_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_NAMES = {state: name for name, state in _STATES.items()}


def describe_spread(values: Sequence[float]) -> str:
    """Describe accuracies by their mean and standard deviation."""
    spread = f" ± {100 * statistics.stdev(values):.2f} %" if len(values) > 1 else ""
    return f"{format_percentage(statistics.fmean(values))}{spread}"


def format_percentage(fraction: float) -> str:
    """Format a fraction in percent."""
    return f"{100 * fraction:.2f} %"


def _build_plots(space: Space, told: Sequence[FrozenTrial]) -> list[str]:
    """Build Optuna's plots; what Optuna has doubts about stands with each."""
    study = optuna.create_study(direction=DIRECTION)
    study.add_trials(told)
    names = [parameter.name for parameter in space.parameters]
    plots: dict[str, Callable[[], Any]] = {
        "History": lambda: plot_optimization_history(study, target_name=ACCURACY),
        "Importance of the settings": lambda: plot_param_importances(study, target_name=ACCURACY),
        "Parallel coordinates": lambda: plot_parallel_coordinate(study, params=names, target_name=ACCURACY),
        "Slices": lambda: plot_slice(study, params=names, target_name=ACCURACY),
    }
    is_enough = sum(trial.state is TrialState.COMPLETE for trial in told) > 1
    parts = []
    for number, (title, plot) in enumerate(plots.items()):
        content = '<p class="muted">There is no such plot: it takes two complete trials at least.</p>'
        if is_enough:
            with warnings.catch_warnings(record=True) as doubts:
                warnings.simplefilter("always")
                figure = plot()
            figure.update_layout(title=None, template="plotly_white", margin={"t": 30})
            notes = "".join(f'<p class="muted">{escape(str(doubt.message))}</p>' for doubt in doubts)
            content = notes + figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot-{number}")
        parts.append(f"<section><h2>{title}</h2>{content}</section>")
    return parts


def _build_row(space: Space, trial: FrozenTrial) -> str:
    values = "".join(f"<td>{escape(_format(trial.params.get(parameter.name)))}</td>" for parameter in space.parameters)
    error = trial.user_attrs.get("error", "")
    accuracy = "–" if trial.value is None else format_percentage(trial.value)
    return (
        f'<tr><th scope="row">{trial.number}</th><td>{_NAMES[trial.state]}</td><td class="number">{accuracy}</td>'
        f'<td class="number">{len(trial.intermediate_values)}</td>{values}'
        f'<td>{escape(str(trial.user_attrs.get("run", error)))}</td></tr>'
    )


def _build_refits(refits: Sequence[tuple[int, float]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{seed}</th><td class="number">{format_percentage(value)}</td></tr>'
        for seed, value in refits
    )
    if not rows:
        return ""
    return (
        "<section><h2>The best settings on all training images</h2><table><thead><tr><th>seed</th>"
        f'<th class="number">test accuracy</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )


def _build_list(values: Mapping[str, str]) -> str:
    return "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
