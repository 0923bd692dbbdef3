"""Making, finding, steering and deleting jobs over HTTP."""

import csv
import hashlib
import io
import json
import math
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from sqlalchemy import event, func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.auth.service import Caller
from app.config import Settings
from app.db.session import session_factory
from app.http import idempotency, pages
from app.http.idempotency import IdempotencyKey
from app.jobs import leases, service
from app.jobs.models import Job, JobEvent, JobStep
from app.jobs.transitions import Trigger
from app.storage.models import Deletion, StoredFile
from app.storage.store import Store
from tests.api import play
from tests.api.conftest import CONFIG
from tests.patience import PATIENCE
from workers import scheduler

Body = dict[str, Any]


def _make(api: httpx2.Client, body: Body, **headers: str) -> dict[str, Any]:
    response = api.post("/v1/jobs", json=body, headers=headers)
    assert response.status_code == 202, response.text
    return response.json()


def _delete(session: Session, job_id: str) -> None:
    job = session.get_one(Job, uuid.UUID(job_id))
    service.delete(session, Caller(job.owner_id, ()), job.id)


def _away(*_: object) -> None:
    raise OperationalError("COMMIT", None, Exception("the database went away"))


def test_create_and_get(api: httpx2.Client, body: Body) -> None:
    response = api.post("/v1/jobs", json=body)
    assert response.status_code == 202
    job = response.json()
    assert response.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert int(response.headers["Retry-After"]) > 0
    assert (job["state"], job["model_id"], job["method"]) == ("queued", "local:tiny", "piem-lsps")
    assert uuid.UUID(job["id"]).version == 7
    assert job["created_at"].endswith("Z")
    assert job["request"]["publish"] == {"repo_id": "org/tiny-piem-lsps-20", "private": True}
    again = api.get(response.headers["Location"])
    assert again.json() == job
    assert again.headers["ETag"] == response.headers["ETag"]


def test_accepting_is_an_event(api: httpx2.Client, body: Body) -> None:
    job = _make(api, body)
    [event] = api.get(f"/v1/jobs/{job['id']}/events").json()["items"]
    assert (event["type"], event["data"]["to"]) == ("state", "queued")


def test_validate_only_makes_nothing(api: httpx2.Client, body: Body, session: Session) -> None:
    response = api.post("/v1/jobs?validate_only=true", json=body)
    assert response.status_code == 200
    plan = response.json()
    assert plan["rounds"] == 4
    [target] = plan["targets"]
    assert (target["target_ratio"], target["repo_id"]) == (0.2, "org/tiny-piem-lsps-20")
    assert abs(target["nearest_ratio"] - 0.2) < 0.05
    assert [layer["heads"] for layer in plan["shape"]["layers"]] == [8, 8, 8, 8]
    assert session.scalar(select(func.count()).select_from(Job)) == 0
    assert api.post("/v1/jobs?validate_only=true", json=body | {"model_id": "local:none"}).status_code == 422


def test_a_plan_of_several_targets(api: httpx2.Client, body: Body) -> None:
    several = body | {"target_ratio": [0.125, 0.2, 0.5], "publish": {"repo_id": "org/name"}}
    plan = api.post("/v1/jobs?validate_only=true", json=several).json()
    assert [target["target_ratio"] for target in plan["targets"]] == [0.125, 0.2, 0.5]
    assert [target["repo_id"] for target in plan["targets"]] == ["org/name-12_5", "org/name-20", "org/name-50"]
    half_a_block = 32 * 3 * 64 / (4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256)) / 2
    for target in plan["targets"]:
        assert abs(target["nearest_ratio"] - target["target_ratio"]) <= half_a_block + 1e-9
    one = api.post("/v1/jobs?validate_only=true", json=several | {"target_ratio": [0.2]}).json()
    assert [target["repo_id"] for target in one["targets"]] == ["org/name-20"]
    job = _make(api, several)
    assert job["request"]["target_ratio"] == [0.125, 0.2, 0.5]
    assert job["request"]["publish"]["repo_id"] == "org/name"


