"""The storage of a sweep: Optuna's tables in SQLite or PostgreSQL, with a lock between processes.

A change of the study is read, decided and written under a lock that dies with its holder: of a file beside SQLite's, or
an advisory lock of PostgreSQL. A connection that is lost is made again, and the change begun anew.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from image_classifier.credentials import Secret
from image_classifier.data.place import LOCAL_HOSTS
from image_classifier.data.refusals import BUSY_TIMEOUT_S, is_loss
from image_classifier.errors import DatabaseError, SettingsError
from image_classifier.storage import locked_file, storage_error
from image_classifier.studies.plan import DIRECTION

FILE = "sweep.db"
"""SQLite's file in the experiment's folder, where no other storage is named."""

PATIENCE_S = 600.0
"""How long a storage is waited for that was reached before."""

_NETWORK = re.compile(r"nfs\d?|cifs|smb\w*|9p|afs|ceph|glusterfs|lustre|gpfs|beegfs|fuse\.(sshfs|s3fs|gcsfuse|rclone)")
_LOCK = 1_229_996_360
"""PostgreSQL's advisory lock: a number that other programs in the same database are unlikely to take."""
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.25, 5.0
_TIMEOUT_S = 10

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a study lies.

    Attributes:
        url: of the database, without a password.
        file: of SQLite.
    """

    url: URL
    file: Path | None

    @property
    def title(self) -> str:
        """What to call it in a message."""
        return str(self.file) if self.file else f"{self.url.database} at {self.url.host}:{self.url.port or 5432}"


def parse_storage(address: str | None, folder: Path) -> Place:
    """Parse the address of a storage.

    Args:
        address: sqlite:///FILE or postgresql://USER@HOST/DATABASE; None for a file in the folder.

    Raises:
        SettingsError: it is neither, holds a password, or is a file of SQLite on a network file system.
    """
    takes = "--storage takes postgresql://USER@HOST/DATABASE or sqlite:///FILE"
    try:
        url = URL.create("sqlite", database=str(folder / FILE)) if address is None else make_url(address)
    except (ArgumentError, ValueError):
        raise SettingsError(f"{takes}, but the value is not a URL") from None  # it may hold a password
    kind = url.get_backend_name()
    if url.password is not None or any("password" in key for key in url.query):
        raise SettingsError(
            "--storage must not contain a password, because other users could see it: put it into DB_PASSWORD in the "
            "environment, "
            "or into a file for --storage_pass_file"
        )
    if kind == "sqlite" and url.database not in (None, "", ":memory:") and not str(url.database).startswith("file:"):
        file = Path(str(url.database))
        check_file_system(file)
        return Place(url, file)
    if kind != "postgresql" or not url.host or not url.database:
        raise SettingsError(f"{takes}, got: {ascii(url.drivername)[1:-1]}://")
    return Place(url.set(drivername="postgresql+psycopg"), None)


def check_file_system(file: Path, mounts: Path = Path("/proc/self/mountinfo")) -> None:
    """Refuse a file of SQLite on a network file system, whose locks do not hold between machines.

    Args:
        mounts: Linux's list of mounted file systems.

    Raises:
        SettingsError: it is on one.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # a system without such a list
        return
    path, kind, longest = Path(os.path.realpath(file)), "", -1
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields.split()[4]))
        if path.is_relative_to(mounted) and len(mounted.parts) >= longest:
            kind, longest = rest.split()[0], len(mounted.parts)
    if _NETWORK.fullmatch(kind):
        raise SettingsError(
            f"--storage: {file} is on a network file system ({kind}), where SQLite's locks do not work and the file "
            f"will be "
            "damaged; name a PostgreSQL database, or a file on a local disk"
        )


