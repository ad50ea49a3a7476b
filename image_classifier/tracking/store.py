"""The MLflow store: runs and models of a team's server, or of a SQLite file under the experiments folder.

This module and `publishing/registry.py` alone import mlflow, which the extra `tracking` brings; the small build of it
without servers is enough.

MLflow makes a SQLite file in some sixty steps, and whoever is killed between two of them leaves a file that MLflow
refuses from then on. So the file is made beside its place and moved there when it is whole.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from image_classifier.errors import ImageClassifierError, RegistryError, SettingsError
from image_classifier.extras import load_extra
from image_classifier.progress import track
from image_classifier.references import check_tracking_uri
from image_classifier.storage import DISK, Disk, lock, locked_folder, remove_leftovers, storage_error, written_beside

logger = logging.getLogger(__name__)

EMBEDDED = ".mlflow"
"""Folder under the experiments folder, which no experiment can be called."""
ARTIFACTS = "artifacts"
"""Folder with the files of runs and models, beside the SQLite file; MLflow's own choice is the current folder."""

_TIMEOUT_S = 10  # to wait for the connection to a database
_FRESH = {"alembic_version": 1, "experiments": 1, "workspaces": 1}
"""How many rows the tables of a new database have."""

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own 7 wait for minutes where nothing answers
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # its errors are ours to say
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Store:
    """A client of an MLflow store, all of whose errors are one line.

    Args:
        uri: of the store; None for the embedded one.
        experiments_folder: that the embedded one lies under.
        disk: the seam through which a new SQLite file is made.

    Attributes:
        client: `mlflow.MlflowClient`.
        uri: of the store.

    Raises:
        SettingsError: the URI holds a password, or mlflow is not installed.
    """

    def __init__(self, uri: str | None, experiments_folder: Path, disk: Disk = DISK) -> None:
        if uri is not None:
            check_tracking_uri(uri)
        self._folder = None if uri else experiments_folder / EMBEDDED
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it logs each try, and the last one is what counts
        self._mlflow = load_extra("mlflow", "tracking")
        self._artifacts: Path | None = None
        self._file: Path | None = None
        if uri is None or not uri.startswith("http"):
            load_extra("alembic", "tracking")
        self.uri = uri or _build_uri(experiments_folder / EMBEDDED / "mlflow.db")
        if not self.uri.startswith("http"):
            self._file = find_sqlite_file(self.uri)
            self._artifacts = (self._file.parent if self._file else experiments_folder / EMBEDDED) / ARTIFACTS
        self._disk = disk
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The client; made on first use, which makes the SQLite file if there is none."""
        if self._client is None:
            if self._file is not None:
                self._prepare_file(self._file)
            elif not self.uri.startswith("http"):
                _check_connection(self.uri)
            self._client = self._mlflow.MlflowClient(self.uri, self.uri)
        return self._client

    def _prepare_file(self, path: Path) -> None:
        """See that there is a whole SQLite file.

        Raises:
            StorageError: the disk refused; nothing is left of what was begun.
        """
        if _is_whole(path):
            remove_leftovers(path.parent, self._disk)
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                if self._folder is None:  # the embedded store is locked by now
                    stack.enter_context(locked_folder(path.parent))
                if not _is_whole(path):
                    self._make_file(path)
        except OSError as error:
            raise storage_error(path, error) from error

    def _make_file(self, path: Path) -> None:
        """Make a SQLite file with MLflow's tables, whole or not at all, perhaps in the place of a begun one."""
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        if path.exists() and path.stat().st_size:
            logger.warning("the MLflow database %s is incomplete and is created again", path)
        for suffix in ("-journal", "-wal", "-shm"):  # SQLite would take it for the new file's
            if (stale := path.with_name(f"{path.name}{suffix}")).exists():
                self._disk.remove(stale)
        with written_beside(path, self._disk, replace=path.exists()) as temporary:
            artifacts = (path.parent / ARTIFACTS).resolve().as_uri()
            store: Any = SqlAlchemyStore(  # type: ignore[no-untyped-call]  # no types there
                _build_uri(temporary), artifacts
            )
            store.engine.dispose()
            self._disk.sync(temporary)

    @contextmanager
    def open(self, action: str) -> Iterator[Any]:
        """Yield the client; to the embedded store, one process after the other.

        Args:
            action: what is being done, for the message: "list the models".

        Raises:
            RegistryError: the store cannot be reached, or refuses.
        """
        try:
            with track(f"MLflow: {action}"), self._locked(), warnings.catch_warnings():
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
            location = None if self._artifacts is None else self._artifacts.resolve().as_uri()
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
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise storage_error(self._folder, error) from error
        try:
            lock(descriptor, self._folder)
            yield
        finally:
            os.close(descriptor)