# The model of tests.api.conftest: 4 layers of 61,440 weights, 6,400 of tied embeddings, 9 norms of 64.
@pytest.mark.parametrize(
    ("target", "change", "dtype"),
    [
        ({"parameters": 203_584}, {}, "auto"),
        ({"bytes": 4 * 203_584}, {}, "auto"),
        ({"bytes": 2 * 203_584}, {"dtype": "bfloat16"}, "auto"),
        ({"bytes": 2 * 203_584}, {"torch_dtype": "float16"}, "auto"),
        ({"bytes": 2 * 203_584}, {"dtype": "float32"}, "bfloat16"),
        ({"bytes": 4 * 203_584}, {"dtype": "bfloat16"}, "float32"),
    ],
)
def test_a_size_as_the_goal(
    api: httpx2.Client, make_model: Callable[..., str], target: Body, change: Body, dtype: str
) -> None:
    request = {"model_id": make_model("sized", CONFIG | change), "goal": target, "method": "piem", "dtype": dtype}
    plan = api.post("/v1/jobs?validate_only=true", json=request).json()
    assert [planned["target_ratio"] for planned in plan["targets"]] == [pytest.approx(0.2)]


def test_conditional_get(api: httpx2.Client, body: Body, session: Session) -> None:
    job = _make(api, body)
    path = f"/v1/jobs/{job['id']}"
    tag = api.get(path).headers["ETag"]
    for header in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        response = api.get(path, headers={"If-None-Match": header})
        assert (response.status_code, response.content, response.headers["ETag"]) == (304, b"", tag)
    play.start(session, job["id"])
    changed = api.get(path, headers={"If-None-Match": tag})
    assert changed.status_code == 200 and changed.headers["ETag"] != tag


class TestIdempotency:
    def test_same_body_same_job(self, api: httpx2.Client, body: Body, session: Session) -> None:
        first = _make(api, body, **{"Idempotency-Key": "k1"})
        play.start(session, first["id"])
        again = _make(api, dict(reversed(body.items())), **{"Idempotency-Key": "k1"})
        assert again["id"] == first["id"] and again["state"] == "running"
        assert session.scalar(select(func.count()).select_from(Job)) == 1

    def test_replay_needs_no_model(self, api: httpx2.Client, body: Body, settings: Settings) -> None:
        first = _make(api, body, **{"Idempotency-Key": "k1"})
        settings.models_dir.rename(settings.data_dir / "gone")
        assert _make(api, body, **{"Idempotency-Key": "k1"})["id"] == first["id"]

    def test_another_body_is_refused(self, api: httpx2.Client, body: Body) -> None:
        _make(api, body, **{"Idempotency-Key": "k1"})
        response = api.post("/v1/jobs", json=body | {"seed": 1}, headers={"Idempotency-Key": "k1"})
        assert (response.status_code, response.json()["code"]) == (422, "idempotency_key_reused")

    def test_keys_are_scoped_by_api_key(
        self, make_client: Callable[..., httpx2.Client], body: Body, session: Session
    ) -> None:
        jobs = {_make(make_client(name), body, **{"Idempotency-Key": "k"})["id"] for name in ("alice", "bob")}
        assert len(jobs) == 2

    def test_at_once(self, api: httpx2.Client, body: Body, session: Session) -> None:
        with ThreadPoolExecutor(8) as pool:
            jobs = list(pool.map(lambda _: _make(api, body, **{"Idempotency-Key": "k"})["id"], range(16)))
        assert len(set(jobs)) == 1
        assert session.scalar(select(func.count()).select_from(Job)) == 1
        assert session.scalar(select(func.count()).select_from(JobEvent)) == 1

    def test_a_key_expires(self, api: httpx2.Client, body: Body, session: Session, settings: Settings) -> None:
        first = _make(api, body, **{"Idempotency-Key": "k"})
        past = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, settings.idempotency_ttl + 1)
        session.execute(update(IdempotencyKey).values(created_at=past))
        session.commit()
        second = _make(api, body | {"seed": 1}, **{"Idempotency-Key": "k"})
        assert second["id"] != first["id"]
        assert _make(api, body | {"seed": 1}, **{"Idempotency-Key": "k"})["id"] == second["id"]
        session.execute(update(IdempotencyKey).values(created_at=past))
        session.commit()
        idempotency.delete_expired(session, settings.idempotency_ttl)
        assert session.scalar(select(func.count()).select_from(IdempotencyKey)) == 0

    def test_a_deleted_job_is_not_made_again(self, api: httpx2.Client, body: Body) -> None:
        job = _make(api, body, **{"Idempotency-Key": "k"})
        api.post(f"/v1/jobs/{job['id']}/cancel")
        assert api.delete(f"/v1/jobs/{job['id']}").status_code == 204
        response = api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})
        assert (response.status_code, response.json()["code"]) == (410, "job_deleted")

    def test_bad_keys(self, api: httpx2.Client, body: Body) -> None:
        for key in ("", "x" * 256, "a b", "é"):
            response = api.post("/v1/jobs", json=body, headers=[(b"Idempotency-Key", key.encode())])
            assert response.status_code == 422, key
            assert response.json()["errors"][0]["field"] == "idempotency-key"

    def test_the_longest_key(self, api: httpx2.Client, body: Body) -> None:
        assert _make(api, body, **{"Idempotency-Key": "x" * 255})


