"""Add any source that the trainer reads to a data set in the database."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from image_classifier.config import DatabaseAccess
from image_classifier.data.connection import Database, open_database
from image_classifier.data.content import Content, Tolerance, load_metadata
from image_classifier.data.database import (
    Added,
    Chunk,
    Dataset,
    Ingest,
    Version,
    freeze_newest,
    get_or_add_dataset,
    map_labels,
)
from image_classifier.data.source import find_source
from image_classifier.errors import DatabaseError, DataError
from image_classifier.storage import storage_error

CHUNK_SIZE = 5000
"""Images a transaction: 15 MB, and a wait for the disk every quarter of a second."""


@dataclass(frozen=True)
class Ingested:
    """A source that was gone through to its end.

    Attributes:
        version: all that is in the data set now.
        added: what became of the images that could be read.
        num_bad: how many could not, and were left out.
    """

    version: Version
    added: Added
    num_bad: int


class Listener:
    """Told how an ingest goes; this one is silent."""

    def commit(self, num_images: int) -> None:
        """So many more images of the source are there to stay."""

    def skip(self, reason: str) -> None:
        """An image is left out."""


def ingest(
    source_path: Path,
    name: str,
    access: DatabaseAccess,
    *,
    skip_bad: bool = False,
    resize: bool = True,
    chunk_size: int = CHUNK_SIZE,
    listener: Listener | None = None,
) -> Ingested:
    """Add what a source holds and the data set does not, and freeze the whole into a version.

    The database and the data set are made where there are none. Whatever ends this early, the chunks that were
    committed stay, and the next call goes on after them.

    Raises:
        DataError: the source cannot be read, has images that cannot be, or classes that the data set does not have.
        DatabaseError: the database cannot be reached or refuses, or another process ingests into the data set.
        StorageError: the disk of the database is full.
    """
    told = listener or Listener()
    bad: list[str] = []

    def skip(reason: str) -> None:
        bad.append(reason)
        told.skip(reason)

    tolerance = Tolerance(skip if skip_bad else None, resize)
    content = find_source(source_path).read(load_metadata(source_path), tolerance)
    chunks = _iterate_chunks(content, chunk_size)
    first = next(chunks, None)  # what cannot be read at all leaves no trace
    if first is None:
        raise DataError(f"{source_path} has no image that can be read; nothing was added")
    added = Added()
    with open_database(access, make=True) as database:
        dataset = database.run(lambda: get_or_add_dataset(database, name, content.classes))
        labels = map_labels(dataset, content.classes)
        with _alone(database, dataset):
            destination = Ingest(database, dataset, str(source_path))
            for chunk in chain([first], chunks):
                added += destination.add(Chunk(chunk.split, chunk.images, labels[chunk.labels]))
                told.commit(len(chunk.images))
            version = freeze_newest(database, dataset)
    return Ingested(version, added, len(bad))


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
    path = Path(f"{database.place.database}.lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as refusal:
        raise storage_error(path, refusal) from refusal
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise error from None
    else:
        yield
    finally:
        os.close(descriptor)
