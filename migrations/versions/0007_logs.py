"""Keep the log lines of jobs, and take the service's paths out of results.

A result named the address of a commit in the folder to which models are published; repository and commit remain.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

WITHOUT_PATHS = """
    UPDATE jobs SET result = result - 'url' WHERE result ->> 'url' LIKE 'file:%';
    UPDATE jobs SET result = jsonb_set(result, '{targets}', (
        SELECT jsonb_agg(CASE WHEN target ->> 'url' LIKE 'file:%' THEN target - 'url' ELSE target END ORDER BY number)
        FROM jsonb_array_elements(result -> 'targets') WITH ORDINALITY AS targets (target, number)))
    WHERE jsonb_typeof(result -> 'targets') = 'array' AND jsonb_array_length(result -> 'targets') > 0
        AND result -> 'targets' @? '$[*].url ? (@ starts with "file:")'
"""


def upgrade() -> None:
    op.create_table(
        "job_logs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("written_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_logs_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "attempt", "number", name=op.f("pk_job_logs")),
    )
    op.execute(WITHOUT_PATHS)


def downgrade() -> None:
    op.drop_table("job_logs")
