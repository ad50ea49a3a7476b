"""Add any source that the trainer reads to a data set in the database."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from image_classifier.config import DatabaseAccess, Reading
from image_classifier.data.connection import Database, open_database
from image_classifier.data.content import Content, load_metadata
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
from image_classifier.data.findings import Findings
from image_classifier.data.source import find_source, get_folder
from image_classifier.errors import DatabaseError, DataError
from image_classifier.references import describe_place
from image_classifier.remote.cache import localize
from image_classifier.storage import lock, storage_error

CHUNK_SIZE = 5000
"""Images a transaction: 15 MB, and a wait for the disk every quarter of a second."""


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
    path = Path(f"{database.place.database}.lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as refusal:
        raise storage_error(path, refusal) from refusal
    try:
        lock(descriptor, path, error)
        yield
    finally:
        os.close(descriptor)
