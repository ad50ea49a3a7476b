"""Entries of the leaderboard: a run folder, the clock beside it, and what both must stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import PROJECT, describe_origin, measure_command
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import ImageClassifierError
from image_classifier.files import check_form, load_json
from image_classifier.recipe import RECIPES
from image_classifier.settings import TrainingSettings
from image_classifier.tracking.checking import verify_files
from image_classifier.tracking.reading import (
    read_epochs,
    read_evaluation,
    read_manifest,
    read_predictions,
    read_record,
)
from image_classifier.tracking.record import describe_settings

CLOCK = ".clock.json"
"""What the name of a run's clock ends with. It lies beside the run folder, which its manifest closes."""

FORM = {
    "format_version": int,
    "seconds": float,
    "manifest_digest": str,
    "processor": str,
    "cores": int,
    "measured_at": str,
}

LEAST_OF_AGAIN = 0.5
"""A clock below this part of the seconds that verifying takes on an equal machine is not believed. Verifying takes a
little longer than training, and neither of two runs on one machine takes twice as long as the other."""


class Refused(Exception):
    """An entry is not accepted; the message says why."""


@dataclass(frozen=True)
class Row:
    """An entry that was accepted.

    Attributes:
        changes: of the recipe's settings.
        accuracy: computed from the predictions.
        views: of an image that these average.
        seconds: from the command to the finished folder, on the machine of the entry.
        seconds_again: that verifying took on the machine that accepted it.
    """

    recipe: str
    seed: int
    changes: dict[str, Any]
    accuracy: float
    views: str
    seconds: float
    seconds_again: float
    data: str
    data_digest: str
    num_train: int
    num_test: int
    instruction_set: str
    processor: str
    cores: int
    measured_at: str
    code_digest: str
    manifest_digest: str

    def to_json(self) -> dict[str, Any]:
        """Convert it to what JSON has."""
        return asdict(self)


def train_entry(folder: Path, dataset_folder: Path, recipe: str, seed: int, options: list[str]) -> Path:
    """Train a run by its command while the clock runs; return the run folder.

    The data set is read once before, so that no entry pays for a conversion that another one finds done.
    """
    load_snapshot(dataset_folder)
    run = folder / f"{recipe}-{seed}"
    place = f"--experiments_folder {folder.parent} --experiment_name {folder.name} --run_name {run.name}".split()
    command = [sys.executable, "-m", "image_classifier.main", *place, "--recipe", recipe, "--seed", str(seed)]
    measurement = measure_command([*command, "--dataset_folder", dataset_folder.resolve(), *options])
    clock = {"format_version": 1, "seconds": measurement.seconds, "manifest_digest": read_manifest(run)["digest"]}
    get_clock_path(run).write_text(json.dumps({**describe_origin(), **clock}, indent=2) + "\n", encoding="utf-8")
    return run


def get_clock_path(run: Path) -> Path:
    """Name the file with a run's clock."""
    return run.with_name(run.name + CLOCK)


def check_entry(run: Path, dataset_folder: Path) -> Row:
    """Check an entry, at last by training it again in a process of its own, and make its row.

    What the row says is what was checked, or what is here: names in a record are what their author likes.

    Raises:
        Refused: it breaks a rule.
    """
    try:
        clock = _read_clock(get_clock_path(run))
        if changed := verify_files(run):
            raise Refused(changed[0])
        record, manifest, snapshot = read_record(run), read_manifest(run), load_snapshot(dataset_folder)
        changes = _check_rules(record, snapshot)
        _check_clock(clock, manifest, sum(epoch["seconds"] for epoch in read_epochs(run)))
        accuracy = _compute_accuracy(run, snapshot)
    except ImageClassifierError as error:
        raise Refused(str(error)) from error
    seconds_again = _verify(run, dataset_folder)
    here, settings = describe_origin(), record["settings"]
    is_equal_machine = (clock["processor"], clock["cores"]) == (here["processor"], here["cores"])
    if is_equal_machine and clock["seconds"] < LEAST_OF_AGAIN * seconds_again:
        raise Refused(f"its clock says {clock['seconds']:.1f} s, and it takes {seconds_again:.1f} s on such a machine")
    return Row(
        recipe=record["recipe"],
        seed=settings["seed"],
        changes=changes,
        accuracy=accuracy,
        views=settings["views"],
        seconds=clock["seconds"],
        seconds_again=seconds_again,
        data=snapshot.name,
        data_digest=snapshot.digest,
        num_train=snapshot.num_train,
        num_test=snapshot.num_test,
        instruction_set=settings["instruction_set"],
        processor=clock["processor"],
        cores=clock["cores"],
        measured_at=clock["measured_at"],
        code_digest=record["code"]["digest"],
        manifest_digest=manifest["digest"],
    )


