"""Add attempts, priorities, what jobs require of workers, and the drain of workers."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"

QUEUED = sa.text("state = 'queued'")


def upgrade() -> None:
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.Uuid),
        sa.Column("attempt", sa.Integer),
        sa.Column(
            "owner_id", sa.Uuid, sa.ForeignKey("api_keys.id", name="fk_attempts_owner_id_api_keys"), nullable=False
        ),
        sa.Column("worker", sa.String, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("outcome", sa.String),
        sa.Column("error_code", sa.String),
        sa.PrimaryKeyConstraint("job_id", "attempt", name="pk_attempts"),
    )
    op.create_index("ix_attempts_owner_id_ended_at", "attempts", ["owner_id", "ended_at"])
    # The attempts that go on have a row, so that their end is recorded; their time counts from this upgrade.
    op.execute(
        "INSERT INTO attempts (job_id, attempt, owner_id, worker)"
        " SELECT id, attempt, owner_id, worker FROM jobs WHERE lease_expires_at IS NOT NULL"
    )
    op.add_column("jobs", sa.Column("priority", sa.Integer, server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("required_labels", JSONB, server_default="{}", nullable=False))
    op.add_column("jobs", sa.Column("required_memory_bytes", sa.BigInteger))
    op.drop_index("ix_jobs_queued", "jobs")
    op.create_index("ix_jobs_queued", "jobs", ["owner_id", sa.text("priority DESC"), "id"], postgresql_where=QUEUED)
    op.drop_column("jobs", "dispatched_at")
    op.add_column("workers", sa.Column("drain", sa.String))


def downgrade() -> None:
    op.drop_column("workers", "drain")
    op.add_column("jobs", sa.Column("dispatched_at", sa.DateTime(timezone=True)))
    op.drop_index("ix_jobs_queued", "jobs")
    op.create_index("ix_jobs_queued", "jobs", ["id"], postgresql_where=QUEUED)
    for column in ("required_memory_bytes", "required_labels", "priority"):
        op.drop_column("jobs", column)
    op.drop_table("attempts")