class TestList:
    def test_pages_newest_first(self, api: httpx2.Client, body: Body) -> None:
        made = [_make(api, body | {"seed": seed})["id"] for seed in range(5)]
        seen: list[str] = []
        token, pages = None, 0
        while token or not pages:
            query = {"page_size": 2} | ({"page_token": token} if token else {})
            page = api.get("/v1/jobs", params=query).json()
            seen += [job["id"] for job in page["items"]]
            token, pages = page["next_page_token"], pages + 1
            if pages == 1:
                _make(api, body | {"seed": 9})  # what is made meanwhile moves no page
        assert (seen, pages) == (made[::-1], 3)

    def test_filters(self, api: httpx2.Client, body: Body, make_model: Callable[..., str]) -> None:
        plain = _make(api, body)["id"]
        labelled = _make(api, body | {"labels": {"team": "nlp", "run": "1"}})["id"]
        other = _make(
            api, body | {"method": "magnitude", "model_id": make_model("other"), "labels": {"team": "vision"}}
        )["id"]
        api.post(f"/v1/jobs/{plain}/cancel")

        def ids(**query: Any) -> set[str]:
            response = api.get("/v1/jobs", params=query)
            assert response.status_code == 200, response.text
            return {job["id"] for job in response.json()["items"]}

        assert ids(state="cancelled") == {plain}
        assert ids(state=["cancelled", "queued"]) == {plain, labelled, other}
        assert ids(method="magnitude") == {other}
        assert ids(model_id="local:tiny") == {plain, labelled}
        assert ids(**{"label.team": "nlp"}) == {labelled}
        assert ids(**{"label.team": "nlp", "label.run": "2"}) == set()
        assert ids(state="queued", method="piem-lsps", **{"label.run": "1"}) == {labelled}

    def test_page_size_is_clamped(self, api: httpx2.Client, body: Body) -> None:
        for seed in range(3):
            _make(api, body | {"seed": seed})
        for size, items in ((0, 1), (-5, 1), (1000, 3)):
            assert len(api.get(f"/v1/jobs?page_size={size}").json()["items"]) == items

    def test_bad_queries(self, api: httpx2.Client) -> None:
        for query, field in [
            ("page_token=x", "page_token"),
            ("page_token=%C3%A9", "page_token"),
            ("page_token=" + "a" * 300, "page_token"),
            ("page_size=many", "page_size"),
            ("state=done", "state.0"),
            ("sate=queued", "sate"),
            ("labl.team=nlp", "labl.team"),
            ("label=nlp", "label"),
            ("label.=x", "label"),
            ("label.a%00=x", "label"),
            ("model_id=%00", "model_id"),
            ("method=%00", "method"),
        ]:
            response = api.get(f"/v1/jobs?{query}")
            assert response.status_code == 422, response.text
            assert response.json()["errors"][0]["field"] == field


