"""Data sets in a database: what is in them, their versions, adding to them, and a version as a snapshot.

`schema` says why a version is fixed by two numbers and its conditions. A version is read in the order of the
positions, the training images first; so the same version has the same digest from any server on any day.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, FromClause, Select, Table, case, func, insert, select, text
from sqlalchemy.exc import DBAPIError

from image_classifier.config import DEFAULT_IMAGE_SIZE, DatabaseAccess, ImageSize, is_image_size
from image_classifier.data.connection import Database, copying, open_database
from image_classifier.data.content import Batch, Content
from image_classifier.data.merkle import HASH_BYTES, Tree, build_header, compute_header_digest, join_entries
from image_classifier.data.parts import PARTS
from image_classifier.data.schema import corrections, datasets, samples, versions
from image_classifier.data.snapshot import (
    Snapshot,
    build_shape,
    check_counts,
    find_stored,
    find_stores,
    resize_snapshot,
    store_content,
)
from image_classifier.errors import DatabaseError, DataError
from image_classifier.progress import track
from image_classifier.references import Reference

CONDITIONS = ("class", "split", "source", "added_by")
"""What a version may be limited by; each takes some of the values that samples have."""

_READ_BYTES = 1000 * 3072  # of images that are read at once
_READ_ENTRIES = 10_000  # labels and digests


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


@dataclass(frozen=True)
class Correction:
    """A label that takes the place of an image's.

    Attributes:
        image: number of the image in a version, counted from 0, the training images first.
        label: name of the class.
    """

    image: int
    label: str


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


# Reading.


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


@track("freezing the data set")
def freeze_snapshot(
    name: str, access: DatabaseAccess, *, as_of: datetime | None = None, conditions: Mapping[str, Sequence[str]]
) -> Snapshot:
    """Freeze what a data set holds, or held at a moment, into a version, unless it is one already; map its snapshot.

    Raises:
        DataError: there is no such data set, or nothing to train or to test with is left of it.
        DatabaseError: the database cannot be reached, or refuses.
        StorageError: the disk refused the snapshot; nothing is left of it.
    """
    with open_database(access) as database:
        dataset = database.run(lambda: find_dataset(database, name))
        selection = database.run(lambda: find_selection(database, dataset, as_of, conditions))
        version = freeze(database, dataset, selection)
    return load_version_snapshot(version.reference, access)


def find_dataset(database: Database, name: str) -> Dataset:
    """Find a data set by its name.

    Raises:
        DatabaseError: there is none of this name.
    """
    with database.reading() as connection:
        row = connection.execute(select(datasets).where(datasets.c.name == name)).one_or_none()
        if row is not None:
            return _build_dataset(row)
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
            f"`image_classifier data snapshot --dataset {dataset.name}`"
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
        return [_build_version(dataset, row) for row in connection.execute(query)]


def list_datasets(database: Database) -> list[Summary]:
    """List the data sets by name."""
    with database.reading() as connection:
        found = [_build_dataset(row) for row in connection.execute(select(datasets).order_by(datasets.c.name))]
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
        num_samples = _count(connection, samples.c.position, dataset, as_of)
        num_corrections = _count(connection, corrections.c.number, dataset, as_of)
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
    origin, label = _join_labels(dataset, selection)
    query = select(samples.c.position, samples.c.image, label).select_from(origin)
    query = query.where(*_build_conditions(dataset, selection, label), samples.c.split == split)
    return query.order_by(samples.c.position)


def _join_labels(dataset: Dataset, selection: Selection) -> tuple[FromClause, ColumnElement[int]]:
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


def _build_conditions(dataset: Dataset, selection: Selection, label: ColumnElement[int]) -> list[ColumnElement[bool]]:
    conditions = [samples.c.dataset_id == dataset.id, samples.c.position < selection.num_samples]
    for name, values in selection.conditions.items():
        if name == "class":
            conditions.append(label.in_([dataset.classes.index(value) for value in values]))
        else:
            conditions.append(samples.c[name].in_(values))
    return conditions


def _list_labels(database: Database, version: Version) -> list[tuple[int, int]]:
    """List position and label of the images of a version, in its order."""
    dataset, selection = version.dataset, version.selection
    origin, label = _join_labels(dataset, selection)
    query = select(samples.c.position, label).select_from(origin)
    query = query.where(*_build_conditions(dataset, selection, label))
    with database.reading() as connection:
        order = case({part: place for place, part in enumerate(PARTS)}, value=samples.c.split)
        rows = connection.execute(query.order_by(order, samples.c.position))
        return [(position, label) for position, label in rows]


def _count(connection: Connection, column: Any, dataset: Dataset, as_of: datetime | None) -> int:
    """Count the rows of a log, whose numbers begin with 0, up to a moment."""
    table = column.table
    query = select(column).where(table.c.dataset_id == dataset.id).order_by(column.desc()).limit(1)
    if as_of is not None:
        query = query.where(table.c.added_at <= as_of)
    last = connection.execute(query).scalar_one_or_none()
    return 0 if last is None else int(last) + 1


def _find_moment(connection: Connection, table: Table | None = None, dataset: Dataset | None = None) -> datetime:
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


def _build_dataset(row: Any) -> Dataset:
    image_size = row.shape[-1] if row.shape else None
    if not is_image_size(image_size) or tuple(row.shape) != build_shape(image_size):
        raise DatabaseError(
            f"the data set {row.name} has images of shape {row.shape}, which this version does not support"
        )
    return Dataset(row.id, row.name, tuple(row.classes), image_size)


def _build_version(dataset: Dataset, row: Any) -> Version:
    selection = Selection(row.num_samples, row.num_corrections, row.conditions)
    counts = row.num_train, row.num_validation, row.num_test
    return Version(dataset, row.number, selection, *counts, row.digest, row.added_at, row.added_by)


# Adding.


def get_or_add_dataset(database: Database, name: str, classes: Sequence[str], image_size: int) -> Dataset:
    """Find a data set, or add it with these classes and images of this side in pixels.

    Raises:
        DataError: it has images of another size.
    """
    with database.adding() as connection:
        row = connection.execute(select(datasets).where(datasets.c.name == name)).one_or_none()
        if row is None:
            values = {"name": name, "classes": list(classes), "shape": build_shape(image_size)}
            signature = {"added_at": _find_moment(connection), "added_by": database.who}
            connection.execute(insert(datasets).values(**values, **signature))
            row = connection.execute(select(datasets).where(datasets.c.name == name)).one()
    dataset = _build_dataset(row)
    if dataset.image_size != image_size:
        raise DataError(
            f"the data set {name} has images of {dataset.image_size} x {dataset.image_size} pixels instead of "
            f"{image_size} x {image_size}: give --image_size {dataset.image_size}, or another --dataset"
        )
    return dataset


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
            position = _count(connection, samples.c.position, dataset, None)
            # If all that is there comes from this ingest, none of this chunk is.
            present = self._find_present(connection, chunk.split, keys) if position != self._num_added else {}
            moment = _find_moment(connection, samples, dataset)
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


def freeze_newest(database: Database, dataset: Dataset) -> Version:
    """Freeze all that is in a data set into a version, unless it is one already."""
    selection = database.run(lambda: find_selection(database, dataset, None, {}))
    return freeze(database, dataset, selection)


def freeze(database: Database, dataset: Dataset, selection: Selection) -> Version:
    """Freeze a selection into a version, unless it is one already.

    The digest is computed from that of a version with fewer samples, if there is one, and from the labels and the
    images' sha256 of what was added since: no image is read.
    """
    version = database.run(lambda: _find_equal_version(database, dataset, selection))
    if version is not None:
        return version
    trees = database.run(lambda: _grow_trees(database, dataset, selection))
    check_counts(f"this part of {dataset.name}", {part: tree.num_entries for part, tree in trees.items()})
    digest = compute_header_digest(build_header(dataset.classes, trees, build_shape(dataset.image_size)))
    return _add_version(database, dataset, selection, digest, trees)


def _grow_trees(database: Database, dataset: Dataset, selection: Selection) -> dict[str, Tree]:
    """Compute the tree of each part of a selection from those of the largest version that it begins with."""
    query = select(versions).where(versions.c.dataset_id == dataset.id).order_by(versions.c.num_samples.desc())
    origin, label = _join_labels(dataset, selection)
    with database.reading() as connection:
        first, trees = 0, {part: Tree() for part in PARTS}
        for row in connection.execute(query):
            begins = row.num_samples <= selection.num_samples and row.num_corrections == selection.num_corrections
            if begins and row.conditions == selection.conditions and row.trees is not None:
                first, trees = row.num_samples, _restore_trees(dataset, row.trees)
                break
        for part, tree in trees.items():
            added = select(label, samples.c.digest).select_from(origin).order_by(samples.c.position)
            added = added.where(*_build_conditions(dataset, selection, label), samples.c.split == part)
            added = added.where(samples.c.position >= first)
            for rows in connection.execute(added, execution_options={"yield_per": _READ_ENTRIES}).partitions():
                labels, digests = zip(*rows, strict=True)
                if {len(digest) for digest in digests} != {HASH_BYTES}:
                    raise _changed_error(dataset)
                tree.extend(join_entries(np.array(labels, np.int64), b"".join(digests)))
                database.tick()
    return trees


def _restore_trees(dataset: Dataset, states: Any) -> dict[str, Tree]:
    try:
        return {part: Tree.from_json(states[part]) for part in PARTS}
    except (KeyError, TypeError, ValueError) as error:
        raise _changed_error(dataset) from error


def _changed_error(dataset: Dataset) -> DataError:
    return DataError(f"rows of {dataset.name} were changed by another program; restore the database from a backup")


@track("correcting labels")
def correct_labels(
    database: Database, reference: Reference, wanted: Sequence[Correction], reason: str
) -> tuple[Version, int]:
    """Correct labels of images of a version; return the new version, and how many labels it changed.

    The new version is the newest one under these corrections.

    Raises:
        DataError: a label is no class, or a number is no image of the version.
    """
    version = database.run(lambda: find_version(database, reference))
    newest = database.run(lambda: find_version(database, Reference(reference.name)))
    dataset = version.dataset
    labels = map_labels(dataset, [correction.label for correction in wanted]).tolist()
    images = database.run(lambda: _list_labels(database, version))
    current = dict(database.run(lambda: _list_labels(database, newest)))
    rows = {}
    for correction, label in zip(wanted, labels, strict=True):
        if not 0 <= correction.image < len(images):
            raise DataError(f"{version.reference} has no image {correction.image}: it has 0 to {len(images) - 1}")
        position = images[correction.image][0]
        if current.get(position) != label:
            rows[position] = label

    def add() -> int:
        with database.adding(dataset.id) as connection:
            number = _count(connection, corrections.c.number, dataset, None)
            fixed = {"dataset_id": dataset.id, "reason": reason, "added_by": database.who}
            fixed["added_at"] = _find_moment(connection, corrections, dataset)
            values = [
                {**fixed, "number": number + offset, "position": position, "label": label}
                for offset, (position, label) in enumerate(rows.items())
            ]
            if values:
                connection.execute(insert(corrections), values)
            return number + len(values)

    num_corrections = database.run(add)
    selection = replace(newest.selection, num_corrections=num_corrections)
    return freeze(database, dataset, selection), len(rows)


def _find_equal_version(database: Database, dataset: Dataset, selection: Selection) -> Version | None:
    return next((version for version in list_versions(database, dataset) if version.selection == selection), None)


def _add_version(
    database: Database, dataset: Dataset, selection: Selection, digest: str, trees: Mapping[str, Tree]
) -> Version:
    """Add a version, unless somebody else has added the same meanwhile."""

    def add() -> None:
        with database.adding(dataset.id) as connection:
            query = select(versions).where(versions.c.dataset_id == dataset.id).order_by(versions.c.number)
            present = [_build_version(dataset, row) for row in connection.execute(query)]
            if selection not in [version.selection for version in present]:
                values = {
                    "dataset_id": dataset.id,
                    "number": len(present) + 1,
                    "num_samples": selection.num_samples,
                    "num_corrections": selection.num_corrections,
                    "conditions": dict(selection.conditions),
                    **{f"num_{part}": tree.num_entries for part, tree in trees.items()},
                    "digest": digest,
                    "trees": {part: tree.to_json() for part, tree in trees.items()},
                    "added_at": _find_moment(connection, versions, dataset),
                    "added_by": database.who,
                }
                connection.execute(insert(versions).values(**values))

    database.run(add)
    version = database.run(lambda: _find_equal_version(database, dataset, selection))
    assert version is not None
    return version
