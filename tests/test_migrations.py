"""The schema against a real Postgres: up, equal to the models, down to nothing, up again, by two at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect

from app.db import tables
from app.db.migrate import downgrade, upgrade


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
