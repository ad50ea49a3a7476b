"""The connection to the database: its settings, passwords, error messages and reconnects.

This, `schema` and `database` are the only modules that import SQLAlchemy, which the extra `database` brings.
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from image_classifier.config import DATASET_FOLDER, DatabaseAccess
from image_classifier.data.schema import REVISION
from image_classifier.errors import DatabaseError, ImageClassifierError, SettingsError, StorageError
from image_classifier.files import load_yaml
from image_classifier.progress import track
from image_classifier.text import one_line

Driver = Literal["sqlite", "postgresql"]
Tls = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]

PACKAGED_CONFIG = Path(__file__).with_name("db_connect.yaml")
UPGRADE = "`image_classifier data upgrade`"

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_BUSY_TIMEOUT_S = 60  # how long SQLite waits for another process that writes
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.25, 5
_PATIENCE_S = 30  # a wait for the server that takes longer is worth a line
_SESSION = ("SET DateStyle = 'ISO, YMD'", "SET row_security = off")
"""What a session must have whatever the server's default: dates that can be read, and an error, instead of a part of
the rows, where a policy would hide some."""
_ADDING, _INGESTING, _UPGRADING = 1_229_996_353, 1_229_996_354, 1_229_996_355
"""PostgreSQL's advisory locks: numbers that other programs in the same database are unlikely to take."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a database is; `db_connect.yaml` says what each key means."""

    driver: Driver
    database: str
    host: str
    port: int
    user: str | None
    tls: Tls | None
    tls_root: Path | None
    timeout_s: int
    answer_timeout_s: int
    num_tries: int

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        return self.host in _LOCAL_HOSTS or self.host.startswith("/")

    @property
    def title(self) -> str:
        """What to call it in a message."""
        if self.driver == "sqlite":
            return self.database
        return f"{self.database} at {self.host}:{self.port}"


def load_place(access: DatabaseAccess) -> Place:
    """Load where the database is: the packaged db_connect.yaml, and over it the file that was named.

    Raises:
        SettingsError: the file cannot be read, or has an unknown key or a value of the wrong type.
    """
    values = _load_config(PACKAGED_CONFIG)
    if access.config is not None:
        values |= _load_config(access.config)
    if values["driver"] == "sqlite":
        values["database"] = str(access.dataset_folder / values["database"])
    elif access.config is not None and values["database"] == _load_config(PACKAGED_CONFIG)["database"]:
        raise SettingsError(f"--db_config: {access.config} needs the key database, the name of the database")
    values["tls_root"] = values["tls_root"] and Path(values["tls_root"])
    return Place(**values)


def _load_config(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--db_config: {path} cannot be read as YAML: {one_line(error)}; correct it") from None
    known = [field.name for field in fields(Place)]
    if not isinstance(content, dict):
        raise SettingsError(f"--db_config: {path} must contain keys and values: {', '.join(known)}")
    if "password" in content:
        raise SettingsError(
            f"--db_config: {path} has a password, which does not belong there: put it into DB_PASSWORD in the "
            "environment, or into a file for --db_pass_file"
        )

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**16

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and value != "" and value.isprintable()

    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "driver": (lambda value: value in get_args(Driver), " or ".join(get_args(Driver))),
        "database": (is_text, "a name, of sqlite a path"),
        "host": (is_text, "a name or an address"),
        "port": (is_count, "a whole number from 1 to 65535"),
        "user": (lambda value: value is None or is_text(value), "a name, or null"),
        "tls": (lambda value: value is None or value in get_args(Tls), f"null or one of {', '.join(get_args(Tls))}"),
        "tls_root": (lambda value: value is None or is_text(value), "a path, or null"),
        "timeout_s": (is_count, "a whole number from 1 on"),
        "answer_timeout_s": (is_count, "a whole number from 1 on"),
        "num_tries": (is_count, "a whole number from 1 on"),
    }
    for key, value in content.items():
        if key not in checks:
            raise SettingsError(
                f"--db_config: {path} has the unknown key {ascii(key)[:50]}; it may have {', '.join(known)}"
            )
        accepts, takes = checks[key]
        if not accepts(value):
            raise SettingsError(f"--db_config: {path}: {key} takes {takes}, got: {ascii(value)[:100]}")
    return content


