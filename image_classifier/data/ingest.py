"""Add any source that the trainer reads to a data set in the database."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, insert, select

from image_classifier.access import DatabaseAccess, Reading
from image_classifier.data.connection import Database, copying
from image_classifier.data.content import Content
from image_classifier.data.database import Dataset, Version, build_dataset, count_rows, find_moment, map_labels
from image_classifier.data.findings import Findings
from image_classifier.data.freezing import freeze_newest
from image_classifier.data.metadata import load_metadata
from image_classifier.data.revision import open_database
from image_classifier.data.schema import datasets, samples
from image_classifier.data.snapshot import build_shape
from image_classifier.data.source import find_source, get_folder
from image_classifier.errors import DatabaseError, DataError
from image_classifier.references import describe_place
from image_classifier.remote.cache import localize
from image_classifier.storage import locked_file

CHUNK_SIZE = 5000
"""Images a transaction: 15 MB, and a wait for the disk every quarter of a second."""


@dataclass(frozen=True)
class Chunk:
    """Images of one part that are added in one transaction: uint8 [n, 3, S, S], and labels [n]."""

    split: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass
class Added:
    """What became of images that were to be added."""

    num_added: int = 0
    num_present: int = 0
    num_other_label: int = 0

    def __iadd__(self, other: Added) -> Added:
        self.num_added += other.num_added
        self.num_present += other.num_present
        self.num_other_label += other.num_other_label
        return self


@dataclass(frozen=True)
class Ingested:
    """A source that was gone through to its end.

    Attributes:
        version: all that is in the data set now.
        added: what became of the images that could be read.
        findings: what was found while they were read; None where there were no image files.
        database: where it all is now: a path, or a name and a server.
        notes: what is to be known of the source, in sentences.
    """

    version: Version
    added: Added
    findings: Findings | None
    database: str
    notes: tuple[str, ...]


class Listener:
    """Told how an ingest goes; this one is silent."""

    def commit(self, num_images: int) -> None:
        """So many more images of the source are there to stay."""


def ingest(
    source_path: Path,
    name: str,
    access: DatabaseAccess,
    *,
    reading: Reading = Reading(),
    chunk_size: int = CHUNK_SIZE,
    listener: Listener | None = None,
) -> Ingested:
    """Add what a source holds and the data set does not, and freeze the whole into a version.

    The database and the data set are made where there are none. Whatever ends this early, the chunks that were
    committed stay, and the next call goes on after them.

    Raises:
        RemoteError: the source lies at a URL and cannot be had.
        DataError: the source cannot be read, has images that cannot be, or classes that the data set does not have.
        DatabaseError: the database cannot be reached or refuses, or another process ingests into the data set.
        StorageError: the disk of the database is full.
    """
    told = listener or Listener()
    path = localize(source_path)
    source = find_source(path)
    content = source.read(load_metadata(get_folder(path)), reading)
    chunks = _iterate_chunks(content, chunk_size)
    first = next(chunks, None)  # what cannot be read at all leaves no trace
    if first is None:
        reasons = content.findings.left_out if content.findings else ()
        more = f", such as {reasons[0]}" if reasons else ""
        raise DataError(f"{source_path} has no readable image{more}; nothing was added")
    added = Added()
    with open_database(access, make=True) as database:
        dataset = database.run(lambda: get_or_add_dataset(database, name, content.classes, content.image_size))
        labels = map_labels(dataset, content.classes)
        with _alone(database, dataset):
            destination = Ingest(database, dataset, describe_place(source_path))
            for chunk in chain([first], chunks):
                added += destination.add(Chunk(chunk.split, chunk.images, labels[chunk.labels]))
                told.commit(len(chunk.images))
            version = freeze_newest(database, dataset)
        return Ingested(version, added, content.findings, database.place.title, source.notes)


def _iterate_chunks(content: Content, size: int) -> Iterator[Chunk]:
    for split, batches in content.parts.items():
        for images, labels in batches:
            images = np.ascontiguousarray(images)
            for start in range(0, len(images), size):
                yield Chunk(split, images[start : start + size], labels[start : start + size])


@contextmanager
def _alone(database: Database, dataset: Dataset) -> Iterator[None]:
    """Keep other ingests out of the data set; in SQLite, out of the file. The lock goes with the process."""
    error = DatabaseError(f"another process ingests into {dataset.name} already: wait until it has ended")
    if database.is_postgresql:
        if not database.run(lambda: database.hold(dataset.id)):
            raise error
        yield
        return
    with locked_file(Path(f"{database.place.database}.lock"), error):
        yield


def get_or_add_dataset(database: Database, name: str, classes: Sequence[str], image_size: int) -> Dataset:
    """Find a data set, or add it with these classes and images of this side in pixels.

    Raises:
        DataError: it has images of another size.
    """
    with database.adding() as connection:
        row = connection.execute(select(datasets).where(datasets.c.name == name)).one_or_none()
        if row is None:
            values = {"name": name, "classes": list(classes), "shape": build_shape(image_size)}
            signature = {"added_at": find_moment(connection), "added_by": database.who}
            connection.execute(insert(datasets).values(**values, **signature))
            row = connection.execute(select(datasets).where(datasets.c.name == name)).one()
    dataset = build_dataset(row)
    if dataset.image_size != image_size:
        raise DataError(
            f"the data set {name} has images of {dataset.image_size} x {dataset.image_size} pixels instead of "
            f"{image_size} x {image_size}: give --image_size {dataset.image_size}, or another --dataset"
        )
    return dataset


class Ingest:
    """Adds images to a data set, chunk by chunk, each in a transaction of its own.

    An image is the same as one that is there if split and content are, and as many of them came before it in this
    ingest; so the same source adds nothing a second time, and what a source holds twice is kept twice.
    """

    def __init__(self, database: Database, dataset: Dataset, source: str) -> None:
        self._database = database
        self._dataset = dataset
        self._source = source
        self._counts: Counter[tuple[str, bytes]] = Counter()
        self._num_added = 0

    def add(self, chunk: Chunk) -> Added:
        """Add what of a chunk is not there yet; when this returns, it is there to stay.

        Raises:
            DatabaseError: the connection is lost for good, or the database refuses.
            StorageError: its disk is full.
        """
        keys = []
        for image in chunk.images:
            digest = hashlib.sha256(image.data).digest()
            keys.append((digest, self._counts[chunk.split, digest]))
            self._counts[chunk.split, digest] += 1
        added = self._database.run(lambda: self._add_once(chunk, keys))
        self._num_added += added.num_added
        return added

    def _add_once(self, chunk: Chunk, keys: Sequence[tuple[bytes, int]]) -> Added:
        database, dataset = self._database, self._dataset
        with database.adding(dataset.id) as connection:
            position = count_rows(connection, samples.c.position, dataset, None)
            # If all that is there comes from this ingest, none of this chunk is.
            present = self._find_present(connection, chunk.split, keys) if position != self._num_added else {}
            moment = find_moment(connection, samples, dataset)
            rows: list[tuple[Any, ...]] = []
            for image, label, key in zip(chunk.images, chunk.labels.tolist(), keys, strict=True):
                if key not in present:
                    values = (dataset.id, position + len(rows), chunk.split, label, *key, self._source, moment)
                    rows.append((*values, database.who, image.tobytes()))
            if rows:
                _insert_samples(connection, rows)
        others = [
            key for key, label in zip(keys, chunk.labels.tolist(), strict=True) if present.get(key, label) != label
        ]
        return Added(len(rows), len(present), len(others))

    def _find_present(
        self, connection: Connection, split: str, keys: Sequence[tuple[bytes, int]]
    ) -> dict[tuple[bytes, int], int]:
        """Find the labels of those that are there."""
        columns = samples.c.digest, samples.c.occurrence, samples.c.label
        digests = sorted({digest for digest, _ in keys})
        query = select(*columns).where(samples.c.dataset_id == self._dataset.id, samples.c.split == split)
        found = connection.execute(query.where(samples.c.digest.in_(digests)))
        wanted = set(keys)
        present = {(bytes(digest), occurrence): label for digest, occurrence, label in found}
        return {key: label for key, label in present.items() if key in wanted}


def _insert_samples(connection: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert whole rows, as fast as the driver takes them: SQLAlchemy would look at each value of each."""
    names = [column.name for column in samples.columns]
    if connection.dialect.name != "postgresql":
        place = names.index("added_at")
        convert = samples.c.added_at.type.dialect_impl(connection.dialect).bind_processor(connection.dialect)
        assert convert is not None
        moment = convert(rows[0][place])  # one for all
        statement = str(insert(samples).compile(dialect=connection.dialect, column_keys=names))
        connection.exec_driver_sql(statement, [(*row[:place], moment, *row[place + 1 :]) for row in rows])
        return
    driver: Any = connection.connection.driver_connection
    with copying(driver) as cursor, cursor.copy(f"COPY samples ({', '.join(names)}) FROM STDIN BINARY") as copy:
        copy.set_types(("int4", "int4", "varchar", "int4", "bytea", "int4", "text", "timestamptz", "text", "bytea"))
        for row in rows:
            copy.write_row(row)
