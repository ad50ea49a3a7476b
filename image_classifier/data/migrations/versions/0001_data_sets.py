"""Data sets, samples, corrections of labels, and versions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


# Over 50 lines: the tables as they were then, which nothing may change.
def upgrade() -> None:
    """Make the tables."""
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "datasets",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("classes", sa.JSON(), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.Column("added_at", moment, nullable=False),
        sa.Column("added_by", sa.Text(), nullable=False),
        sa.UniqueConstraint("name", name="uq_datasets_name"),
    )
    op.create_table(
        "samples",
        _reference_dataset("samples"),
        sa.Column("position", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("split", sa.String(5), nullable=False),
        sa.Column("label", sa.Integer(), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("occurrence", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("added_at", moment, nullable=False),
        sa.Column("added_by", sa.Text(), nullable=False),
        sa.Column("image", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("split IN ('train', 'test')", name="ck_samples_split"),
        sa.CheckConstraint("label >= 0", name="ck_samples_label"),
        sa.UniqueConstraint(
            "dataset_id", "split", "digest", "occurrence", name="uq_samples_dataset_id_split_digest_occurrence"
        ),
    )
    op.create_table(
        "corrections",
        _reference_dataset("corrections"),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("label", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("added_at", moment, nullable=False),
        sa.Column("added_by", sa.Text(), nullable=False),
        sa.CheckConstraint("label >= 0", name="ck_corrections_label"),
        sa.ForeignKeyConstraint(
            ["dataset_id", "position"], ["samples.dataset_id", "samples.position"], name="fk_corrections_samples"
        ),
    )
    op.create_table(
        "versions",
        _reference_dataset("versions"),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("num_samples", sa.Integer(), nullable=False),
        sa.Column("num_corrections", sa.Integer(), nullable=False),
        sa.Column("conditions", sa.JSON(), nullable=False),
        sa.Column("num_train", sa.Integer(), nullable=False),
        sa.Column("num_test", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("added_at", moment, nullable=False),
        sa.Column("added_by", sa.Text(), nullable=False),
    )


def _reference_dataset(table: str) -> sa.Column[int]:
    return sa.Column(
        "dataset_id", sa.Integer(), sa.ForeignKey("datasets.id", name=f"fk_{table}_datasets"), primary_key=True
    )
