"""Add namespaces, limits and usage of API keys, and record which key published which repository."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

# The key of 'secateur up' keeps the names of its repositories and the service's token. Every other key gets a namespace
# that no other key has, and the token only when the operator lends it.
NAMESPACES = """
    UPDATE api_keys SET lend_hub_token = (name = 'secateur up'), namespace = CASE WHEN name = 'secateur up' THEN 'secateur'
        ELSE coalesce(nullif(trim(both '-' from left(regexp_replace(lower(name), '[^a-z0-9]+', '-', 'g'), 20)), ''), 'key')
            || '-' || right(replace(id::text, '-', ''), 12) END
"""

# The key whose job published last owns the repository.
PUBLISHED = """
    INSERT INTO repositories (repo_id, owner_id, job_id)
    SELECT DISTINCT ON (lower(published.repo_id)) lower(published.repo_id), owner_id, id
    FROM jobs, LATERAL (
        SELECT result ->> 'repo_id' AS repo_id
        UNION ALL
        SELECT target ->> 'repo_id' FROM jsonb_array_elements(coalesce(result -> 'targets', '[]')) AS target
    ) AS published
    WHERE published.repo_id IS NOT NULL
    ORDER BY lower(published.repo_id), finished_at DESC NULLS LAST
"""

USAGE = """
    INSERT INTO usage (key_id, day, jobs_created, jobs_succeeded, jobs_failed, worker_seconds, bytes_stored)
    SELECT owner_id, (at AT TIME ZONE 'UTC')::date, sum(created), sum(succeeded), sum(failed), 0, 0 FROM (
        SELECT owner_id, created_at, 1, 0, 0 FROM jobs
        UNION ALL
        SELECT owner_id, finished_at, 0, (state = 'succeeded')::int, (state = 'failed')::int FROM jobs
        WHERE state IN ('succeeded', 'failed') AND finished_at IS NOT NULL
    ) AS changes (owner_id, at, created, succeeded, failed) GROUP BY 1, 2
"""


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("namespace", sa.String))
    op.add_column("api_keys", sa.Column("lend_hub_token", sa.Boolean))
    op.add_column("api_keys", sa.Column("max_open_jobs", sa.Integer))
    op.add_column("api_keys", sa.Column("max_running_jobs", sa.Integer))
    op.execute(NAMESPACES)
    op.alter_column("api_keys", "namespace", nullable=False)
    op.alter_column("api_keys", "lend_hub_token", nullable=False)
    op.add_column("jobs", sa.Column("claimed_at", sa.DateTime(timezone=True)))
    op.execute("UPDATE jobs SET claimed_at = now() WHERE state IN ('running', 'publishing', 'cancelling')")
    op.create_table(
        "repositories",
        sa.Column("repo_id", sa.String, nullable=False),
        sa.Column("owner_id", sa.Uuid, nullable=False),
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.PrimaryKeyConstraint("repo_id", name="pk_repositories"),
    )
    op.create_index("ix_repositories_job_id", "repositories", ["job_id"])
    op.execute(PUBLISHED)
    op.create_table(
        "usage",
        sa.Column("key_id", sa.Uuid, nullable=False),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("jobs_created", sa.Integer, nullable=False),
        sa.Column("jobs_succeeded", sa.Integer, nullable=False),
        sa.Column("jobs_failed", sa.Integer, nullable=False),
        sa.Column("worker_seconds", sa.Double, nullable=False),
        sa.Column("bytes_stored", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("key_id", "day", name="pk_usage"),
    )
    op.create_index("ix_usage_day", "usage", ["day"])
    op.execute(USAGE)


def downgrade() -> None:
    op.drop_table("usage")
    op.drop_table("repositories")
    op.drop_column("jobs", "claimed_at")
    for column in ("max_running_jobs", "max_open_jobs", "lend_hub_token", "namespace"):
        op.drop_column("api_keys", column)
