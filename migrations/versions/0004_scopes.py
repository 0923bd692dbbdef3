"""Add scopes and rotation of API keys, Hub tokens of keys and jobs, and indexes for limits and metrics."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # Existing keys keep all the rights that existed before scopes.
    op.add_column("api_keys", sa.Column("scopes", ARRAY(sa.Text), nullable=False, server_default="{read,submit}"))
    op.alter_column("api_keys", "scopes", server_default=None)
    op.add_column("api_keys", sa.Column("previous_sha256", sa.String))
    op.add_column("api_keys", sa.Column("previous_expires_at", sa.DateTime(timezone=True)))
    op.add_column("api_keys", sa.Column("hub_token", sa.LargeBinary))
    op.create_unique_constraint("uq_api_keys_previous_sha256", "api_keys", ["previous_sha256"])
    op.add_column("jobs", sa.Column("hub_token", sa.LargeBinary))
    op.add_column("jobs", sa.Column("request_id", sa.String))
    op.create_index("ix_job_events_retries", "job_events", ["created_at"], postgresql_where=sa.text("type = 'retry'"))
    op.create_index("ix_job_rounds_created_at", "job_rounds", ["created_at"])
    given_up = sa.text("next_attempt_at IS NULL AND delivered_at IS NULL")
    op.create_index("ix_webhook_deliveries_given_up", "webhook_deliveries", ["created_at"], postgresql_where=given_up)
    not_ended = "state NOT IN ('succeeded', 'failed', 'cancelled')"
    op.create_index("ix_jobs_open", "jobs", ["owner_id"], postgresql_where=sa.text(not_ended))


def downgrade() -> None:
    op.drop_index("ix_webhook_deliveries_given_up", "webhook_deliveries")
    op.drop_index("ix_job_rounds_created_at", "job_rounds")
    op.drop_index("ix_job_events_retries", "job_events")
    op.drop_index("ix_jobs_open", "jobs")
    op.drop_column("jobs", "request_id")
    op.drop_column("jobs", "hub_token")
    for column in ("hub_token", "previous_expires_at", "previous_sha256", "scopes"):
        op.drop_column("api_keys", column)
