"""Samples may belong to a validation part.

SQLite can change no constraint: there the table is copied, with its images, into one that has the new constraint.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Let the split be `validation`, and count its images in each version; those before have none."""
    count = sa.Column("num_validation", sa.Integer(), nullable=False, server_default="0")
    op.add_column("versions", count)
    with op.batch_alter_table("samples") as samples:
        samples.drop_constraint("ck_samples_split", type_="check")
        samples.alter_column("split", type_=sa.String(10), existing_type=sa.String(5), existing_nullable=False)
        samples.create_check_constraint("ck_samples_split", "split IN ('train', 'validation', 'test')")
