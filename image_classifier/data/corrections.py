"""Correct labels of images in the database, one by one or from a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import case, insert, select

from image_classifier.data.connection import Database
from image_classifier.data.database import (
    Version,
    build_conditions,
    count_rows,
    find_moment,
    find_version,
    join_labels,
    map_labels,
)
from image_classifier.data.freezing import freeze
from image_classifier.data.parts import PARTS
from image_classifier.data.schema import corrections, samples
from image_classifier.errors import DataError, SettingsError
from image_classifier.files import read_file
from image_classifier.progress import track
from image_classifier.references import Reference
from image_classifier.text import one_line

MAX_CORRECTIONS_BYTES = 2**23


@dataclass(frozen=True)
class Correction:
    """A label that takes the place of an image's.

    Attributes:
        image: number of the image in a version, counted from 0, the training images first.
        label: name of the class.
    """

    image: int
    label: str


def read_corrections(path: Path) -> list[Correction]:
    """Read a CSV file with the columns image and label.

    Raises:
        SettingsError: it cannot be read, lacks a column, or has what is no number.
    """
    wanted = []
    try:
        file = io.StringIO(read_file(path, MAX_CORRECTIONS_BYTES).decode("utf-8-sig"), newline="")
        for number, row in enumerate(csv.DictReader(file), start=2):
            image = (row.get("image") or "").strip()
            if not image.isdecimal() or len(image) > 18 or row.get("label") is None:
                raise SettingsError(
                    f"--corrections: line {number} of {path} needs a number under image and a class under label"
                )
            wanted.append(Correction(int(image), row["label"].strip()))
    except (OSError, ValueError, csv.Error) as error:
        raise SettingsError(f"--corrections: {path} cannot be read: {one_line(error)}; correct it") from None
    return wanted


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
            number = count_rows(connection, corrections.c.number, dataset, None)
            fixed = {"dataset_id": dataset.id, "reason": reason, "added_by": database.who}
            fixed["added_at"] = find_moment(connection, corrections, dataset)
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


def _list_labels(database: Database, version: Version) -> list[tuple[int, int]]:
    """List position and label of the images of a version, in its order."""
    dataset, selection = version.dataset, version.selection
    origin, label = join_labels(dataset, selection)
    query = select(samples.c.position, label).select_from(origin)
    query = query.where(*build_conditions(dataset, selection, label))
    with database.reading() as connection:
        order = case({part: place for place, part in enumerate(PARTS)}, value=samples.c.split)
        rows = connection.execute(query.order_by(order, samples.c.position))
        return [(position, label) for position, label in rows]
