"""Keep checkpoints in the database and artifacts in an object store.

A job that has not ended begins anew: its checkpoints were files of one machine.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0009"
down_revision = "0008"

UNFINISHED = "state NOT IN ('succeeded', 'failed', 'cancelled')"


def upgrade() -> None:
    op.execute(f"DELETE FROM job_steps WHERE job_id IN (SELECT id FROM jobs WHERE {UNFINISHED})")
    op.drop_column("job_steps", "path")
    op.drop_column("job_steps", "sha256")
    op.add_column("job_steps", sa.Column("state", sa.LargeBinary))
    op.add_column("jobs", sa.Column("losses", sa.Integer, nullable=False, server_default="0"))
    op.alter_column("jobs", "losses", server_default=None)
    op.add_column("jobs", sa.Column("exported_at", sa.DateTime(timezone=True)))
    op.add_column("jobs", sa.Column("last_error", JSONB))
    op.add_column("jobs", sa.Column("waiting_since", sa.DateTime(timezone=True)))
    op.execute("UPDATE jobs SET exported_at = finished_at WHERE state = 'succeeded'")
    op.add_column("jobs", sa.Column("expires_at", sa.DateTime(timezone=True)))
    op.add_column("jobs", sa.Column("expired", sa.Boolean, nullable=False, server_default="false"))
    op.alter_column("jobs", "expired", server_default=None)
    op.create_index(
        "ix_jobs_expires_at", "jobs", ["expires_at"], postgresql_where=sa.text("expires_at IS NOT NULL AND NOT expired")
    )
    op.create_table(
        "stored_files",
        sa.Column("job_id", sa.Uuid, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("owner_id", sa.Uuid, sa.ForeignKey("api_keys.id"), nullable=False, index=True),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
    )
    op.create_table(
        "storage_deletions",
        sa.Column("folder", sa.String, primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.create_table(
        "storage_identity",
        sa.Column("only", sa.Boolean, primary_key=True),
        sa.Column("storage_id", sa.String, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("storage_identity")
    op.drop_table("storage_deletions")
    op.drop_table("stored_files")
    op.drop_index("ix_jobs_expires_at", "jobs")
    op.drop_column("jobs", "expired")
    op.drop_column("jobs", "expires_at")
    op.drop_column("jobs", "waiting_since")
    op.drop_column("jobs", "last_error")
    op.drop_column("jobs", "exported_at")
    op.drop_column("jobs", "losses")
    op.drop_column("job_steps", "state")
    # The checkpoints of this release are not files, so the steps of jobs that have not ended are of no use.
    op.execute(f"DELETE FROM job_steps WHERE job_id IN (SELECT id FROM jobs WHERE {UNFINISHED})")
    op.add_column("job_steps", sa.Column("path", sa.String, nullable=False, server_default=""))
    op.add_column("job_steps", sa.Column("sha256", sa.String, nullable=False, server_default=""))
    op.alter_column("job_steps", "path", server_default=None)
    op.alter_column("job_steps", "sha256", server_default=None)
