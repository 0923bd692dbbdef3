"""Record from which job a job is derived."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("derived_from", sa.Uuid))


def downgrade() -> None:
    op.drop_column("jobs", "derived_from")