def _build_uri(path: Path) -> str:
    """Build the address of a SQLite file. MLflow takes it for a path, too, so no more is quoted than must be."""
    return "sqlite:///" + re.sub("[%?#]", lambda match: quote(match[0]), str(path.resolve()))


def find_sqlite_file(uri: str) -> Path | None:
    """Find the file of a SQLite store; None for a store of another kind, or one in memory.

    Raises:
        SettingsError: the URI is none.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ArgumentError, ValueError) as error:
        raise SettingsError(f"--tracking_uri is not a database URL: {error}") from error
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)) if is_file and not str(url.database).startswith("file:") else None


def _is_whole(path: Path) -> bool:
    """Say whether a SQLite file is more than the beginning of one of MLflow's.

    What holds a run, a model, or a table that is not MLflow's is for MLflow to judge.

    Raises:
        RegistryError: it cannot be read.
    """
    if not path.exists() or not path.stat().st_size:
        return False
    try:
        # To write, too: what a killed process left of a transaction is rolled back by the first look.
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", timeout=60, uri=True)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for name in names:
                num_fresh = _FRESH.get(name, 0)
                rows = connection.execute(f'SELECT 1 FROM "{name}" LIMIT {num_fresh + 1}')  # nosec B608
                if len(rows.fetchall()) > num_fresh:
                    return True
            if names - _list_tables():
                return True
            if "alembic_version" not in names:
                return False
            (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone() or (None,)
            return bool(revision == _find_newest_revision())
    except sqlite3.Error as error:  # which MLflow would meet ten times, and wait between for two minutes
        raise RegistryError(
            f"{path} cannot be read as a SQLite database: {error}; check the disk, or restore it from a backup"
        ) from error


def _check_connection(uri: str) -> None:
    """Connect to a database once: MLflow tries ten times where nothing answers, for two minutes."""
    from sqlalchemy import create_engine, make_url

    options = {"connect_timeout": _TIMEOUT_S} if make_url(uri).get_backend_name() in ("postgresql", "mysql") else {}
    os.environ.setdefault("PGCONNECT_TIMEOUT", str(_TIMEOUT_S))  # for the connections that MLflow makes
    engine = create_engine(uri, connect_args=options)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _list_tables() -> set[str]:
    """List the tables that MLflow has, or has while it makes them."""
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.model_registry.dbmodels import models as _models  # noqa: F401  # adds its tables to the base
    from mlflow.store.tracking.dbmodels import initial_models
    from mlflow.store.tracking.dbmodels import models as _tracked  # noqa: F401

    names = {*Base.metadata.tables, *initial_models.Base.metadata.tables}
    return {"alembic_version", "sqlite_sequence", *names, *(f"_alembic_tmp_{name}" for name in names)}


def _find_newest_revision() -> str | None:
    """Find the migration that brings MLflow's tables up to date."""
    from alembic.script import ScriptDirectory

    package = Path(str(load_extra("mlflow", "tracking").__file__)).parent
    return ScriptDirectory(str(package / "store" / "db_migrations")).get_current_head()


def _explain(error: Exception) -> str:
    """The first line of what went wrong, which is the one for people."""
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else type(error).__name__
    if "disk is full" in text or "disk I/O error" in text:
        return f"{text}; free some space, or check the disk"
    if "Max retries exceeded" in text or "Connection refused" in str(error):
        text = "nothing answers there"
    return f"{text}; check --tracking_uri"
