"""Rename rounds to steps.

The baseline, pruning rounds and stretches of training are entries of one history, each with a kind.
"""

from alembic import op

revision = "0005"
down_revision = "0004"

# The data of a step names its kind; before, the number and the fields showed the kind.
KIND = """
    UPDATE job_steps SET data = data || jsonb_build_object('number', number, 'kind',
        CASE WHEN number = 0 THEN 'baseline' WHEN data ? 'recovery' THEN 'training' ELSE 'round' END)
"""

UNFINISHED = "state NOT IN ('succeeded', 'failed', 'cancelled')"

GOAL = """
    UPDATE jobs SET request = (request - 'target') || jsonb_build_object('goal', request -> 'target')
    WHERE request ? 'target'
"""

# A recovery had one kind; now it is layer-wise, or it is training in addition to the method's layer-wise recovery.
RECOVERY = """
    UPDATE jobs SET request = jsonb_set(request, '{recovery}', jsonb_build_object(
        'layerwise', jsonb_strip_nulls(jsonb_build_object(
            'kind', CASE WHEN request #>> '{recovery,kind}' IN ('lora', 'distill') THEN NULL ELSE request #> '{recovery,kind}' END,
            'damping', request #> '{recovery,damping}', 'fit_to', request #> '{recovery,target}')),
        'training', CASE WHEN request #>> '{recovery,kind}' IN ('lora', 'distill')
            THEN (request -> 'recovery') - 'damping' - 'target' ELSE 'null'::jsonb END))
    WHERE jsonb_typeof(request -> 'recovery') = 'object' AND NOT (request -> 'recovery') ? 'layerwise'
"""


def upgrade() -> None:
    op.rename_table("job_rounds", "job_steps")
    op.execute("ALTER TABLE job_steps RENAME CONSTRAINT pk_job_rounds TO pk_job_steps")
    op.execute("ALTER TABLE job_steps RENAME CONSTRAINT fk_job_rounds_job_id_jobs TO fk_job_steps_job_id_jobs")
    op.execute("ALTER INDEX ix_job_rounds_created_at RENAME TO ix_job_steps_created_at")
    op.execute(KIND)
    op.execute("UPDATE job_events SET type = 'step' WHERE type = 'round'")
    op.execute(GOAL)
    op.execute(RECOVERY)
    # Checkpoints of the last release have another version, so an unfinished job begins anew with this release's names.
    op.execute(f"DELETE FROM job_steps WHERE job_id IN (SELECT id FROM jobs WHERE {UNFINISHED})")
    op.execute("UPDATE jobs SET progress = NULL WHERE progress IS NOT NULL")


def downgrade() -> None:
    op.execute("UPDATE job_events SET type = 'round' WHERE type = 'step'")
    op.execute("UPDATE jobs SET progress = NULL WHERE progress IS NOT NULL")
    op.execute("ALTER INDEX ix_job_steps_created_at RENAME TO ix_job_rounds_created_at")
    op.execute("ALTER TABLE job_steps RENAME CONSTRAINT fk_job_steps_job_id_jobs TO fk_job_rounds_job_id_jobs")
    op.execute("ALTER TABLE job_steps RENAME CONSTRAINT pk_job_steps TO pk_job_rounds")
    op.rename_table("job_steps", "job_rounds")
