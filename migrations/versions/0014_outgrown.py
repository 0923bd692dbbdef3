"""The memory of the largest worker that was too small for a job."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("outgrown_memory_bytes", sa.BigInteger))


def downgrade() -> None:
    op.drop_column("jobs", "outgrown_memory_bytes")
