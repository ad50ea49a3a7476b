"""Freeze what a data set in the database holds into a version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import insert, select

from image_classifier.access import DatabaseAccess
from image_classifier.data.connection import Database
from image_classifier.data.database import (
    Dataset,
    Selection,
    Version,
    build_conditions,
    build_version,
    find_dataset,
    find_moment,
    find_selection,
    join_labels,
    list_versions,
    load_version_snapshot,
)
from image_classifier.data.merkle import HASH_BYTES, Tree, build_header, compute_header_digest, join_entries
from image_classifier.data.parts import PARTS
from image_classifier.data.revision import open_database
from image_classifier.data.schema import samples, versions
from image_classifier.data.snapshot import Snapshot, build_shape, check_counts
from image_classifier.errors import DataError
from image_classifier.progress import track

_READ_ENTRIES = 10_000  # labels and digests


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
    origin, label = join_labels(dataset, selection)
    with database.reading() as connection:
        first, trees = 0, {part: Tree() for part in PARTS}
        for row in connection.execute(query):
            begins = row.num_samples <= selection.num_samples and row.num_corrections == selection.num_corrections
            if begins and row.conditions == selection.conditions and row.trees is not None:
                first, trees = row.num_samples, _restore_trees(dataset, row.trees)
                break
        for part, tree in trees.items():
            added = select(label, samples.c.digest).select_from(origin).order_by(samples.c.position)
            added = added.where(*build_conditions(dataset, selection, label), samples.c.split == part)
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


def _find_equal_version(database: Database, dataset: Dataset, selection: Selection) -> Version | None:
    return next((version for version in list_versions(database, dataset) if version.selection == selection), None)


def _add_version(
    database: Database, dataset: Dataset, selection: Selection, digest: str, trees: Mapping[str, Tree]
) -> Version:
    """Add a version, unless somebody else has added the same meanwhile."""

    def add() -> None:
        with database.adding(dataset.id) as connection:
            query = select(versions).where(versions.c.dataset_id == dataset.id).order_by(versions.c.number)
            present = [build_version(dataset, row) for row in connection.execute(query)]
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
                    "added_at": find_moment(connection, versions, dataset),
                    "added_by": database.who,
                }
                connection.execute(insert(versions).values(**values))

    database.run(add)
    version = database.run(lambda: _find_equal_version(database, dataset, selection))
    assert version is not None
    return version