class _Watch:
    """Gives a server up that does not answer: libpq waits for ever once the connection is made."""

    def __init__(self, place: Place, connection: Connection) -> None:
        self._place = place
        self._driver: Any = connection.connection.driver_connection
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.tick()

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def tick(self) -> None:
        """Take note of an answer."""
        self._since = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(_PATIENCE_S, self._place.answer_timeout_s)):
            waited_s = time.monotonic() - self._since
            if waited_s >= self._place.answer_timeout_s:
                logger.warning("%s has not answered for %.0f s: giving up", self._place.title, waited_s)
                with suppress(Exception):  # it was lost meanwhile
                    with socket.socket(fileno=os.dup(self._driver.fileno())) as connection:
                        connection.shutdown(socket.SHUT_RDWR)  # which is a lost connection to who waits
                return
            if waited_s >= _PATIENCE_S:
                logger.warning("still waiting for an answer of %s, after %.0f s", self._place.title, waited_s)


class Database:
    """One connection at a time to a database, made when it is needed and made again when it was lost.

    Attributes:
        place: where the database is.
        who: who adds to it, once there is a connection: PostgreSQL's role, of SQLite the user of this machine.
    """

    def __init__(self, place: Place, access: DatabaseAccess) -> None:
        self.place = place
        self.who = ""
        self._password = access.password
        self._ask = access.ask
        self._connection: Connection | None = None
        self._was_connected = False
        self._held: int | None = None
        self._watch: _Watch | None = None
        self._begin = "BEGIN"
        self._engine = self._build_engine()

    @property
    def is_postgresql(self) -> bool:
        """Whether this is PostgreSQL, and not SQLite."""
        return self.place.driver == "postgresql"

    def connect(self) -> Connection:
        """Give the connection; make it if there is none."""
        if self._connection is None:
            self._connection = self._connect_or_ask()
            self._was_connected = True
            with self._watched(self._connection):
                self.who = self._begin_session(self._connection)
            if self._held is not None:  # a server that has not noticed the loss holds the lock for the lost connection
                with self._watched(self._connection), self._connection.begin():
                    self._connection.execute(text("SET LOCAL lock_timeout = '10s'"))
                    self._connection.execute(text(f"SELECT pg_advisory_lock({_INGESTING}, {self._held})"))
        return self._connection

    def close(self) -> None:
        """Give the connection up, and with it what is held."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(DBAPIError):
                connection.close()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give the connection with a transaction that sees one state of the database, whatever others commit."""
        connection = self.connect()
        with self._watched(connection), connection.begin():
            if self.is_postgresql:
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
            yield connection

    @contextmanager
    def adding(self, dataset_id: int = 0) -> Iterator[Connection]:
        """Give the connection with a transaction in which nobody else adds to the same data set."""
        connection = self.connect()
        self._begin = "BEGIN IMMEDIATE"
        try:
            with self._watched(connection), connection.begin():
                if self.is_postgresql:
                    connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADDING}, {dataset_id})"))
                yield connection
        finally:
            self._begin = "BEGIN"

    def hold(self, dataset_id: int) -> bool:
        """Hold the right to ingest into a data set for as long as this is open; say whether it could be had.

        On PostgreSQL alone: the file of SQLite has a file beside it to lock.
        """
        connection = self.connect()
        with self._watched(connection), connection.begin():
            query = text(f"SELECT pg_try_advisory_lock({_INGESTING}, {dataset_id})")
            if not connection.execute(query).scalar_one():
                return False
        self._held = dataset_id
        return True

    def tick(self) -> None:
        """Take note that the server has answered, where one transaction takes many answers."""
        if self._watch is not None:
            self._watch.tick()

    @contextmanager
    def _watched(self, connection: Connection) -> Iterator[None]:
        if not self.is_postgresql:
            yield
            return
        with _Watch(self.place, connection) as self._watch:
            yield

    def run(self, work: Callable[[], T]) -> T:
        """Do work that may be begun again: anew, with a new connection, each time that the connection is lost.

        Raises:
            DatabaseError: the connection is lost for good, or the database refuses.
            StorageError: its disk is full.
        """
        number = 1
        while True:
            try:
                return work()
            except DBAPIError as error:
                self.recover(error, number)
                number += 1

    def recover(self, error: DBAPIError, number: int) -> None:
        """Wait after the number-th loss of the connection; raise where it was no loss, or the last try.

        Raises:
            DatabaseError: as `run` says.
            StorageError: as `run` says.
        """
        self.close()
        is_lost = self._was_connected and is_loss(error)
        if not is_lost or number >= self.place.num_tries:
            raise explain(error, self.place, num_tries=number) from None
        delay_s = min(_FIRST_DELAY_S * 2 ** (number - 1), _LONGEST_DELAY_S)
        logger.warning("the connection to %s was lost; trying again in %g s", self.place.title, delay_s)
        time.sleep(delay_s)

    def _begin_session(self, connection: Connection) -> str:
        """Set what the session needs, and find out who it is."""
        if self.is_postgresql:
            with connection.begin():
                for setting in _SESSION:
                    connection.exec_driver_sql(setting)
                schemas = str(connection.exec_driver_sql("SHOW search_path").scalar_one()).split(", ")
                if "pg_catalog" in schemas[1:]:  # left out it comes first, and no other schema's functions are called
                    others = ", ".join(name for name in schemas if name != "pg_catalog")
                    connection.exec_driver_sql(f"SET search_path = {others}")
                return str(connection.execute(text("SELECT current_user")).scalar_one())
        try:
            return getpass.getuser()
        except (OSError, KeyError):  # a container's user may have no name
            return str(os.getuid())

    def _connect_or_ask(self) -> Connection:
        try:
            return self._engine.connect()
        except DBAPIError as error:
            if self._ask is None or self._password is not None or "no password supplied" not in str(error.orig):
                raise
            self._password = self._ask()
            return self._engine.connect()

    def _build_engine(self) -> Engine:
        if not self.is_postgresql:
            return self._build_sqlite_engine()
        place = self.place
        url = URL.create("postgresql+psycopg", place.user, None, place.host, place.port, place.database)
        options = {"connect_timeout": place.timeout_s, "application_name": "image_classifier"}
        options["client_encoding"] = "UTF8"  # psycopg gives bytes instead of text where the server's is SQL_ASCII
        # Without parameters in the messages: they would hold images.
        engine = create_engine(
            url, poolclass=NullPool, connect_args={**options, **build_tls_options(place)}, hide_parameters=True
        )

        @event.listens_for(engine, "do_connect")
        def add_password(dialect: Any, record: Any, words: Any, parameters: dict[str, Any]) -> None:
            if self._password is not None:  # which the engine, its address and its messages thus never hold
                parameters["password"] = self._password.reveal()

        return engine

    def _build_sqlite_engine(self) -> Engine:
        path = Path(self.place.database)
        mode = "rw" if os.access(path, os.W_OK) else "ro"  # to read, too: what a killed process began is rolled back
        address = f"file:{quote(str(path))}?mode={mode}"

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(address, timeout=_BUSY_TIMEOUT_S, uri=True, isolation_level=None)
            # Of a new file: one image would leave a quarter of 4 kB empty.
            connection.execute("PRAGMA page_size = 16384")
            connection.execute("PRAGMA cache_size = -32768")  # 32 MB, which a chunk fits into until it is committed
            return connection

        engine = create_engine("sqlite://", creator=connect, poolclass=NullPool, hide_parameters=True)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:  # which the driver would put off, and for reading leave out
            connection.exec_driver_sql(self._begin)

        return engine


