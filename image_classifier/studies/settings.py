"""The settings of a sweep. Free of torch and of Optuna, as a command line is read before either is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from image_classifier.choices import Pruner, Search
from image_classifier.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How a sweep goes about it.

    Attributes:
        space: YAML file with the settings that are searched and what they may be (required).
        num_trials: Trials of the sweep; for a grid, all its points unless given.
        search: How settings are chosen: by TPE, at random, or all of a grid.
        pruner: Trials that are worse than those before them are ended: none, median, or hyperband.
        parallel: Trials that may be trained at once, by as many workers; it decides about the trials, the number of
            workers does not.
        max_failures: More trials that fail than these end the sweep.
        storage: Where the study lies: postgresql://USER@HOST/DATABASE, or sqlite:///FILE; by default a file in the
            experiment's folder.
        storage_pass_file: File with the storage's password, which may also be in DB_PASSWORD.
        refit: Train the best settings on all training images, with so many seeds, when the search is done.
    """

    space: Path
    num_trials: int | None = None
    search: Search = "tpe"
    pruner: Pruner = "none"
    parallel: int = 1
    max_failures: int = 3
    storage: str | None = None
    storage_pass_file: Path | None = None
    refit: int = 0

    def __post_init__(self) -> None:
        for name, least in {"num_trials": 1, "parallel": 1, "max_failures": 0, "refit": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"--{name} takes a whole number of {least} or more, got: {value}")
        if self.num_trials is None and self.search != "grid":
            raise SettingsError("--num_trials must be given: how many trials the sweep has")
