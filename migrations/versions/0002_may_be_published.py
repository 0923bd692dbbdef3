"""Record whether publishing began in some attempt at a job."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    column = sa.Column("may_be_published", sa.Boolean, nullable=False, server_default=sa.false())
    op.add_column("jobs", column, if_not_exists=True)  # some databases at 0001 have the column
    op.alter_column("jobs", "may_be_published", server_default=None)
    op.execute("UPDATE jobs SET may_be_published = true WHERE state = 'publishing'")


def downgrade() -> None:
    op.drop_column("jobs", "may_be_published")
