"""The steps of the flow: they take and return paths, digests and plain values, which Metaflow stores.

What is trained lies in run folders, as everywhere in this package. A step that is computed again finds there what an
interrupted attempt has left, and goes on with it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_classifier.cli.signals import StopRequest
from image_classifier.cli.sweep import PAGE, Search, Trials, check_judging, load_data, prepare_search, write_findings
from image_classifier.cli.train import complete_settings, settle_weights
from image_classifier.errors import DataError, ImageClassifierError, RunBusyError, RunError, SettingsError
from image_classifier.logs import set_log_level
from image_classifier.progress import say, shown
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.storage import temporary_files_beside
from image_classifier.text import make_printable
from image_classifier.workflow.base import Figure
from image_classifier.workflow.document import Document

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from image_classifier.data.snapshot import Snapshot
    from image_classifier.experiment import RunResult

Values = dict[str, Any]
"""Paths as text, digests and plain values by name."""

_ON_ALL_IMAGES: Any = {"validation_fraction": 0.0, "keep": "last", "early_stopping": 0}
"""What settings that were found are trained with: all training images, to the last epoch."""
_POLL_S = 1.0


@contextmanager
def computing(error: type[Exception]) -> Iterator[StopRequest]:
    """Compute a step within the block: with its progress shown, and signals heard.

    Args:
        error: is raised with the message of an expected error, in its place.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        set_log_level("WARNING")
        with shown("workflow"), StopRequest() as stop:
            yield stop
    except ImageClassifierError as expected:
        raise error(make_printable(str(expected))) from expected


def take_snapshot(document: Document) -> tuple[Values, Snapshot]:
    """Load the data by the workflow's class, and freeze it.

    Raises:
        ImageClassifierError: it cannot be loaded, or a sweep has no images to be judged on.
    """
    folder: Any = document.workflow.load_data()
    if not isinstance(folder, str | Path):
        raise SettingsError(f"load_data must return a path, as --dataset_folder takes it, got: {type(folder).__name__}")
    data: Values = {"dataset_folder": str(folder), "database": document.training.get("database")}
    values = settle_values(document, data)
    run, snapshot = load_data(values)
    if document.sweep is not None:
        check_judging(snapshot, values)
    data |= {"dataset_folder": str(run.dataset_folder), "database": snapshot.database}
    numbers = {name: getattr(snapshot, name) for name in ("num_train", "num_validation", "num_test")}
    return {**data, "name": snapshot.name, "digest": snapshot.digest, **numbers}, snapshot


def settle_values(document: Document, data: Values) -> Values:
    """Settle the options of the trainer, with the data set that was taken; torch has its instruction set then."""
    values = complete_settings(_give(document, data))

    from image_classifier.training.determinism import cap_instruction_set

    # before anything imports torch
    cap_instruction_set(values.get("instruction_set", TrainingSettings.instruction_set))
    return settle_weights(values)


def _give(document: Document, data: Values) -> Values:
    place = {"dataset_folder": Path(data["dataset_folder"]), "database": data["database"]}
    return {**document.training, **place}


def _check_same(snapshot: Snapshot, data: Values) -> None:
    if snapshot.digest != data["digest"]:
        raise DataError(
            f"{data['dataset_folder']} has changed since the snapshot: its digest was {data['digest'][:12]}, is "
            f"{snapshot.digest[:12]}; restore it, or start a new run of the flow"
        )


def open_search(document: Document, data: Values, stop: StopRequest, runs: list[str] | None = None) -> Search:
    """Open the sweep, whose trials the workflow's class trains.

    Args:
        runs: gets the folders of the runs that are trained here.
    """
    assert document.sweep is not None and document.space is not None

    def train(settings: RunSettings, **how: Any) -> RunResult:
        if runs is not None:
            runs.append(str(settings.run_folder))
        return document.workflow.train(settings, **how)

    given = _give(document, data)
    search = prepare_search(document.sweep, document.space, given, document.command, stop, train=train)
    _check_same(search.common["snapshot"], data)
    return search


def train_trial(document: Document, data: Values, stop: StopRequest) -> list[str]:
    """Train the next trial that nobody has taken; return the folder of its run, or none where none is left.

    Raises:
        ImageClassifierError: the sweep cannot go on.
    """
    runs: list[str] = []
    search = open_search(document, data, stop, runs)
    with temporary_files_beside(search.experiment / "trial"):
        search.train(most=1)
    return runs


def find_winner(document: Document, data: Values, stop: StopRequest) -> tuple[Values, list[FrozenTrial]]:
    """Train the trials that are left of those that were killed, and find the best one; write the page about all.

    Raises:
        ImageClassifierError: the sweep cannot go on, or no trial came to its end.
    """
    search = open_search(document, data, stop)
    with temporary_files_beside(search.experiment / "trial"):
        told = list(search.train())
        best = write_findings(search, told)
    winner = {"trial": best.number, "validation_accuracy": best.value, "run": best.user_attrs["run"]}
    return {**winner, "page": str(search.experiment / PAGE), "settings": dict(best.params)}, told


