"""A version keeps the trees of its digest, so that the next one is hashed on from there."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the trees; versions of before have none, and keep the digest that they have."""
    op.add_column("versions", sa.Column("trees", sa.JSON(), nullable=True))
