"""Open the database with its tables at the revision that this version reads: make them, upgrade them, or refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

from image_classifier.access import DATASET_FOLDER, DatabaseAccess
from image_classifier.data.connection import Database
from image_classifier.data.place import Place, load_place
from image_classifier.data.refusals import UPGRADE, explain
from image_classifier.data.schema import REVISION
from image_classifier.errors import DatabaseError, StorageError
from image_classifier.progress import track
from image_classifier.text import one_line


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
    with _connect(access, make=make) as database:
        revision = database.run(lambda: find_revision(database))
        if revision is None and make:
            upgrade(database)
        elif revision != REVISION:
            raise _revision_error(database.place, revision)
        yield database


@track("upgrading the tables")
def upgrade_database(access: DatabaseAccess) -> tuple[str | None, str]:
    """Bring a database's tables to what this version reads; return the revisions before and after.

    Raises:
        SettingsError: the file that says where it is is not as it must be.
        DatabaseError: it cannot be reached, refuses, or is of a later version.
    """
    with _connect(access, make=True) as database:
        before = database.run(lambda: find_revision(database))
        if before is not None and before > REVISION:
            raise _revision_error(database.place, before)
        upgrade(database)
        return before, REVISION


@contextmanager
def _connect(access: DatabaseAccess, *, make: bool) -> Iterator[Database]:
    place = load_place(access)
    if place.driver == "sqlite":
        _prepare_file(Path(place.database), make=make)
    database = Database(place, access)
    try:
        yield database
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