def test_a_misspelt_parameter_makes_nothing(api: httpx2.Client, body: Body, session: Session) -> None:
    cases = [
        ("POST", "/v1/jobs?validate_onyl=true", "validate_only"),
        ("POST", "/v1/jobs?label.a=b", "validate_only"),
        ("GET", "/v1/jobs?sate=queued", "key_id, label.KEY, method, model_id, page_size, page_token, state"),
        ("GET", f"/v1/jobs/{uuid.uuid4()}?x", "no parameters"),
        ("GET", "/v1/methods?x=", "no parameters"),
    ]
    for method, path, allowed in cases:
        response = api.request(method, path, json=body if method == "POST" else None)
        assert response.status_code == 422, path
        [error] = response.json()["errors"]
        assert (error["field"], error["allowed"]) == (path.partition("?")[2].partition("=")[0], allowed)
    assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_texts_are_shown_by_their_hash(api: httpx2.Client, body: Body) -> None:
    job = _make(api, body | {"calibration": {"texts": ["the secret " * 50, "b"]}})
    shown = api.get(f"/v1/jobs/{job['id']}")
    assert shown.json()["request"]["calibration"]["texts"].startswith("2 texts, sha256 ")
    assert (
        shown.json()
        == job
        == api.post(f"/v1/jobs/{job['id']}/pause").json() | {name: job[name] for name in ("state", "waiting_for")}
    )
    assert "the secret" not in shown.text + api.get("/v1/jobs").text + api.get(f"/v1/jobs/{job['id']}/events").text


def test_texts_are_read_by_the_worker_alone(api: httpx2.Client, body: Body, session: Session) -> None:
    """Whatever is asked often about a job, and whatever its worker writes, reads none of its megabytes."""
    text = "the text " * 50
    job = _make(api, body | {"calibration": {"texts": [text]}, "evaluation": {"texts": [text]}})
    job_id, statements = uuid.UUID(job["id"]), []

    def keep(connection: Any, cursor: Any, statement: str, *_: object) -> None:
        statements.append(statement)

    engines = [session.get_bind(), session_factory().kw["bind"]]
    claimed = leases.claim(session, job_id, "w", PATIENCE)
    assert claimed is not None and claimed.request["calibration"]["texts"] == [text]
    assert claimed.request["evaluation"]["texts"] == [text]
    session.expunge_all()
    for engine in engines:
        event.listen(engine, "before_cursor_execute", keep)
    leases.renew(session, job_id, 1, PATIENCE)
    leases.report_progress(session, job_id, 1, {"stage": "scoring", "steps": 1, "share": 0.5})
    leases.record_step(session, job_id, 1, 0, {}, {})
    for path in ("", "/events", "/steps", "/artifacts"):
        api.get(f"/v1/jobs/{job_id}{path}").raise_for_status()
    api.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=1"}).raise_for_status()
    api.get("/v1/jobs").raise_for_status()
    for call in ("pause", "resume", "cancel"):
        api.post(f"/v1/jobs/{job_id}/{call}").raise_for_status()
    leases.move(session, job_id, 1, Trigger.STOPPED)
    assert len(statements) > 15 and not [found for found in statements if "texts" in found]
    assert api.get(f"/v1/jobs/{job_id}/recipe").json()["calibration"]["texts"] == [text]


