"""Keep data sets that clients upload, and deletions in the object store that are due later."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("owner_id", sa.Uuid, sa.ForeignKey("api_keys.id"), nullable=False, index=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("lines", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.alter_column("storage_deletions", "created_at", new_column_name="due_at")


def downgrade() -> None:
    op.execute(
        "INSERT INTO storage_deletions (folder) SELECT 'datasets/' || owner_id || '/' || id || '/' FROM datasets"
    )
    op.alter_column("storage_deletions", "due_at", new_column_name="created_at")
    op.drop_table("datasets")
