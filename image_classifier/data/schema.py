"""The database tables: an append-only log, so a version of a data set is just two row counts and a digest.

::

    datasets     name, classes, shape of an image
    samples      position 0, 1, 2 ... in a data set; image, label, split, source, when and by whom it was added
    corrections  number 0, 1, 2 ... in a data set; the label that a sample has from then on; the newest one counts
    versions     number 1, 2, 3 ... of a data set: its first num_samples samples, under its first num_corrections
                 corrections, as far as the conditions let them through; and the digest that this must have

Nothing is changed or removed, and whoever adds to a data set holds its lock; so what a version holds cannot change,
and does not hang on the order in which a server keeps or returns its rows.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from image_classifier.data.parts import PARTS

REVISION = "0004"
"""The newest migration: what a database must have been upgraded to."""


class Moment(TypeDecorator[datetime]):
    """A moment in UTC, also where the database keeps no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn a moment into UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        """Turn what was stored into a moment."""
        if value is None:
            return None
        moment: datetime = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return moment


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

datasets = Table(
    "datasets",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("classes", JSON, nullable=False),
    Column("shape", JSON, nullable=False),
    Column("added_at", Moment, nullable=False),
    Column("added_by", Text, nullable=False),
)

samples = Table(
    "samples",
    metadata,
    Column("dataset_id", ForeignKey("datasets.id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("split", String(10), CheckConstraint(f"split IN {PARTS}", name="split"), nullable=False),
    Column("label", Integer, CheckConstraint("label >= 0", name="label"), nullable=False),
    # sha256 of the image, and which of those that have it in this split: a source may hold an image twice.
    Column("digest", LargeBinary(32), nullable=False),
    Column("occurrence", Integer, nullable=False),
    Column("source", Text, nullable=False),
    Column("added_at", Moment, nullable=False),
    Column("added_by", Text, nullable=False),
    # uint8 in the data set's shape; last, so that SQLite need not read past it for the others.
    Column("image", LargeBinary, nullable=False),
    UniqueConstraint("dataset_id", "split", "digest", "occurrence"),
)

corrections = Table(
    "corrections",
    metadata,
    Column("dataset_id", ForeignKey("datasets.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, nullable=False),
    Column("label", Integer, CheckConstraint("label >= 0", name="label"), nullable=False),
    Column("reason", Text, nullable=False),
    Column("added_at", Moment, nullable=False),
    Column("added_by", Text, nullable=False),
    ForeignKeyConstraint(["dataset_id", "position"], ["samples.dataset_id", "samples.position"]),
)

versions = Table(
    "versions",
    metadata,
    Column("dataset_id", ForeignKey("datasets.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("num_samples", Integer, nullable=False),
    Column("num_corrections", Integer, nullable=False),
    Column("conditions", JSON, nullable=False),
    Column("num_train", Integer, nullable=False),
    Column("num_validation", Integer, nullable=False, server_default="0"),
    Column("num_test", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    # What it takes to hash on, where images are added: `merkle.Tree` of each part. Versions of before have none.
    Column("trees", JSON, nullable=True),
    Column("added_at", Moment, nullable=False),
    Column("added_by", Text, nullable=False),
)
