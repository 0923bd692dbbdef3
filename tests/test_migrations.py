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


def test_keys_and_repositories_after_the_upgrade_to_0006(empty_database_url: str) -> None:
    upgrade(empty_database_url, "0005")
    engine = create_engine(empty_database_url)
    names = ("secateur up", "Team A & B", "团队")
    jobs: list[tuple[str, str, Any, str]] = [
        ("secateur up", "succeeded", {"repo_id": "secateur/Tiny"}, "2026-01-01"),
        ("Team A & B", "succeeded", {"repo_id": "secateur/tiny"}, "2026-01-02"),
        ("Team A & B", "succeeded", {"targets": [{"repo_id": "org/x-20"}, {"target_ratio": 0.5}]}, "2026-01-02"),
        ("Team A & B", "failed", None, "2026-01-02"),
        ("Team A & B", "running", None, "2026-01-02"),
    ]
    with engine.begin() as connection:
        for name in names:
            connection.exec_driver_sql(
                "INSERT INTO api_keys (id, name, secret_sha256, scopes) VALUES (gen_random_uuid(), %s, %s, '{read}')",
                (name, name),
            )
        for name, state, result, day in jobs:
            connection.exec_driver_sql(
                "INSERT INTO jobs (id, owner_id, state, version, request, model_id, method, labels, attempt, failures,"
                " pause_requested, may_be_published, result, created_at, finished_at) SELECT gen_random_uuid(), id, %s, 1,"
                " '{}', 'm', 'flap', '{}', 1, 0, false, false, %s::jsonb, %s, %s FROM api_keys WHERE name = %s",
                (state, json.dumps(result), day, None if state == "running" else day, name),
            )
    upgrade(empty_database_url)
    with engine.begin() as connection:
        keys = connection.exec_driver_sql("SELECT name, namespace, lend_hub_token, id FROM api_keys").all()
        namespaces = {name: (namespace.removesuffix(f"-{id.hex[-12:]}"), lent) for name, namespace, lent, id in keys}
        assert namespaces == {
            "secateur up": ("secateur", True), "Team A & B": ("team-a-b", False), "团队": ("key", False)
        }  # fmt: skip
        owners = connection.exec_driver_sql(
            "SELECT repo_id, name FROM repositories JOIN api_keys ON api_keys.id = owner_id ORDER BY repo_id"
        ).all()
        assert [tuple(row) for row in owners] == [("org/x-20", "Team A & B"), ("secateur/tiny", "Team A & B")]
        used = connection.exec_driver_sql(
            "SELECT name, day::text, jobs_created, jobs_succeeded, jobs_failed FROM usage JOIN api_keys ON"
            " api_keys.id = key_id ORDER BY day"
        ).all()
        assert [tuple(row) for row in used] == [
            ("secateur up", "2026-01-01", 1, 1, 0), ("Team A & B", "2026-01-02", 4, 2, 1)
        ]  # fmt: skip
    engine.dispose()
    assert _differences(empty_database_url) == []
    downgrade(empty_database_url, "0005")
    upgrade(empty_database_url)


def test_results_lose_paths_with_0007(empty_database_url: str) -> None:
    upgrade(empty_database_url, "0005")
    folder, web = {"repo_id": "a/b", "url": "file:///srv/hub/x"}, {"repo_id": "a/c", "url": "https://hub/a/c"}
    results = [folder, web, {"targets": [folder, web]}, {"targets": [web]}, {"parameters": {}}, None]
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO api_keys (id, name, secret_sha256, scopes) VALUES (gen_random_uuid(), 'a', 'x', '{read}')"
        )
        for number, result in enumerate(results):
            connection.exec_driver_sql(
                "INSERT INTO jobs (id, owner_id, state, version, request, model_id, method, labels, attempt, failures, "
                "pause_requested, may_be_published, result) SELECT %s, id, 'succeeded', 1, '{}', 'm', 'x', '{}', 1, 0, false, "
                "false, %s FROM api_keys",
                (f"00000000-0000-0000-0000-{number:012}", json.dumps(result) if result else None),
            )
    upgrade(empty_database_url)
    with engine.connect() as connection:
        kept = connection.exec_driver_sql("SELECT result FROM jobs ORDER BY id").scalars().all()
    engine.dispose()
    bare = {"repo_id": "a/b"}
    assert kept == [bare, web, {"targets": [bare, web]}, *results[3:]]


def test_texts_stand_beside_their_request_after_the_upgrade_to_0010(empty_database_url: str) -> None:
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