class TestSteering:
    def test_pause_resume_cancel_retry(self, api: httpx2.Client, body: Body, session: Session) -> None:
        path = f"/v1/jobs/{_make(api, body)['id']}"
        for call, state in [
            ("pause", "paused"), ("pause", "paused"), ("resume", "queued"), ("resume", "queued"),
            ("cancel", "cancelled"), ("cancel", "cancelled"), ("retry", "queued"), ("retry", "queued"),
        ]:  # fmt: skip
            response = api.post(f"{path}/{call}")
            assert (response.status_code, response.json()["state"]) == (200, state), call
            assert response.headers["ETag"] == api.get(path).headers["ETag"]

    def test_a_running_job(self, api: httpx2.Client, body: Body, session: Session) -> None:
        job_id = _make(api, body)["id"]
        play.start(session, job_id)
        assert api.post(f"/v1/jobs/{job_id}/pause").json()["pause_requested"] is True
        assert api.post(f"/v1/jobs/{job_id}/resume").json()["pause_requested"] is False
        assert api.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelling"
        refused = api.post(f"/v1/jobs/{job_id}/pause")
        assert (refused.status_code, refused.json()["state"]) == (409, "cancelling")
        assert refused.json()["code"] == "wrong_state"

    def test_retry_starts_counting_afresh(self, api: httpx2.Client, body: Body, session: Session) -> None:
        job_id = _make(api, body)["id"]
        play.fail(session, job_id, play.start(session, job_id))
        failed = api.get(f"/v1/jobs/{job_id}").json()
        assert (failed["state"], failed["failures"], failed["error"]["code"]) == ("failed", 1, "nan_weights")
        assert failed["error"]["field"] == "model_id"
        retried = api.post(f"/v1/jobs/{job_id}/retry").json()
        assert (retried["state"], retried["failures"], retried["error"]) == ("queued", 0, None)
        assert play.start(session, job_id) == 2

    def test_delete(self, api: httpx2.Client, body: Body, session: Session, settings: Settings) -> None:
        job_id = _make(api, body)["id"]
        refused = api.delete(f"/v1/jobs/{job_id}")
        assert (refused.status_code, refused.json()["state"]) == (409, "queued")
        attempt = play.start(session, job_id)
        play.finish_round(session, job_id, attempt, 0)
        play.succeed(session, settings, job_id, attempt)
        assert api.delete(f"/v1/jobs/{job_id}").status_code == 204
        scheduler.delete_leftovers(session, settings)
        assert api.get(f"/v1/jobs/{job_id}").status_code == 404
        assert api.delete(f"/v1/jobs/{job_id}").status_code == 404
        for table in (Job, JobEvent, JobStep, StoredFile, Deletion):
            assert session.scalar(select(func.count()).select_from(table)) == 0
        assert list((settings.data_dir / "storage" / "jobs").iterdir()) == []

    def test_a_delete_that_is_not_committed_loses_nothing(
        self, api: httpx2.Client, body: Body, session: Session, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = _make(api, body)["id"]
        play.succeed(session, settings, job_id, play.start(session, job_id))
        with monkeypatch.context() as patch:
            patch.setattr(Session, "commit", _away)
            with pytest.raises(OperationalError):
                _delete(session, job_id)
        session.rollback()
        scheduler.delete_leftovers(session, settings)
        assert len(api.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]) == 2

    def test_what_a_kill_leaves_of_a_deleted_job_is_removed(
        self, api: httpx2.Client, body: Body, session: Session, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        live, job_id = _make(api, body)["id"], _make(api, body)["id"]
        for each in (live, job_id):
            play.succeed(session, settings, each, play.start(session, each))
        _delete(session, job_id)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "delete_folder", _away)
            with pytest.raises(OperationalError):
                scheduler.delete_leftovers(session, settings)
        folder = settings.data_dir / "storage" / "jobs"
        assert len(list(folder.iterdir())) == 2
        scheduler.delete_leftovers(session, settings)
        assert list(folder.iterdir()) == [folder / live]

    def test_delete_at_once(self, api: httpx2.Client, body: Body, session: Session, settings: Settings) -> None:
        job_id = _make(api, body)["id"]
        contents = {f"model-{number}": b"x" for number in range(300)}
        play.succeed(session, settings, job_id, play.start(session, job_id), contents)
        with ThreadPoolExecutor(8) as pool:
            deleted = [pool.submit(api.delete, f"/v1/jobs/{job_id}") for _ in range(4)]
            listed = [pool.submit(api.get, f"/v1/jobs/{job_id}/artifacts") for _ in range(8)]
        assert sorted(answer.result().status_code for answer in deleted) == [204, 404, 404, 404]
        assert {answer.result().status_code for answer in listed} <= {200, 404}


