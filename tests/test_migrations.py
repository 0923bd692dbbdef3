"""The schema against a real Postgres: up, equal to the models, down to nothing, up again, by two at once."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, select
from sqlalchemy.orm import Session

from app.db import tables
from app.db.migrate import downgrade, upgrade
from app.jobs.models import Job
from app.jobs.texts import whole_request
from secateur.catalog.request import JobRequest
from secateur.contract.jobs import without_texts


def _differences(url: str) -> list[object]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), tables.metadata)
    engine.dispose()
    return list(found)


def _relations(url: str) -> set[str]:
    engine = create_engine(url)
    inspector = inspect(engine)
    names = {*inspector.get_table_names(), *inspector.get_sequence_names(), *inspector.get_view_names()}
    engine.dispose()
    return names


def test_up_is_the_models_and_down_is_nothing(empty_database_url: str) -> None:
    upgrade(empty_database_url)
    assert _differences(empty_database_url) == []
    downgrade(empty_database_url, "base")
    assert _relations(empty_database_url) == {"alembic_version"}
    upgrade(empty_database_url)
    assert _differences(empty_database_url) == []


def test_a_missing_column_would_be_noticed(empty_database_url: str) -> None:
    upgrade(empty_database_url)
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN report")
    engine.dispose()
    assert len(_differences(empty_database_url)) == 1


@pytest.mark.parametrize("has_it", [False, True])
def test_jobs_outlive_the_upgrade_to_0002(has_it: bool, empty_database_url: str) -> None:
    upgrade(empty_database_url, "0001")
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO api_keys (id, name, secret_sha256) VALUES (gen_random_uuid(), 'a', 'x')"
        )
        for state in ("queued", "publishing"):
            connection.exec_driver_sql(
                "INSERT INTO jobs (id, owner_id, state, version, request, model_id, method, labels, attempt, failures,"
                f" pause_requested) SELECT gen_random_uuid(), id, '{state}', 1, '{{}}', 'm', 'random', '{{}}', 0, 0, false"
                " FROM api_keys"
            )
        if has_it:
            connection.exec_driver_sql("ALTER TABLE jobs ADD may_be_published boolean NOT NULL DEFAULT false")
    upgrade(empty_database_url)
    with engine.begin() as connection:
        found = connection.exec_driver_sql("SELECT state, may_be_published FROM jobs ORDER BY state").all()
    engine.dispose()
    assert [tuple(row) for row in found] == [("publishing", True), ("queued", False)]
    assert _differences(empty_database_url) == []


def test_migrators_at_the_same_time(empty_database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: upgrade(empty_database_url), range(4)))
    assert _differences(empty_database_url) == []


def test_jobs_speak_the_words_of_0005_after_the_upgrade(empty_database_url: str) -> None:
    upgrade(empty_database_url, "0004")
    engine = create_engine(empty_database_url)
    requests: dict[str, Any] = {
        "succeeded": {"model_id": "a/b", "method": "flap", "target": {"parameters": 5.0}, "target_ratio": None,
                      "recovery": {"kind": "lora", "epochs": 1.0, "damping": None, "target": None}},
        "queued": {"model_id": "a/b", "method": "wanda", "target_ratio": 0.2,
                   "recovery": {"kind": "least-squares", "damping": 0.5, "target": "layer", "epochs": 2.0}},
    }  # fmt: skip
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO api_keys (id, name, secret_sha256, scopes) VALUES (gen_random_uuid(), 'a', 'x', '{read}')"
        )
        for state, request in requests.items():
            connection.exec_driver_sql(
                "INSERT INTO jobs (id, owner_id, state, version, request, model_id, method, labels, attempt, failures,"
                " pause_requested, may_be_published, progress) SELECT gen_random_uuid(), id, %s, 1, %s::jsonb, 'm', 'flap',"
                ' \'{}\', 1, 0, false, false, \'{"stage": "score", "round": 1}\' FROM api_keys',
                (state, json.dumps(request)),
            )
        connection.exec_driver_sql(
            "INSERT INTO job_rounds (job_id, number, attempt, path, sha256, data) SELECT id, number, 1, 'p', 's',"
            " CASE number WHEN 2 THEN '{\"recovery\": {}}'::jsonb ELSE '{\"perplexity\": 9}' END"
            " FROM jobs, generate_series(0, 2) AS number"
        )
        connection.exec_driver_sql(
            "INSERT INTO job_events (job_id, attempt, type, data) SELECT id, 1, 'round', '{}' FROM jobs"
        )
    upgrade(empty_database_url)
    with engine.begin() as connection:
        found: dict[str, Any] = dict(connection.exec_driver_sql("SELECT state, request FROM jobs").all())
        done = JobRequest.model_validate(found["succeeded"])
        assert done.goal is not None and done.goal.parameters == 5 and done.recovery.training is not None
        assert (done.recovery.training.kind, done.recovery.training.epochs, done.recovery.layerwise.kind) == (
            "lora",
            1,
            None,
        )
        waiting = JobRequest.model_validate(found["queued"]).recovery
        assert (waiting.layerwise.kind, waiting.layerwise.damping, waiting.layerwise.fit_to) == (
            "least-squares",
            0.5,
            "layer",
        )
        assert waiting.training is None
        rows = connection.exec_driver_sql(
            "SELECT jobs.state, job_steps.data ->> 'kind' FROM job_steps JOIN jobs ON jobs.id = job_id ORDER BY number"
        ).all()
        assert [tuple(row) for row in rows] == [("succeeded", kind) for kind in ("baseline", "round", "training")]
        assert set(connection.exec_driver_sql("SELECT type FROM job_events").scalars()) == {"step"}
        assert set(connection.exec_driver_sql("SELECT progress FROM jobs").scalars()) == {None}
    engine.dispose()
    downgrade(empty_database_url, "0004")
    upgrade(empty_database_url)


def test_texts_stand_beside_their_request_after_the_upgrade_to_0006(empty_database_url: str) -> None:
    upgrade(empty_database_url, "0005")
    engine = create_engine(empty_database_url)
    requests: dict[str, dict[str, Any]] = {
        "both": {"calibration": {"texts": ["é", "b"], "samples": 1}, "evaluation": {"texts": ["c"]}},
        "one": {"calibration": {"texts": None, "samples": 1}, "evaluation": {"texts": ["c"]}},
        "none": {"calibration": {"texts": None, "samples": 1}, "evaluation": {}},
        "bare": {"rounds": 3},
    }
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO api_keys (id, name, secret_sha256, scopes) VALUES (gen_random_uuid(), 'a', 'x', '{read}')"
        )
        for name, request in requests.items():
            connection.exec_driver_sql(
                "INSERT INTO jobs (id, owner_id, state, version, request, model_id, method, labels, attempt, failures,"
                " pause_requested, may_be_published) SELECT gen_random_uuid(), id, 'queued', 1, %s::jsonb, %s, 'flap',"
                " '{}', 0, 0, false, false FROM api_keys",
                (json.dumps(request), name),
            )
    for _ in range(2):
        upgrade(empty_database_url)
        with Session(engine) as session:
            jobs = {job.model_id: job for job in session.scalars(select(Job))}
            for name, request in requests.items():
                assert jobs[name].request == without_texts(request), name
                given = {part: value for part, value in request.items() if part != "rounds" and value.get("texts")}
                assert jobs[name].texts == ({part: value["texts"] for part, value in given.items()} or None)
                whole = whole_request(jobs[name])
                assert all(whole[part]["texts"] == value["texts"] for part, value in given.items())
        downgrade(empty_database_url, "0005")
    with engine.begin() as connection:
        found: dict[str, Any] = dict(connection.exec_driver_sql("SELECT model_id, request FROM jobs").all())
    assert found["both"] == requests["both"]
    engine.dispose()
