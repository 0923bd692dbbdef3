"""Scopes and rotation of API keys; Hub tokens of keys and jobs; an index of the jobs that have not ended."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # Keys from before could do all that there was to do.
    op.add_column("api_keys", sa.Column("scopes", ARRAY(sa.Text), nullable=False, server_default="{read,submit}"))
    op.alter_column("api_keys", "scopes", server_default=None)
    op.add_column("api_keys", sa.Column("previous_sha256", sa.String))
    op.add_column("api_keys", sa.Column("previous_expires_at", sa.DateTime(timezone=True)))
    op.add_column("api_keys", sa.Column("hub_token", sa.LargeBinary))
    op.create_unique_constraint("uq_api_keys_previous_sha256", "api_keys", ["previous_sha256"])
    op.add_column("jobs", sa.Column("hub_token", sa.LargeBinary))
    not_ended = "state NOT IN ('succeeded', 'failed', 'cancelled')"
    op.create_index("ix_jobs_open", "jobs", ["owner_id"], postgresql_where=sa.text(not_ended))


def downgrade() -> None:
    op.drop_index("ix_jobs_open", "jobs")
    op.drop_column("jobs", "hub_token")
    for column in ("hub_token", "previous_expires_at", "previous_sha256", "scopes"):
        op.drop_column("api_keys", column)
