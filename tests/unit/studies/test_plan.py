from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from image_classifier.choices import Pruner, Search
from image_classifier.studies.plan import Plan, build_trial, find_best
from image_classifier.studies.space import Parameter, Space

SPACE = Space(
    (
        Parameter(name="flip", choices=("none", "random")),
        Parameter(name="learning_rate", low=0.01, high=1.0, log=True),
        Parameter(name="translate", low=0, high=4),
    )
)
GRID = Space((*SPACE.parameters[::2], Parameter(name="learning_rate", choices=(0.01, 0.03, 0.1, 0.3, 1.0))))


def make_plan(search: Search = "tpe", pruner: Pruner = "none", num_parallel: int = 1, seed: int = 0) -> Plan:
    return Plan(GRID if search == "grid" else SPACE, search, pruner, seed, num_parallel, num_epochs=9)


def play(plan: Plan, num_trials: int) -> list[FrozenTrial]:
    """Carry a plan out in a world where the best learning rate is 0.1, epoch after epoch."""
    told: list[FrozenTrial] = []
    for number in range(num_trials):
        planned = plan.begin(number, plan.get_visible(number, told))
        best = 0.9 - 0.2 * abs(math.log10(planned.labels["learning_rate"]) + 1)
        accuracies, state = [], "COMPLETE"
        for epoch in range(1, 10):
            accuracies.append(best * (1 - 0.5**epoch))
            if epoch < 9 and planned.report(epoch, accuracies[-1]):
                state = "PRUNED"
                break
        now = datetime(2026, 1, 2).isoformat()
        result = {"state": state, "value": accuracies[-1], "system_attrs": planned.system_attrs, "user_attrs": {}}
        entry = {"labels": planned.labels, "accuracies": accuracies, "started_at": now}
        trial = build_trial(plan.space, {**entry, "result": {**result, "ended_at": now}})
        trial.number = number
        told.append(trial)
    return told


def get_facts(told: list[FrozenTrial]) -> list[Any]:
    return [(trial.params, trial.state, trial.intermediate_values, trial.system_attrs) for trial in told]


@pytest.mark.parametrize("search", ["tpe", "random", "grid"])
@pytest.mark.parametrize("pruner", ["none", "median", "hyperband"])
def test_the_same_plan_gives_the_same_trials(search: Search, pruner: Pruner) -> None:
    told = play(make_plan(search, pruner, num_parallel=2), 16)
    assert get_facts(told) == get_facts(play(make_plan(search, pruner, num_parallel=2), 16))
    assert (pruner != "none") == any(trial.state is TrialState.PRUNED for trial in told)


def test_a_trial_is_drawn_from_what_it_may_see_alone() -> None:
    plan = make_plan(num_parallel=3)
    told = play(plan, 16)
    for number in range(16):
        seen = told[: max(0, number - 2)]
        assert plan.begin(number, seen).labels == plan.begin(number, told).labels == told[number].params


def test_seed_and_parallel_decide_about_the_trials() -> None:
    facts = [get_facts(play(plan, 14)) for plan in (make_plan(), make_plan(seed=1), make_plan(num_parallel=4))]
    assert facts[0] != facts[1] and facts[0] != facts[2]


def test_tpe_learns_from_what_it_sees() -> None:
    told = play(make_plan(), 40)
    means = [sum(trial.value or 0 for trial in part) / 10 for part in (told[:10], told[30:])]
    assert means[1] > means[0] + 0.05


def test_the_grid_is_walked_in_its_order() -> None:
    space = Space((Parameter(name="flip", choices=("none", "random")), Parameter(name="translate", low=0, high=2)))
    plan = Plan(space, "grid", "none", 0, 1, 1)
    assert [tuple(plan.begin(number, []).labels.values()) for number in range(space.count())] == [
        (flip, translate) for flip in ("none", "random") for translate in (0, 1, 2)
    ]


def test_the_best_is_the_first_of_those_that_came_to_their_end() -> None:
    states = [(0.5, "COMPLETE"), (0.9, "PRUNED"), (0.7, "COMPLETE"), (0.7, "COMPLETE")]
    told = []
    for number, (value, state) in enumerate(states):
        trial = optuna.create_trial(state=TrialState[state], value=value)
        trial.number = number
        told.append(trial)
    best = find_best(told)
    assert best is not None and best.number == 2
    assert find_best(told[1:2]) is None