def build_tls_options(place: Place) -> dict[str, str]:
    """Build what libpq is told of TLS: to verify certificate and name of any server but that of this machine."""
    mode = place.tls or ("prefer" if place.is_local else "verify-full")
    return {"sslmode": mode, **({"sslrootcert": str(place.tls_root or "system")} if mode.startswith("verify") else {})}


@contextmanager
def copying(driver: Any) -> Iterator[Any]:
    """Give a cursor of psycopg itself for a COPY; its errors become those that SQLAlchemy would raise.

    Raises:
        DBAPIError: the database refuses, or the connection is lost.
    """
    import psycopg

    try:
        with driver.cursor() as cursor:
            yield cursor
    except psycopg.Error as error:
        invalidated = driver.broken or driver.closed
        raise DBAPIError("COPY", None, error, hide_parameters=True, connection_invalidated=invalidated) from error


@contextmanager
def open_database(access: DatabaseAccess, *, make: bool = False) -> Iterator[Database]:
    """Open the database, check that its tables are those that this version reads, and close it at the end.

    Args:
        make: make the database of SQLite, and the tables, where there are none.

    Raises:
        SettingsError: the file that says where it is is not as it must be.
        DatabaseError: it cannot be reached, refuses, or has other tables.
        ImageClassifierError: also while it is open.
    """
    place = load_place(access)
    if place.driver == "sqlite":
        _prepare_file(Path(place.database), make=make)
    database = Database(place, access)
    try:
        revision = database.run(lambda: find_revision(database))
        if revision is None and make:
            upgrade(database)
        elif revision != REVISION:
            raise _revision_error(place, revision)
        yield database
    except DBAPIError as error:
        raise explain(error, place) from None
    finally:
        database.close()


