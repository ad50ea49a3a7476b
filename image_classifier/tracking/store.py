"""The MLflow store: runs and models of a team's server, or of a SQLite file under the experiments folder.

This module and `publishing/registry.py` alone import mlflow, which the extra `tracking` brings; the small build of it
without servers is enough.
"""

from __future__ import annotations

import fcntl
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from image_classifier.config import check_tracking_uri
from image_classifier.errors import ImageClassifierError, RegistryError
from image_classifier.extras import load_extra

EMBEDDED = ".mlflow"
"""Folder under the experiments folder, which no experiment can be called."""

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own 7 wait for minutes where nothing answers
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Store:
    """A client of an MLflow store, all of whose errors are one line.

    Args:
        uri: of the store; None for the embedded one.
        experiments_folder: that the embedded one lies under.

    Attributes:
        client: `mlflow.MlflowClient`.
        uri: of the store.

    Raises:
        SettingsError: the URI holds a password, or mlflow is not installed.
    """

    def __init__(self, uri: str | None, experiments_folder: Path) -> None:
        if uri is not None:
            check_tracking_uri(uri)
        self._folder = None if uri else experiments_folder / EMBEDDED
        self.uri = uri or f"sqlite:///{(experiments_folder / EMBEDDED / 'mlflow.db').resolve()}"
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it logs each try, and the last one is what counts
        self._mlflow = load_extra("mlflow", "tracking")
        if uri is None or not uri.startswith("http"):
            load_extra("alembic", "tracking")
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The client; made on first use, which makes the embedded store if there is none."""
        if self._client is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._client = self._mlflow.MlflowClient(self.uri, self.uri)
        return self._client

    @contextmanager
    def open(self, action: str) -> Iterator[Any]:
        """Yield the client; to the embedded store, one process after the other.

        Args:
            action: what is being done, for the message: "list the models".

        Raises:
            RegistryError: the store cannot be reached, or refuses.
        """
        try:
            with self._locked(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # mlflow's, of what SQLAlchemy will remove
                yield self.client
        except ImageClassifierError:
            raise
        except Exception as error:  # mlflow's, requests', SQLAlchemy's
            raise RegistryError(f"cannot {action} at {self.uri}: {_explain(error)}") from error

    def get_experiment_id(self, name: str) -> str:
        """Get the number of an experiment, which is made if there is none; call it while the store is open."""
        client = self.client
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            location = None if self._folder is None else (self._folder / "artifacts").resolve().as_uri()
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except self._mlflow.exceptions.MlflowException:  # another one was faster
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise RegistryError(
                f"the experiment {name!r} was deleted at {self.uri}; restore it there, or choose another"
            )
        return str(experiment.experiment_id)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self._folder is None:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _explain(error: Exception) -> str:
    """The first line of what went wrong, which is the one for people."""
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else type(error).__name__
    if "Max retries exceeded" in text or "Connection refused" in str(error):
        text = "nothing answers there"
    return f"{text}; check --tracking_uri"
