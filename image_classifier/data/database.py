"""Data sets in a database: what is in them, their versions, and a version as a snapshot.

`schema` says why a version is fixed by two numbers and its conditions. A version is read in the order of the
positions, the training images first; so the same version has the same digest from any server on any day.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, FromClause, Select, Table, func, select, text
from sqlalchemy.exc import DBAPIError

from image_classifier.access import DatabaseAccess
from image_classifier.data.connection import Database
from image_classifier.data.content import Batch, Content
from image_classifier.data.parts import PARTS
from image_classifier.data.revision import open_database
from image_classifier.data.schema import corrections, datasets, samples, versions
from image_classifier.data.snapshot import (
    Snapshot,
    build_shape,
    find_stored,
    find_stores,
    resize_snapshot,
    store_content,
)
from image_classifier.errors import DatabaseError, DataError
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE, ImageSize, is_image_size
from image_classifier.references import Reference

_READ_BYTES = 1000 * 3072  # of images that are read at once


@dataclass(frozen=True)
class Dataset:
    """A data set in the database; image_size is the side in pixels of its images."""

    id: int
    name: str
    classes: tuple[str, ...]
    image_size: ImageSize = DEFAULT_IMAGE_SIZE


@dataclass(frozen=True)
class Selection:
    """What a version holds: the first samples under the first corrections, as far as they meet the conditions.

    Attributes:
        num_samples: how many samples there were.
        num_corrections: how many corrections of labels there were.
        conditions: values that a sample may have, by the name of a condition; others leave it out.
    """

    num_samples: int
    num_corrections: int
    conditions: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Version:
    """A selection that was frozen."""

    dataset: Dataset
    number: int
    selection: Selection
    num_train: int
    num_validation: int
    num_test: int
    digest: str
    added_at: datetime
    added_by: str

    @property
    def reference(self) -> Reference:
        """What to call it."""
        return Reference(self.dataset.name, self.number)


@dataclass(frozen=True)
class Summary:
    """What `data list` shows of a data set: how many samples and corrections there are by now, and its versions."""

    dataset: Dataset
    num_samples: int
    num_corrections: int
    versions: tuple[Version, ...]


def load_version_snapshot(
    reference: Reference, access: DatabaseAccess, image_size: ImageSize | None = None
) -> Snapshot:
    """Map the snapshot of a version, the newest if none is named; read its images if they are not stored yet.

    Args:
        image_size: side in pixels that its images are resized to; None for their own.

    Raises:
        DataError: there is no such data set or version, or the database does not hold what the version was frozen from.
        DatabaseError: the database cannot be reached, or refuses.
        StorageError: the disk refused the snapshot; nothing is left of it.
    """
    with open_database(access) as database:
        version = database.run(lambda: find_version(database, reference))
        stores = find_stores(access.dataset_folder)
        stored = find_stored(stores, version.digest, version.dataset.name)
        if stored is None:
            with open_content(database, version.dataset, version.selection) as content:
                stored = store_content(stores, content, f"version {version.reference}", digest=version.digest)
        if image_size not in (None, stored.image_size):
            stored = resize_snapshot(stores, stored, image_size)
        return replace(stored, database=str(version.reference))


def find_dataset(database: Database, name: str) -> Dataset:
    """Find a data set by its name.

    Raises:
        DatabaseError: there is none of this name.
    """
    with database.reading() as connection:
        row = connection.execute(select(datasets).where(datasets.c.name == name)).one_or_none()
        if row is not None:
            return build_dataset(row)
        names = connection.execute(select(datasets.c.name).order_by(datasets.c.name)).scalars().all()
    have = f"it has {', '.join(names)}" if names else "it has none yet; `image_classifier data ingest` adds one"
    raise DatabaseError(f"{database.place.title} has no data set {name}: {have}")


def find_version(database: Database, reference: Reference) -> Version:
    """Find a version, the newest if none is named.

    Raises:
        DatabaseError: there is no such data set or version.
    """
    dataset = find_dataset(database, reference.name)
    found = list_versions(database, dataset)
    if not found:
        raise DatabaseError(
            f"the data set {dataset.name} has no version yet: finish its ingest, or create a version with "
            f"`image_classifier data snapshot --dataset {shlex.quote(dataset.name)}`"
        )
    for version in found:
        if version.number == (reference.version or found[-1].number):
            return version
    raise DatabaseError(
        f"the data set {dataset.name} has no version {reference.version}: it has 1 to {found[-1].number}"
    )


def list_versions(database: Database, dataset: Dataset) -> list[Version]:
    """List the versions of a data set, the newest last."""
    query = select(versions).where(versions.c.dataset_id == dataset.id).order_by(versions.c.number)
    with database.reading() as connection:
        return [build_version(dataset, row) for row in connection.execute(query)]


def list_datasets(database: Database) -> list[Summary]:
    """List the data sets by name."""
    with database.reading() as connection:
        found = [build_dataset(row) for row in connection.execute(select(datasets).order_by(datasets.c.name))]
    summaries = []
    for dataset in found:
        selection = find_selection(database, dataset, None, {})
        listed = tuple(list_versions(database, dataset))
        summaries.append(Summary(dataset, selection.num_samples, selection.num_corrections, listed))
    return summaries


def find_selection(
    database: Database, dataset: Dataset, as_of: datetime | None, conditions: Mapping[str, Sequence[str]]
) -> Selection:
    """Find what there is by now, or was at a moment.

    Raises:
        DataError: a condition names what is no class, or no split.
    """
    for allowed, name in ((dataset.classes, "class"), (PARTS, "split")):
        unknown = [value for value in conditions.get(name, ()) if value not in allowed]
        if unknown:
            raise DataError(f"{dataset.name} has no {name} {unknown[0]!a}: it has {', '.join(allowed)}")
    with database.reading() as connection:
        num_samples = count_rows(connection, samples.c.position, dataset, as_of)
        num_corrections = count_rows(connection, corrections.c.number, dataset, as_of)
    return Selection(num_samples, num_corrections, {name: sorted(set(conditions[name])) for name in sorted(conditions)})


@contextmanager
def open_content(database: Database, dataset: Dataset, selection: Selection) -> Iterator[Content]:
    """Give a selection to be read while its batches are gone through: never more of it is in memory than a batch."""
    parts = {part: _read_split(database, dataset, selection, part) for part in PARTS}
    try:
        yield Content(dataset.name, dataset.classes, parts, image_size=dataset.image_size)
    finally:
        for split in parts.values():
            split.close()  # with its transaction, where it was not gone through to the end


def _read_split(database: Database, dataset: Dataset, selection: Selection, split: str) -> Generator[Batch, None, None]:
    """Read the images of a split; where the connection is lost, go on after the last one that came."""
    last, num_losses = -1, 0
    shape = build_shape(dataset.image_size)
    num_rows = max(1, _READ_BYTES // math.prod(shape))
    while True:
        try:
            query = _build_query(dataset, selection, split).where(samples.c.position > last)
            with (
                database.reading() as connection,
                connection.execute(query, execution_options={"yield_per": num_rows}) as result,
            ):
                for rows in result.partitions():
                    database.tick()
                    positions, images, labels = zip(*rows, strict=True)
                    pixels = np.frombuffer(b"".join(images), np.uint8)
                    yield pixels.reshape(-1, *shape), np.array(labels, np.int64)
                    last, num_losses = positions[-1], 0
                    database.tick()  # what was done with them took time, too
            return
        except DBAPIError as error:
            num_losses += 1
            database.recover(error, num_losses)


def _build_query(dataset: Dataset, selection: Selection, split: str) -> Select[tuple[int, bytes, int]]:
    """Build the query for position, image and label of the samples of a split, in their order."""
    origin, label = join_labels(dataset, selection)
    query = select(samples.c.position, samples.c.image, label).select_from(origin)
    query = query.where(*build_conditions(dataset, selection, label), samples.c.split == split)
    return query.order_by(samples.c.position)


def join_labels(dataset: Dataset, selection: Selection) -> tuple[FromClause, ColumnElement[int]]:
    """Build the samples, joined with what it takes to tell their labels, and those labels."""
    if not selection.num_corrections:
        return samples, samples.c.label
    newest = (
        select(corrections.c.position, func.max(corrections.c.number).label("number"))
        .where(corrections.c.dataset_id == dataset.id, corrections.c.number < selection.num_corrections)
        .group_by(corrections.c.position)
        .subquery()
    )
    corrected = (
        select(corrections.c.position, corrections.c.label)
        .join(newest, corrections.c.number == newest.c.number)
        .where(corrections.c.dataset_id == dataset.id)
        .subquery()
    )
    origin = samples.outerjoin(corrected, samples.c.position == corrected.c.position)
    return origin, func.coalesce(corrected.c.label, samples.c.label)


def build_conditions(dataset: Dataset, selection: Selection, label: ColumnElement[int]) -> list[ColumnElement[bool]]:
    conditions = [samples.c.dataset_id == dataset.id, samples.c.position < selection.num_samples]
    for name, values in selection.conditions.items():
        if name == "class":
            conditions.append(label.in_([dataset.classes.index(value) for value in values]))
        else:
            conditions.append(samples.c[name].in_(values))
    return conditions


def count_rows(connection: Connection, column: Any, dataset: Dataset, as_of: datetime | None) -> int:
    """Count the rows of a log, whose numbers begin with 0, up to a moment."""
    table = column.table
    query = select(column).where(table.c.dataset_id == dataset.id).order_by(column.desc()).limit(1)
    if as_of is not None:
        query = query.where(table.c.added_at <= as_of)
    last = connection.execute(query).scalar_one_or_none()
    return 0 if last is None else int(last) + 1


def find_moment(connection: Connection, table: Table | None = None, dataset: Dataset | None = None) -> datetime:
    """Find the server's time, or that of the newest row of a log if the clock was put back since."""
    now = datetime.now(UTC)
    if connection.dialect.name == "postgresql":
        now = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    if table is None or dataset is None:
        return now
    number = table.c.position if table is samples else table.c.number
    query = select(table.c.added_at).where(table.c.dataset_id == dataset.id).order_by(number.desc()).limit(1)
    last = connection.execute(query).scalar_one_or_none()
    return now if last is None else max(now, last)