class TestResults:
    @pytest.fixture
    def done(self, api: httpx2.Client, body: Body, session: Session, settings: Settings) -> str:
        job_id: str = _make(api, body)["id"]
        attempt = play.start(session, job_id)
        for number in range(3):
            play.finish_round(session, job_id, attempt, number)
        play.succeed(session, settings, job_id, attempt)
        return f"/v1/jobs/{job_id}"

    def test_the_job(self, api: httpx2.Client, done: str) -> None:
        response = api.get(done)
        assert response.json()["result"] == play.RESULT
        assert "Retry-After" not in response.headers

    def test_report(self, api: httpx2.Client, done: str, body: Body) -> None:
        assert api.get(f"{done}/report").json() == play.REPORT
        live = _make(api, body)["id"]
        refused = api.get(f"/v1/jobs/{live}/report")
        assert (refused.status_code, refused.json()["code"], refused.json()["state"]) == (409, "no_report", "queued")

    def test_rounds(self, api: httpx2.Client, done: str) -> None:
        rounds = api.get(f"{done}/steps").json()["items"]
        assert [(item["number"], item["data"]["perplexity"]) for item in rounds] == [(0, 10.0), (1, 11.0), (2, 12.0)]

    def test_metrics(self, api: httpx2.Client, done: str) -> None:
        answer = api.get(f"{done}/metrics")
        rows = answer.json()["items"]
        assert [(row["step"], row["kind"], row["attempt"], row["seconds"]) for row in rows] == [
            (number, "round", 1, 2.0) for number in range(3)
        ]
        assert [(row["target_ratio"], row["reached_ratio"], row["perplexity"]) for row in rows] == [
            (0.2, 0.1 * number, 10.0 + number) for number in range(3)
        ]
        assert rows[1]["loss"] == pytest.approx(math.log(11.0)) and rows[1]["peak_memory_bytes"] is None
        for accepted in ("text/csv", "text/plain, text/csv;q=0.9"):
            table = api.get(f"{done}/metrics", headers={"Accept": accepted})
            assert table.headers["Content-Type"].startswith("text/csv") and table.headers["Vary"] == "Accept"
            read = list(csv.DictReader(io.StringIO(table.text)))
            assert [{name: cell or None for name, cell in row.items()} for row in read] == [
                {name: None if value is None else str(value) for name, value in row.items()} for row in rows
            ]
        for accepted in ("*/*", "application/json", "text/csv, application/json"):
            assert api.get(f"{done}/metrics", headers={"Accept": accepted}).json() == answer.json()
        assert api.get(f"/v1/jobs/{uuid.UUID(int=0)}/metrics", headers={"Accept": "text/csv"}).status_code == 404

    def test_events_by_pages(self, api: httpx2.Client, done: str) -> None:
        first = api.get(f"{done}/events?page_size=4").json()
        second = api.get(f"{done}/events", params={"page_token": first["next_page_token"]}).json()
        events = first["items"] + second["items"]
        assert [event["type"] for event in events] == ["state", "state", "step", "step", "step", "state", "state"]
        assert [event["id"] for event in events] == sorted(event["id"] for event in events)
        assert second["next_page_token"] is None

    @pytest.mark.parametrize("number", ["9" * 19, "9" * 40, "-1", "1_0", " 1", "x", ""])
    def test_made_up_event_tokens(self, api: httpx2.Client, done: str, number: str) -> None:
        response = api.get(f"{done}/events", params={"page_token": pages.encode(number)})
        assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "page_token")

    def test_artifacts(self, api: httpx2.Client, done: str) -> None:
        items = api.get(f"{done}/artifacts").json()["items"]
        assert [(item["name"], item["size"]) for item in items] == [("config.json", 8), ("model.safetensors", 10240)]
        whole = api.get(items[1]["url"])
        assert whole.content == bytes(range(256)) * 40
        part = api.get(items[1]["url"], headers={"Range": "bytes=256-511"})
        assert (part.status_code, part.content) == (206, bytes(range(256)))
        assert part.headers["Content-Range"] == "bytes 256-511/10240"
        head = api.head(items[1]["url"])
        assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", "10240")
        assert api.head(f"{done}/artifacts/none").status_code == 404

    def test_artifacts_of_several_targets(
        self, api: httpx2.Client, body: Body, session: Session, settings: Settings
    ) -> None:
        job_id = _make(api, body)["id"]
        contents = {f"ratio-{ratio}/model.safetensors": ratio.encode() * 100 for ratio in ("0.2", "0.5")}
        play.succeed(session, settings, job_id, play.start(session, job_id), play.CONTENTS | contents)
        done = f"/v1/jobs/{job_id}"
        items = {item["name"]: item for item in api.get(f"{done}/artifacts").json()["items"]}
        nested = "ratio-0.5/model.safetensors"
        assert list(items) == ["config.json", "model.safetensors", "ratio-0.2/model.safetensors", nested]
        assert (items[nested]["url"], items[nested]["size"]) == (f"{done}/artifacts/{nested}", 300)
        part = api.get(items[nested]["url"], headers={"Range": "bytes=0-2"})
        assert (part.status_code, part.content) == (206, b"0.5")
        assert "filename*=utf-8''model.safetensors" in part.headers["Content-Disposition"]
        assert api.head(items[nested]["url"]).headers["Content-Length"] == "300"
        for name in (
            "ratio-0.2",
            "ratio-0.2/",
            "ratio-0.2//model.safetensors",
            "ratio-0.2/%2e%2e/config.json",
            "ratio-0.2/..%2f..%2f..%2fsecret.json",
            "%2fetc%2fpasswd",
        ):
            response = api.get(f"{done}/artifacts/{name}")
            assert (response.status_code, response.json()["code"]) == (404, "not_found"), name

    def test_ranges_that_cannot_be_served(self, api: httpx2.Client, done: str) -> None:
        for header, status, code in [
            ("bytes=99999-", 416, "range_not_satisfiable"),
            ("bytes=9-1", 400, "range_malformed"),
            ("bytes", 400, "range_malformed"),
            ("lines=1-2", 400, "range_malformed"),
        ]:
            response = api.get(f"{done}/artifacts/model.safetensors", headers={"Range": header})
            assert (response.status_code, response.json()["code"]) == (status, code), header
            assert response.headers["Content-Type"] == "application/problem+json"
            assert response.headers.get("Content-Range") == ("bytes */10240" if status == 416 else None)

    def test_a_download_holds_no_connection(
        self, api: httpx2.Client, body: Body, session: Session, settings: Settings
    ) -> None:
        job_id = _make(api, body)["id"]
        large = {"large": bytes(64 * 2**20)}  # more than the sockets buffer
        play.succeed(session, settings, job_id, play.start(session, job_id), large)
        session.close()
        with api.stream("GET", f"/v1/jobs/{job_id}/artifacts/large") as response:
            assert next(response.iter_raw())
            assert session_factory().kw["bind"].pool.checkedout() == 0

    def test_no_other_file(self, api: httpx2.Client, done: str) -> None:
        for name in ("none", "nested", "..%2fsecret.json", "%2e%2e%2fsecret.json", "nested/x", "config.json%00", "%00"):
            response = api.get(f"{done}/artifacts/{name}")
            assert (response.status_code, response.json()["code"]) == (404, "not_found"), name

    def test_none_before_the_export(self, api: httpx2.Client, body: Body, session: Session, settings: Settings) -> None:
        job_id = _make(api, body)["id"]
        play.store_files(settings, job_id, play.start(session, job_id), {"config.json": b"half"})
        assert api.get(f"/v1/jobs/{job_id}/artifacts").json() == {"items": []}
        assert api.get(f"/v1/jobs/{job_id}/artifacts/config.json").status_code == 404

    def test_artifacts_outlive_a_hub_that_refuses(
        self, api: httpx2.Client, body: Body, session: Session, settings: Settings
    ) -> None:
        job_id = _make(api, body)["id"]
        attempt = play.start(session, job_id)
        files = play.store_files(settings, job_id, attempt, play.CONTENTS)
        leases.record_export(session, uuid.UUID(job_id), attempt, play.REPORT, files)
        play.fail(session, job_id, attempt)
        assert api.get(f"/v1/jobs/{job_id}").json()["state"] == "failed"
        assert api.get(f"/v1/jobs/{job_id}/report").json() == play.REPORT
        [config, _] = api.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
        assert hashlib.sha256(api.get(config["url"]).content).hexdigest() == config["sha256"]

    def test_an_object_that_is_gone(self, api: httpx2.Client, done: str, settings: Settings) -> None:
        [item, _] = api.get(f"{done}/artifacts").json()["items"]
        shutil.rmtree(settings.data_dir / "storage" / "jobs")
        gone = api.get(item["url"])
        assert (gone.status_code, gone.json()["code"]) == (404, "not_found")


def test_another_keys_job_is_not_there(make_client: Callable[..., httpx2.Client], body: Body, url: str) -> None:
    alice, bob = make_client("alice"), make_client("bob")
    job_id = _make(alice, body)["id"]
    paths = json.loads(httpx2.get(f"{url}/openapi.json").text)["paths"]
    asked = 0
    for path, operations in paths.items():
        if "{job_id}" not in path:
            continue
        for method in operations:
            concrete = path.replace("{job_id}", job_id).replace("{name}", "config.json").replace("{number}", "1")
            content: Any = {"labels": {}} if method == "patch" else None
            assert bob.request(method, concrete, json=content).status_code == 404, (method, path)
            asked += 1
    assert asked == 17
    assert bob.get("/v1/jobs").json()["items"] == []
    assert alice.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"
