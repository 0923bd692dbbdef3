"""Add indexes that keep lists and metrics fast however many jobs have ended."""

from alembic import op

revision = "0003"
down_revision = "0002"

INDEXES = {
    "ix_jobs_owner_id_state": ["owner_id", "state", "id"],
    "ix_jobs_owner_id_method": ["owner_id", "method", "id"],
    "ix_jobs_owner_id_model_id": ["owner_id", "model_id", "id"],
    "ix_jobs_finished_at": ["finished_at"],
}


def upgrade() -> None:
    for name, columns in INDEXES.items():
        op.create_index(name, "jobs", columns)


def downgrade() -> None:
    for name in INDEXES:
        op.drop_index(name, "jobs")