@track("upgrading the tables")
def upgrade_database(access: DatabaseAccess) -> tuple[str | None, str]:
    """Bring a database's tables to what this version reads; return the revisions before and after.

    Raises:
        SettingsError: the file that says where it is is not as it must be.
        DatabaseError: it cannot be reached, refuses, or is of a later version.
    """
    place = load_place(access)
    if place.driver == "sqlite":
        _prepare_file(Path(place.database), make=True)
    database = Database(place, access)
    try:
        before = database.run(lambda: find_revision(database))
        if before is not None and before > REVISION:
            raise _revision_error(place, before)
        upgrade(database)
        return before, REVISION
    except DBAPIError as error:
        raise explain(error, place) from None
    finally:
        database.close()


def find_revision(database: Database) -> str | None:
    """Find the migration that a database was upgraded to last; None where there are no tables of ours."""
    with database.reading() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def upgrade(database: Database, revision: str = REVISION) -> None:
    """Apply the migrations up to a revision, in one transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    with database.adding() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def _prepare_file(path: Path, *, make: bool) -> None:
    """See that a file of SQLite is there."""
    try:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        elif not path.exists():
            old = DATASET_FOLDER / path.name
            moved = f"; {old} is one: move it there" if old.exists() else ""  # where it was by default before
            raise DatabaseError(
                f"there is no database {path}: create it with `image_classifier data ingest`, or name another in "
                f"--db_config"
                f"{moved}"
            )
    except OSError as error:
        raise StorageError(f"cannot make the database {path}: {one_line(error)}; choose another folder") from error


def _revision_error(place: Place, revision: str | None) -> DatabaseError:
    if revision is None:
        where = " in its search_path" if place.driver == "postgresql" else ""
        return DatabaseError(f"{place.title} has no tables of image_classifier{where}: create them with {UPGRADE}")
    if revision > REVISION:
        return DatabaseError(
            f"the tables of {place.title} are of a later version ({revision}) than this one reads ({REVISION}): use a "
            "later version of image_classifier"
        )
    return DatabaseError(
        f"the tables of {place.title} are of an older version ({revision}) than this one reads ({REVISION}): "
        f"migrate them with {UPGRADE}"
    )


def is_loss(error: DBAPIError) -> bool:
    """Say whether the connection was lost, or could not be made because the server is just starting or stopping."""
    state = getattr(error.orig, "sqlstate", None)
    if isinstance(error.orig, sqlite3.Error):
        return False
    if state is None:
        return error.connection_invalidated or isinstance(error, OperationalError)
    return error.connection_invalidated or state.startswith(("08", "57P"))


_REFUSALS = {
    "28P01": "refuses the password of {user}: correct DB_PASSWORD, or the file of --db_pass_file",
    "28000": "does not let {user} in: correct the user, or the server's pg_hba.conf",
    "3D000": "does not exist on the server: correct the key database of --db_config, or create it",
    "42501": "does not allow {user} to do this ({reason}): use a role that may",
    "25006": "only lets {user} read ({reason}): use a role and a server that may write",
    "25P03": "ended the session ({reason}): raise idle_in_transaction_session_timeout of {user}",
    "3F000": "has no schema for new tables ({reason}): set the search_path of {user}",
    "57014": "ended a statement before it was done ({reason}): raise statement_timeout of {user}",
    "57P05": "ended the session ({reason}): raise idle_session_timeout of {user}",
    "53400": "gives {user} too little room to work in ({reason}): raise its limit",
    "42P01": "lacks a table ({reason}): " + UPGRADE + " makes what is missing",
    "42703": "lacks a column ({reason}): " + UPGRADE + " makes what is missing",
    "53300": "has no connection left: try again later",
    "55P03": "has another process that ingests into this data set: wait until it has ended",
}


def explain(error: DBAPIError, place: Place, num_tries: int = 1) -> ImageClassifierError:
    """Say in one line what the database or the way to it refused, with the remedy."""
    cause = error.orig
    reason = one_line(cause).removeprefix("connection failed: ")
    state = getattr(cause, "sqlstate", None)
    user = place.user or "this user"
    if state in ("53100", "53200") or "disk is full" in reason:
        return StorageError(f"the disk of the database {place.title} is full: {reason}; free some space")
    if isinstance(cause, sqlite3.Error):
        return _explain_sqlite(reason, place)
    if state is None and "no password supplied" in reason:
        return DatabaseError(
            f"{place.title} asks for the password of {user}: give it as DB_PASSWORD in the environment, or by "
            "--db_pass_file"
        )
    for code, words in _REFUSALS.items():  # while connecting, psycopg knows the words alone
        if state == code or (state is None and code in _WORDS and re.search(_WORDS[code], reason)):
            return DatabaseError(f"{place.title} {words.format(user=user, reason=reason)}")
    if state is None and ("certificate" in reason or "SSL" in reason):
        return DatabaseError(
            f"{place.title} cannot be trusted ({reason}): name its certificate as tls_root in --db_config, or give the "
            "server a valid one"
        )
    if is_loss(error):
        what = f"was lost and could not be made again in {num_tries} tries" if num_tries > 1 else "cannot be made"
        return DatabaseError(
            f"the connection to {place.title} {what} ({reason}): start the server, correct host and port in "
            "--db_config, or raise the server's limits on idle sessions"
        )
    return DatabaseError(f"{place.title} refuses: {reason}")


_WORDS = {
    "28P01": "password authentication failed",
    "28000": 'no pg_hba.conf entry|is not permitted to log in|role ".*" does not exist',
    "3D000": 'database ".*" does not exist',
    "42501": "permission denied for database",
    "53300": "too many c|connection slots are reserved|connection limit exceeded",
}
"""What the refusal of a connection says in words alone."""


def _explain_sqlite(reason: str, place: Place) -> ImageClassifierError:
    if "locked" in reason:
        return DatabaseError(f"another process has used {place.title} for {_BUSY_TIMEOUT_S} s: try again later")
    if "readonly" in reason or "unable to open" in reason:
        return DatabaseError(f"{place.title} cannot be written ({reason}): choose a writable folder")
    if "no such table" in reason or "no such column" in reason:
        return DatabaseError(f"{place.title} lacks some of its tables ({reason}): create them with {UPGRADE}")
    if "I/O error" in reason:
        return StorageError(
            f"the disk of the database {place.title} fails ({reason}): free some space, or check the disk"
        )
    return DatabaseError(f"{place.title} is not a complete SQLite database ({reason}): restore it from a backup")
