"""Create the tables of keys, jobs, events, rounds, idempotency, webhooks and workers."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

NOW = sa.text("now()")


def _time(name: str, nullable: bool = True, **options: object) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, **options)  # type: ignore[arg-type]


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("secret_sha256", sa.String, nullable=False),
        _time("created_at", nullable=False, server_default=NOW),
        _time("revoked_at"),
        _time("last_used_at"),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("secret_sha256", name="uq_api_keys_secret_sha256"),
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("info", JSONB, nullable=False),
        _time("started_at", nullable=False, server_default=NOW),
        _time("last_seen_at", nullable=False, server_default=NOW),
        sa.PrimaryKeyConstraint("name", name="pk_workers"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("owner_id", sa.Uuid, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("request", JSONB, nullable=False),
        sa.Column("model_id", sa.String, nullable=False),
        sa.Column("method", sa.String, nullable=False),
        sa.Column("labels", JSONB, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("worker", sa.String),
        _time("lease_expires_at"),
        _time("dispatched_at"),
        _time("not_before"),
        sa.Column("pause_requested", sa.Boolean, nullable=False),
        sa.Column("progress", JSONB),
        sa.Column("error", JSONB),
        sa.Column("result", JSONB),
        sa.Column("report", JSONB),
        _time("created_at", nullable=False, server_default=NOW),
        _time("updated_at", nullable=False, server_default=NOW),
        _time("started_at"),
        _time("finished_at"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.ForeignKeyConstraint(["owner_id"], ["api_keys.id"], name="fk_jobs_owner_id_api_keys"),
    )
    op.create_index("ix_jobs_queued", "jobs", ["id"], postgresql_where=sa.text("state = 'queued'"))
    op.create_index(
        "ix_jobs_leased", "jobs", ["lease_expires_at"], postgresql_where=sa.text("lease_expires_at IS NOT NULL")
    )
    op.create_index("ix_jobs_owner_id", "jobs", ["owner_id", "id"])
    op.create_index("ix_jobs_labels", "jobs", ["labels"], postgresql_using="gin")
    op.create_table(
        "job_events",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("type", sa.String, nullable=False),
        sa.Column("data", JSONB, nullable=False),
        _time("created_at", nullable=False, server_default=NOW),
        sa.PrimaryKeyConstraint("id", name="pk_job_events"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_events_job_id_jobs", ondelete="CASCADE"),
    )
    op.create_index("ix_job_events_job_id", "job_events", ["job_id", "id"])
    op.create_table(
        "job_rounds",
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("data", JSONB, nullable=False),
        _time("created_at", nullable=False, server_default=NOW),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_job_rounds"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_rounds_job_id_jobs", ondelete="CASCADE"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner_id", sa.Uuid, nullable=False),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("request_sha256", sa.String, nullable=False),
        sa.Column("job_id", sa.Uuid),
        _time("created_at", nullable=False, server_default=NOW),
        sa.PrimaryKeyConstraint("owner_id", "key", name="pk_idempotency_keys"),
        sa.ForeignKeyConstraint(["owner_id"], ["api_keys.id"], name="fk_idempotency_keys_owner_id_api_keys"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_idempotency_keys_job_id_jobs", ondelete="SET NULL"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.create_index("ix_idempotency_keys_job_id", "idempotency_keys", ["job_id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("url", sa.String, nullable=False),
        sa.Column("payload", JSONB, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        _time("next_attempt_at", server_default=NOW),
        _time("delivered_at"),
        sa.Column("last_error", sa.String),
        _time("created_at", nullable=False, server_default=NOW),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_deliveries"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_webhook_deliveries_job_id_jobs", ondelete="CASCADE"),
    )
    op.create_index(
        "ix_webhook_deliveries_due",
        "webhook_deliveries",
        ["next_attempt_at"],
        postgresql_where=sa.text("next_attempt_at IS NOT NULL"),
    )
    op.create_index("ix_webhook_deliveries_job_id", "webhook_deliveries", ["job_id"])


def downgrade() -> None:
    for table in (
        "webhook_deliveries", "idempotency_keys", "job_rounds", "job_events", "jobs", "workers", "api_keys"
    ):  # fmt: skip
        op.drop_table(table)
