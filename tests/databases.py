"""An empty database for a test, of SQLite or in a real PostgreSQL, and what a user types to reach it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import text

from image_classifier.access import DatabaseAccess
from image_classifier.credentials import Secret
from image_classifier.data.revision import open_database
from tests.datasets import OURS, Arrays, make_arrays, write_cifar10_python
from tests.postgres import PASSWORD, Cluster

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Home:
    """Where a test's database is.

    Attributes:
        access: how the package reaches it.
        cluster: the server; None for SQLite.
        database: name of the database there.
    """

    access: DatabaseAccess
    cluster: Cluster | None = None
    database: str = ""

    @property
    def options(self) -> list[str]:
        """The options of a command that lead to it; the password is in the environment."""
        config = ["--db_config", str(self.access.config)] if self.access.config else []
        return ["--dataset_folder", str(self.access.dataset_folder), *config]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of such a command."""
        return {"DB_PASSWORD": PASSWORD} if self.cluster else {}

    def elsewhere(self, folder: Path) -> DatabaseAccess:
        """Build the way to the same database from another dataset folder, which has no snapshot yet."""
        folder.mkdir(exist_ok=True)
        if self.cluster is None:
            config = folder / "sqlite.yaml"
            config.write_text(
                f"driver: sqlite\ndatabase: {self.access.dataset_folder.absolute() / 'database.sqlite'}\n"
            )
            return DatabaseAccess(config=config, dataset_folder=folder)
        return replace(self.access, dataset_folder=folder)

    def ask(self, query: str) -> Any:
        """Ask the database, past the package, for one value."""
        with open_database(self.access) as database, database.reading() as connection:
            return connection.execute(text(query)).scalar_one()

    def change(self, *commands: str) -> None:
        """Change the database past the package."""
        with open_database(self.access) as database, database.adding() as connection:
            for command in commands:
                connection.execute(text(command))


def make_home(kind: str, folder: Path, request: pytest.FixtureRequest) -> Home:
    """Make an empty database of a kind; its snapshots go to a dataset folder below this one."""
    dataset_folder = folder / "home"
    dataset_folder.mkdir()
    if kind == "sqlite":
        return Home(DatabaseAccess(dataset_folder=dataset_folder))
    cluster: Cluster = request.getfixturevalue("postgresql")
    return make_home_in(cluster, folder, dataset_folder)


def make_home_in(cluster: Cluster, folder: Path, dataset_folder: Path) -> Home:
    """Make an empty database in a server."""
    database = f"test_{next(_numbers)}"
    cluster.execute("postgres", f"CREATE DATABASE {database}")
    config = cluster.write_config(folder / f"{database}.yaml", database)
    access = DatabaseAccess(config=config, password=Secret(PASSWORD), dataset_folder=dataset_folder)
    return Home(access, cluster, database)


def write_source(folder: Path, arrays: Arrays | None = None, **values: Any) -> Path:
    """Write random images in CIFAR-10's python layout."""
    write_cifar10_python(folder, arrays or make_arrays(**values))
    return folder


def swap_label(labels: NDArray[np.int64], image: int) -> tuple[str, str]:
    """Name the class of an image, and another."""
    label = int(labels[image])
    return OURS[label], OURS[(label + 1) % len(OURS)]