def train(document: Document, data: Values, found: Mapping[str, Any], stop: StopRequest) -> Values:
    """Train the run that becomes the model, or go on with it; with what a sweep has found on all training images.

    Args:
        found: the settings of the best trial, as Optuna knows them; empty where nothing was searched.

    Raises:
        ImageClassifierError: it cannot be trained, or is not the run that was begun.
    """
    _, snapshot = load_data(settle_values(document, data))
    _check_same(snapshot, data)
    trials = Trials(_give(document, data), snapshot)
    searched = document.space.get_values(found) if document.space else {}

    def build() -> RunSettings:
        settings = trials.build(searched, document.training["run_name"])
        if document.sweep is None:
            return settings
        return replace(settings, training=replace(settings.training, **_ON_ALL_IMAGES))

    result = _train(document, build(), snapshot, stop)
    while result is None:  # an attempt whose flow was killed may still be at it
        time.sleep(_POLL_S)
        result = _train(document, build(), snapshot, stop)
    return {"folder": str(result.folder), "weights_digest": result.weights_digest}


def _train(document: Document, settings: RunSettings, snapshot: Snapshot, stop: StopRequest) -> RunResult | None:
    """Train a run; None while another process trains it."""
    from image_classifier.cli.progress import TerminalReporter
    from image_classifier.cli.tensorboard import open_board
    from image_classifier.cli.tracking import open_tracker
    from image_classifier.reporter import Reporters
    from image_classifier.tracking.reading import read_record

    known = snapshot if snapshot.image_size == settings.training.image_size else None
    try:
        with (
            temporary_files_beside(settings.run_folder),
            closing(TerminalReporter(stop)) as terminal,
            open_tracker(settings) as tracker,
            open_board(settings) as board,
        ):
            result = document.workflow.train(
                settings,
                snapshot=known,
                reporter=Reporters(terminal, tracker, board),
                should_stop=stop.is_set,
                command=document.command,
            )
    except RunBusyError:
        return None
    trained_on = read_record(result.folder)["data"]["digest"]
    if known is not None and trained_on != known.digest:  # one that was finished before is taken as it is
        raise RunError(
            f"{result.folder} was trained on data with the digest {trained_on[:12]}, which is {known.digest[:12]} now; "
            "choose another run_name"
        )
    return result


def evaluate(document: Document, run: Path) -> dict[str, Figure]:
    """Evaluate a run by the workflow's class.

    Raises:
        ImageClassifierError: it cannot be evaluated.
    """
    figures = dict(document.workflow.evaluate(run))
    for name, value in figures.items():
        if type(value) not in (float, int, str):
            raise SettingsError(
                f"evaluate must return a dictionary of numbers and strings, got for {name!a}: {type(value).__name__}"
            )
    return figures


def save(document: Document, run: Path) -> str:
    """Save a run by the workflow's class.

    Raises:
        ImageClassifierError: it cannot be saved.
    """
    with temporary_files_beside(run / "published"):
        folder: Any = document.workflow.save(run)
    if not isinstance(folder, str | Path) or not Path(folder).exists():
        raise SettingsError(f"save must return the path of the saved model, got: {str(folder)[:100]!a}")
    return str(folder)


def promote(document: Document, data: Values, published: Path) -> Values | None:
    """Register a published model, unless it is registered, and promote it; None where the file promotes nothing.

    Raises:
        ImageClassifierError: the registry cannot be reached, or the model is not to be promoted.
    """
    asked = document.promote
    if asked is None:
        return None

    from image_classifier.published.folder import find_published, read_manifest
    from image_classifier.published.policy import load_policy
    from image_classifier.publishing.registry import Proof, Registry

    run = RunSettings(**{name: value for name, value in _give(document, data).items() if name in _OF_RUN})
    proof = Proof(
        public_key=asked.public_key,
        dataset_folder=run.dataset,
        access=run.database_access,
        skip_bad=run.skip_bad,
        policy=load_policy(asked.policy) if asked.policy else None,
        say=say,
    )
    registry = Registry(asked.tracking_uri, run.experiments_folder)
    folder = find_published(published)
    manifest = read_manifest(folder)
    name = asked.name or manifest["experiment_name"]
    known = [version for version in registry.list() if version.name == name]
    same = [version for version in known if version.tags.get("manifest_digest") == manifest["digest"]]
    version = same[-1] if same else registry.add(folder, name, proof=proof)
    promotion = registry.promote(
        f"{name}/{version.number}", alias=asked.alias, allow_loss=asked.allow_loss, proof=proof
    )
    figures = {"former": promotion.former, "difference": promotion.difference, "p_value": promotion.p_value}
    return {"name": name, "version": promotion.number, "alias": promotion.alias, **figures}


_OF_RUN = RunSettings.__dataclass_fields__.keys() - {"training"}
