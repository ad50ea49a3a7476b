"""PostgreSQL keeps images in their rows, as they are.

Beyond 2 kB it would try to compress them, which pixels do not yield to, and move them in pieces to a table beside.
"""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Keep new images in line, up to what fits into a page; those that are there already stay where they are."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE samples SET (toast_tuple_target = 8160)")
        op.execute("ALTER TABLE samples ALTER COLUMN image SET STORAGE EXTERNAL")