class Storage:
    """The study of a name, changed by one process after the other.

    Args:
        password: of PostgreSQL; no address and no message ever holds it.
    """

    def __init__(self, place: Place, name: str, password: Secret | None = None) -> None:
        self.place = place
        self.name = name
        self._password = password
        self._study: optuna.Study | None = None
        self._was_reached = False
        self._mutex = threading.Lock()

    def change(self, work: Callable[[optuna.Study], T]) -> T:
        """Do work on the study while nobody else changes it; anew where the connection was lost.

        Raises:
            DatabaseError: the storage cannot be reached, or refuses.
            StorageError: the disk refuses.
        """
        started, delay_s = time.monotonic(), _FIRST_DELAY_S
        while True:
            try:
                with self._mutex, self._locked():
                    self._was_reached = True
                    result = work(self._get_study())
                return result
            except (SQLAlchemyError, StorageInternalError) as error:
                self._study = None
                cause = error.__cause__ if isinstance(error, StorageInternalError) else error
                is_lost = self._was_reached and isinstance(cause, DBAPIError) and is_loss(cause)
                if not is_lost or time.monotonic() - started > PATIENCE_S:
                    raise DatabaseError(f"--storage: {self.place.title} {_explain(cause)}") from None
                logger.warning("%s cannot be reached; trying again in %g s", self.place.title, delay_s)
                time.sleep(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    def _get_study(self) -> optuna.Study:
        if self._study is None:
            try:
                storage = self._open_tables()
            except RuntimeError as error:  # tables of another version
                reason = " ".join(str(error).split())
                raise DatabaseError(f"--storage: {self.place.title} cannot be used: {reason}") from error
            self._study = optuna.create_study(
                storage=storage, study_name=self.name, direction=DIRECTION, load_if_exists=True
            )
        return self._study

    def _open_tables(self) -> optuna.storages.RDBStorage:
        file = self.place.file
        if file is not None:  # whose name may have what means something in an address

            def connect() -> sqlite3.Connection:
                return sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, check_same_thread=False)

            return optuna.storages.RDBStorage("sqlite://", {"creator": connect, "poolclass": NullPool})
        # A connection that idles between two changes may be lost meanwhile, and is tried before it is used.
        options = {"connect_args": self._build_options(), "pool_pre_ping": True, "hide_parameters": True}
        return optuna.storages.RDBStorage(self.place.url.render_as_string(), options)

    def _build_options(self) -> dict[str, Any]:
        """Build what PostgreSQL's connections are made with."""
        password = {} if self._password is None else {"password": self._password.reveal()}
        alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
        tls = {}
        if "sslmode" not in self.place.url.query and self.place.url.host not in LOCAL_HOSTS:
            tls = {"sslmode": "verify-full", "sslrootcert": "system"}
        return {"connect_timeout": _TIMEOUT_S, **alive, **tls, **password}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock under which the study is changed."""
        if self.place.file is not None:
            path = self.place.file.with_name(f"{self.place.file.name}.lock")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise storage_error(path, error) from error
            with locked_file(path):
                yield
            return
        options = {"connect_args": self._build_options(), "poolclass": NullPool, "hide_parameters": True}
        engine = create_engine(self.place.url, **options)
        with engine.connect() as connection, connection.begin():
            connection.execute(text("SET LOCAL lock_timeout = '60s'"))
            # The server gives the lock back soon after a machine is gone that held it.
            connection.execute(text("SET LOCAL tcp_keepalives_idle = 10"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            yield


_REFUSALS = {
    "28P01": "refuses the password: correct DB_PASSWORD, or the file of --storage_pass_file",
    "28000": "does not let this user in: correct the user of --storage, or the server's pg_hba.conf",
    "3D000": "does not exist on the server: correct the database of --storage, or create it",
    "42501": "does not allow this user to make tables: use a role that may",
}


def _explain(cause: BaseException | None) -> str:
    """Say what went wrong, with the remedy, in one line."""
    origin = cause.orig if isinstance(cause, DBAPIError) else cause
    state = getattr(origin, "sqlstate", None)
    if state in _REFUSALS:
        return _REFUSALS[state]
    reason = (str(origin).strip().splitlines() or [type(origin).__name__])[0][:300]
    if "password authentication failed" in reason:
        return _REFUSALS["28P01"]
    if "no password supplied" in reason:
        return "asks for a password: put it into DB_PASSWORD in the environment, or into a file for --storage_pass_file"
    if "does not exist" in reason and "database" in reason:
        return _REFUSALS["3D000"]
    return f"cannot be used: {reason}; check --storage"
