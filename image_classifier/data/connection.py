"""The connection to the database: one at a time, watched, and made again when it was lost.

SQLAlchemy, which this and the modules around it import, comes with the extra `database`.
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from image_classifier.access import DatabaseAccess
from image_classifier.data.place import Place
from image_classifier.data.refusals import BUSY_TIMEOUT_S, explain, is_loss

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.25, 5
_PATIENCE_S = 30  # a wait for the server that takes longer is worth a line
_SESSION = ("SET DateStyle = 'ISO, YMD'", "SET row_security = off")
"""What a session must have whatever the server's default: dates that can be read, and an error, instead of a part of
the rows, where a policy would hide some."""
_ADDING, _INGESTING, _UPGRADING = 1_229_996_353, 1_229_996_354, 1_229_996_355
"""PostgreSQL's advisory locks: numbers that other programs in the same database are unlikely to take."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


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
            connection = sqlite3.connect(address, timeout=BUSY_TIMEOUT_S, uri=True, isolation_level=None)
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
