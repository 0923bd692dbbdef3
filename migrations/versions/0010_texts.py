"""Store the texts of a request beside it, and in the request what the API shows of them: their count and hash."""

import hashlib
import json

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"

PARTS = ("calibration", "evaluation")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("texts", JSONB))
    database = op.get_bind()
    for part in PARTS:
        path = f"'{{{part},texts}}'"
        op.execute(f"UPDATE jobs SET request = request #- {path} WHERE jsonb_typeof(request #> {path}) = 'null'")
        wanted = sa.text(f"SELECT id FROM jobs WHERE jsonb_typeof(request #> {path}) = 'array'")
        for job_id in database.execute(wanted).scalars().all():
            found = sa.text(f"SELECT request #> {path} FROM jobs WHERE id = :id")
            texts = database.execute(found, {"id": job_id}).scalar_one()
            shown = f"{len(texts)} texts, sha256 {hashlib.sha256(json.dumps(texts).encode()).hexdigest()}"
            database.execute(
                sa.text(
                    f"UPDATE jobs SET texts = coalesce(texts, '{{}}') || jsonb_build_object('{part}', request #> {path}),"
                    f" request = jsonb_set(request, {path}, to_jsonb(cast(:shown AS text))) WHERE id = :id"
                ),
                {"shown": shown, "id": job_id},
            )


def downgrade() -> None:
    for part in PARTS:
        op.execute(
            f"UPDATE jobs SET request = jsonb_set(request, '{{{part},texts}}', texts -> '{part}')"
            f" WHERE jsonb_exists(texts, '{part}')"
        )
    op.drop_column("jobs", "texts")
