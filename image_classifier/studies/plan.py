"""A trial's settings and pruning, as functions of the search space, the seed, and the trials that it may see.

Trial n sees the trials up to n - K, where K is how many may be trained at once. Whoever computes what it does finds the
same: an Optuna study in memory is made anew of what the trial sees, with a sampler seeded by its number.
Nothing is shared between two trials, and nothing depends on the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from image_classifier.choices import Pruner, Search
from image_classifier.studies.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of each study that is made

DIRECTION = StudyDirection.MAXIMIZE
_NAME = "sweep"
"""Of the study in memory: Hyperband assigns brackets by it, and the name that a user chose is no part of the plan."""


@dataclass(frozen=True)
class Plan:
    """What decides the trials of a sweep.

    Attributes:
        num_parallel: K, trials that may be trained at once.
        num_epochs: the most that a trial has.
    """

    space: Space
    search: Search
    pruner: Pruner
    seed: int
    num_parallel: int
    num_epochs: int

    def get_visible(self, number: int, told: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """Get the trials that a trial may see, of those that are told."""
        return told[: max(0, number - self.num_parallel + 1)]

    def begin(self, number: int, told: Sequence[FrozenTrial]) -> Planned:
        """Draw a trial.

        Args:
            told: the trials from number 0 on that have come to an end, with all that the trial may see.
        """
        study = optuna.create_study(
            study_name=_NAME, direction=DIRECTION, sampler=self._build_sampler(number), pruner=self._build_pruner()
        )
        study.add_trials(self.get_visible(number, told))
        for _ in range(number - len(study.get_trials(deepcopy=False))):  # so that the trial has its number here too
            study.add_trial(optuna.create_trial(state=TrialState.FAIL))
        if self.search == "grid":
            return Planned(study, study.ask(), self.space.get_point(number))
        trial = study.ask(self.space.distributions)
        return Planned(study, trial, self.space.round(trial.params))

    def _build_sampler(self, number: int) -> BaseSampler:
        (seed,) = np.random.SeedSequence([self.seed, number]).generate_state(1)
        return TPESampler(seed=int(seed)) if self.search == "tpe" else RandomSampler(seed=int(seed))

    def _build_pruner(self) -> BasePruner:
        if self.pruner == "median":
            return MedianPruner()
        if self.pruner == "hyperband":
            return HyperbandPruner(max_resource=self.num_epochs)
        return NopPruner()


class Planned:
    """A trial that is drawn.

    Attributes:
        labels: what was drawn, as Optuna knows it.
    """

    def __init__(self, study: optuna.Study, trial: optuna.Trial, labels: dict[str, Any]) -> None:
        self._study = study
        self._trial = trial
        self.labels = labels

    def report(self, epoch: int, accuracy: float) -> bool:
        """Report the validation accuracy after an epoch; say whether the trial is to be pruned."""
        self._trial.report(accuracy, epoch)
        return self._trial.should_prune()

    @property
    def system_attrs(self) -> dict[str, Any]:
        """What a pruner remembers of the trial, for the trials that see it."""
        trial = self._study.get_trials(deepcopy=False)[self._trial.number]
        return {key: value for key, value in trial.system_attrs.items() if key.startswith("completed_rung_")}


def build_trial(space: Space, entry: dict[str, Any]) -> FrozenTrial:
    """Build the trial that is told, of what was written down of it."""
    result = entry["result"]
    trial = optuna.create_trial(
        state=TrialState[result["state"]],
        value=result["value"],
        params=entry["labels"],
        distributions=space.distributions,
        user_attrs=result["user_attrs"],
        system_attrs=result["system_attrs"],
        intermediate_values=dict(enumerate(entry["accuracies"], 1)),
    )
    trial.datetime_start = datetime.fromisoformat(entry["started_at"])
    trial.datetime_complete = datetime.fromisoformat(result["ended_at"])
    return trial


def find_best(told: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Find the trial with the best validation accuracy of those that came to their end; the first of equal ones."""
    complete = [trial for trial in told if trial.state is TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)