def build_dataset(row: Any) -> Dataset:
    image_size = row.shape[-1] if row.shape else None
    if not is_image_size(image_size) or tuple(row.shape) != build_shape(image_size):
        raise DatabaseError(
            f"the data set {row.name} has images of shape {row.shape}, which this version does not support"
        )
    return Dataset(row.id, row.name, tuple(row.classes), image_size)


def build_version(dataset: Dataset, row: Any) -> Version:
    selection = Selection(row.num_samples, row.num_corrections, row.conditions)
    counts = row.num_train, row.num_validation, row.num_test
    return Version(dataset, row.number, selection, *counts, row.digest, row.added_at, row.added_by)


def map_labels(dataset: Dataset, classes: Sequence[str]) -> NDArray[np.int64]:
    """Build the label that each class of a source has in a data set: [number of the source's classes].

    Raises:
        DataError: the data set does not have one of the classes.
    """
    unknown = [name for name in classes if name not in dataset.classes]
    if unknown:
        raise DataError(
            f"{', '.join(unknown)} is not a class of the data set {dataset.name}, which has "
            f"{', '.join(dataset.classes)}: "
            "rename the classes of the source in its metadata.json, or choose another --dataset"
        )
    return np.array([dataset.classes.index(name) for name in classes], np.int64)