def _read_clock(path: Path) -> dict[str, Any]:
    try:
        clock: dict[str, Any] = load_json(path)
        check_form(clock, FORM)
    except (OSError, ValueError) as error:
        raise Refused(f"{path.name} is missing or damaged: {error}") from error
    if clock["format_version"] != 1:
        raise Refused(f"its clock has the format {clock['format_version']}; this script reads 1")
    if not all(re.fullmatch(r"[\w .:@+()/-]{1,100}", clock[name]) for name in ("processor", "measured_at")):
        raise Refused("its clock has a name of a processor, or a time, that is none")
    return clock


def _check_rules(record: dict[str, Any], snapshot: Snapshot) -> dict[str, Any]:
    """Check what the run is a run of; return in which settings it is not its recipe."""
    if record["pretrained"] is not None:
        raise Refused("it starts from weights that were trained before")
    if "changes" in record:
        raise Refused("it was resumed after a change of code, environment or machine")
    if record["data"]["digest"] != snapshot.digest:
        raise Refused(f"its data is {record['data']['digest'][:12]}; the leaderboard's is {snapshot.digest[:12]}")
    if record["recipe"] not in RECIPES:
        raise Refused(f"it names no recipe of the package; they are {', '.join(RECIPES)}")
    recipe = describe_settings(TrainingSettings.from_recipe(record["recipe"]))
    return {
        name: value
        for name, value in record["settings"].items()
        if name not in ("seed", "instruction_set") and value != recipe[name] and recipe[name] not in ("auto", 0)
    }


def _check_clock(clock: dict[str, Any], manifest: dict[str, Any], training_seconds: float) -> None:
    if clock["manifest_digest"] != manifest["digest"]:
        raise Refused("its clock is of another run")
    if clock["seconds"] <= 0 or clock["seconds"] < training_seconds:
        raise Refused(f"its clock says {clock['seconds']:.1f} s, and its steps alone took {training_seconds:.1f} s")


def _compute_accuracy(run: Path, snapshot: Snapshot) -> float:
    """Compute the accuracy anew, from the probabilities and the labels of the data set itself."""
    evaluation, (probabilities, labels) = read_evaluation(run), read_predictions(run)
    if not np.array_equal(labels, snapshot.test[1]):
        raise Refused("its predictions are not for the labels of the test set")
    accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    if accuracy != evaluation["accuracy"]:
        raise Refused(f"its accuracy is {accuracy:.4%}, and evaluation.json says {evaluation['accuracy']:.4%}")
    return accuracy


def _verify(run: Path, dataset_folder: Path) -> float:
    """Train the run again by `verify`, which must say IDENTICAL of all of it; return the seconds that it took."""
    words = ["verify", run.resolve(), "--dataset_folder", dataset_folder.resolve()]
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "image_classifier", *map(str, words)], cwd=PROJECT, capture_output=True, text=True
    )
    lines = result.stdout.splitlines() or ["no verdict"]
    if result.returncode != 0 or lines[0] != "IDENTICAL":
        reason = (lines[1:] or result.stderr.splitlines()[-1:] or [""])[0].strip()
        raise Refused(f"verify says {lines[0]}: {reason}")
    return round(time.perf_counter() - started, 3)
