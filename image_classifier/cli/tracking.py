"""A run written to MLflow too, while it goes on: `--tracking_uri`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from image_classifier.errors import Interrupted, RegistryError
from image_classifier.progress import say
from image_classifier.reporter import Reporter
from image_classifier.settings import RunSettings
from image_classifier.tracking.layout import CHECKPOINTS, MANIFEST, list_run_files
from image_classifier.tracking.reading import read_epochs, read_evaluation
from image_classifier.tracking.store import Store

TEST_METRICS = ("accuracy", "accuracy_single_view", "top5_accuracy", "loss", "expected_calibration_error")
"""Numbers of the evaluation that are written beside those of the epochs."""

_PAUSE = 10
"""A store that did not answer is left alone for so many times as long as was waited: a tenth of the time at most."""

logger = logging.getLogger(__name__)

_STARTED_AT = "image_classifier.started_at"
"""The tag by which a resumed run is found again."""


@contextmanager
def open_tracker(settings: RunSettings) -> Iterator[Reporter]:
    """Yield a reporter that writes to the store of the settings, if they name one; at the end the files follow.

    A store that cannot be reached before the first step stops the run there. One that is lost on the way does not:
    what it missed is written at the end.

    Raises:
        RegistryError: the store cannot be reached, before the first step or after the last.
    """
    if settings.tracking_uri is None:
        yield Reporter()
        return
    tracker = Tracker(settings)
    try:
        yield tracker
    except BaseException as error:
        tracker.end("KILLED" if isinstance(error, KeyboardInterrupt | Interrupted) else "FAILED")
        raise
    try:
        tracker.finish()
    except RegistryError as error:
        raise RegistryError(f"{settings.run_folder} is finished and complete; MLflow's copy is not: {error}") from error


class Tracker(Reporter):
    """Tells MLflow of settings, epochs and, at the end, files."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._store = Store(settings.tracking_uri, settings.experiments_folder)
        self._run_id: str | None = None
        self._next_try = 0.0  # of the clock that only goes forward
        self._num_logged = 0
        with self._store.open(f"open the experiment {settings.experiment_name!r}"):
            self._experiment_id = self._store.get_experiment_id(settings.experiment_name)

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        tags = {"recipe": record["recipe"] or "none", _STARTED_AT: record["started_at"]}
        tags |= {f"{part}_digest": record[part]["digest"] for part in ("data", "code", "environment", "machine")}
        with self._store.open("begin the run") as client:
            query = f"tags.`{_STARTED_AT}` = '{record['started_at']}'"
            runs = client.search_runs([self._experiment_id], query) if first_step else []
            found = [run for run in runs if run.info.run_name == record["run_name"]]
            if found:
                self._run_id = found[0].info.run_id
                client.set_terminated(self._run_id, "RUNNING")
            else:
                run = client.create_run(self._experiment_id, run_name=record["run_name"], tags=tags)
                self._run_id = run.info.run_id
            for name, value in record["settings"].items():
                client.log_param(self._run_id, name, value)

    def epoch(self, line: dict[str, Any]) -> None:
        started = time.monotonic()
        if started < self._next_try:
            return
        try:
            self._log_epochs()
        except RegistryError as error:
            logger.warning("%s; the training goes on, and what is missing there is written at its end", error)
            ended = time.monotonic()
            self._next_try = ended + _PAUSE * (ended - started)

    def end(self, status: str) -> None:
        """Say how the run ended, as far as the store listens."""
        if self._run_id is not None:
            try:
                with self._store.open("end the run") as client:
                    client.set_terminated(self._run_id, status)
            except RegistryError as error:
                say(f"note: {error}")

    def finish(self) -> None:
        """Write what is still missing, the evaluation and the files.

        Raises:
            RegistryError: the store cannot be reached.
        """
        folder = self._settings.run_folder
        evaluation = read_evaluation(folder)
        if self._run_id is None:  # the run was finished before it was resumed
            return
        self._log_epochs()
        with self._store.open("write the results") as client:
            for name in TEST_METRICS:
                client.log_metric(self._run_id, f"test_{name}", evaluation[name])
            for file in [MANIFEST, *list_run_files(folder)]:
                if not file.startswith(f"{CHECKPOINTS}/"):
                    client.log_artifact(self._run_id, str(folder / file))
            client.set_terminated(self._run_id, "FINISHED")

    def _log_epochs(self) -> None:
        lines = read_epochs(self._settings.run_folder)
        with self._store.open("write the metrics") as client:
            for line in lines[self._num_logged :]:
                for name, value in line.items():
                    if isinstance(value, float):
                        client.log_metric(self._run_id, name, value, step=line["epoch"])
                self._num_logged += 1
