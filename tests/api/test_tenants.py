"""What one API key may do to another's jobs and repositories, what an administrator may do, and what each key used."""

import asyncio
import datetime as dt
import logging
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.models import ApiKey
from app.auth.service import Caller
from app.config import Settings, get_settings
from app.db.session import session_factory
from app.http.problem import Problem
from app.jobs import leases, repositories, service
from app.jobs.models import Job
from app.jobs.repositories import Repository
from app.jobs.transitions import Trigger
from secateur.catalog.request import JobRequest
from secateur.contract.errors import PruningError
from secateur.contract.keys import USER, KeySettings, Scope
from tests import hub as fake
from tests.api import play
from tests.forked import secateur as run
from tests.test_leases import _at_once

Make = Callable[..., httpx2.Client]
Body = dict[str, Any]
PRIVATE: Body = {"model_id": "org/tiny", "target_ratio": 0.2, "method": "piem"}


def key_id(session: Session, name: str) -> uuid.UUID:
    session.rollback()
    return session.scalars(select(ApiKey.id).where(ApiKey.name == name)).one()


def submit(client: httpx2.Client, body: Body, **changes: Any) -> str:
    answer = client.post("/v1/jobs", json=body | changes)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def refused(client: httpx2.Client, body: Body, **changes: Any) -> dict[str, Any]:
    """The refusal of a request, which a dry run tells too."""
    answers = [client.post(path, json=body | changes) for path in ("/v1/jobs", "/v1/jobs?validate_only=true")]
    assert [answer.status_code for answer in answers] == [422, 422], [answer.text for answer in answers]
    codes = [answer.json()["code"] for answer in answers]
    assert codes[0] == codes[1]
    return dict(answers[0].json())


def publish(session: Session, job_id: str) -> None:
    """Play a worker that publishes the job."""
    attempt = play.start(session, job_id)
    leases.record_export(session, uuid.UUID(job_id), attempt, {}, [])
    leases.move(session, uuid.UUID(job_id), attempt, Trigger.SUCCEED, result=play.RESULT, report=play.REPORT)


class TestHubToken:
    """The service's Hub token serves the keys to which it is lent."""

    @pytest.fixture(autouse=True)
    def _hub(self, hub: fake.FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", fake.TOKEN)  # which huggingface_hub would send by itself

    def test_private_models_are_for_those_it_is_lent_to(self, make_client: Make, session: Session) -> None:
        bob = make_client("bob")
        seen = bob.post("/v1/models/inspect", json={"model_id": "org/tiny"})
        assert (seen.status_code, seen.json()["code"]) == (422, "model_not_found")
        assert refused(bob, PRIVATE)["code"] == "model_not_found"
        auth.change(session, key_id(session, "bob"), KeySettings(lend_hub_token=True))
        assert bob.post("/v1/models/inspect", json={"model_id": "org/tiny"}).json()["supported"]
        assert bob.post("/v1/jobs?validate_only=true", json=PRIVATE).status_code == 200

    def test_it_writes_to_the_keys_namespace_only(self, make_client: Make, session: Session, make_model: Any) -> None:
        bob, body = make_client("bob"), PRIVATE | {"model_id": make_model(), "publish": {"repo_id": "org/out"}}
        assert refused(bob, body)["code"] == "hub_forbidden"
        auth.change(session, key_id(session, "bob"), KeySettings(lend_hub_token=True))
        problem = refused(bob, body)
        assert problem["code"] == "namespace_forbidden"
        assert problem["errors"][0]["allowed"].startswith("namespace bob-")
        auth.change(session, key_id(session, "bob"), KeySettings(namespace="org"))
        submit(bob, body)
        assert refused(bob, body, publish={"repo_id": "tester/out"})["code"] == "namespace_forbidden"


class TestRepositories:
    """A repository is written by the jobs of one key."""

    def test_default_names_never_meet(self, make_client: Make, body: Body) -> None:
        clients = [make_client(name) for name in ("carol", "carol", "Carol & Söhne GmbH, Abteilung Modelle", "你好")]
        plans = [client.post("/v1/jobs?validate_only=true", json=body).json() for client in clients]
        names = [plan["targets"][0]["repo_id"] for plan in plans]
        assert len(set(names)) == 4 and all(name.endswith("/tiny-piem-lsps-20") for name in names)
        assert [name.partition("/")[0][:-13] for name in names] == ["carol", "carol", "carol-s-hne-gmbh-abt", "key"]
        for client, name in zip(clients, names, strict=True):
            submit(client, body, publish={"repo_id": name})

    def test_long_names_fit(self, make_client: Make, make_model: Any) -> None:
        body = {"model_id": make_model("m" * 90), "target_ratio": [1 / 3, 0.5], "method": "piem-lsps"}
        plan = make_client("c" * 42, namespace="n" * 42).post("/v1/jobs?validate_only=true", json=body).json()
        assert max(len(target["repo_id"]) for target in plan["targets"]) == 96

    def test_another_namespace_of_the_folder_is_refused(self, make_client: Make, body: Body) -> None:
        problem = refused(make_client("bob"), body, publish={"repo_id": "org/out"})
        assert problem["code"] == "namespace_forbidden" and problem["errors"][0]["field"] == "publish.repo_id"

    def test_one_that_another_key_made_is_refused(self, make_client: Make, body: Body, session: Session) -> None:
        alice, bob = (make_client(name, namespace="team") for name in ("alice", "bob"))
        several = body | {"target_ratio": [0.2, 0.5], "publish": {"repo_id": "team/out"}}
        publish(session, submit(alice, several))
        submit(alice, several)
        for wanted in (
            several,
            body | {"publish": {"repo_id": "team/out-50"}},
            body | {"publish": {"repo_id": "team/OUT-50"}},
        ):
            problem = refused(bob, wanted)
            assert problem["code"] == "repository_taken" and problem["errors"][0]["field"] == "publish.repo_id"
        submit(bob, body | {"publish": {"repo_id": "team/out-30"}})

    def test_it_stays_its_keys_when_the_job_is_deleted(self, make_client: Make, body: Body, session: Session) -> None:
        alice, bob = (make_client(name, namespace="team") for name in ("alice", "bob"))
        job_id = submit(alice, body)
        publish(session, job_id)
        assert alice.delete(f"/v1/jobs/{job_id}").status_code == 204
        assert refused(bob, body)["code"] == "repository_taken"

    def test_of_many_that_begin_to_publish_one_key_wins(
        self, make_client: Make, body: Body, session: Session, settings: Settings
    ) -> None:
        ids = [uuid.UUID(submit(make_client(f"key-{n}", namespace="team"), body)) for n in range(6)]
        attempts = [play.start(session, str(job_id)) for job_id in ids]

        def begin(job_id: uuid.UUID, attempt: int) -> Callable[[Session], str]:
            def call(session: Session) -> str:
                try:
                    leases.record_export(session, job_id, attempt, {}, [])
                    return "publishing"
                except PruningError as error:
                    return error.code

            return call

        calls = [begin(job_id, attempt) for job_id, attempt in zip(ids, attempts, strict=True)]
        assert sorted(_at_once(session_factory(), *calls)) == ["publishing"] + ["repository_taken"] * 5
        states = session.execute(select(Job.state, func.count()).group_by(Job.state)).all()
        assert sorted(tuple(row) for row in states) == [("publishing", 1), ("running", 5)], "a refusal changes nothing"

    def test_one_that_the_hub_let_nobody_write_is_free(self, make_client: Make, body: Body, session: Session) -> None:
        alice, bob = (make_client(name, namespace="team") for name in ("alice", "bob"))
        job_id = submit(alice, body)
        attempt = play.start(session, job_id)
        leases.record_export(session, uuid.UUID(job_id), attempt, {}, [])
        assert refused(bob, body)["code"] == "repository_taken"
        error = {"code": "hub_forbidden", "message": "No.", "retryable": False, "field": None}
        leases.fail(session, uuid.UUID(job_id), attempt, error, play.LIMITS)
        submit(bob, body)

    def test_claims_of_several_are_all_or_none(self, session: Session) -> None:
        first, second = uuid.uuid4(), uuid.uuid4()
        repositories.claim(session, first, uuid.uuid4(), ["a/b"])
        session.commit()
        with pytest.raises(PruningError, match="'a/B'"):
            repositories.claim(session, second, uuid.uuid4(), ["a/0", "a/B", "a/c"])
        session.rollback()
        assert session.scalars(select(Repository.repo_id)).all() == ["a/b"]


class TestAdministrator:
    @pytest.fixture
    def admin(self, make_client: Make) -> httpx2.Client:
        return make_client("admin", [Scope.ADMIN])

    def test_sees_the_jobs_of_all_keys(
        self, admin: httpx2.Client, make_client: Make, body: Body, session: Session
    ) -> None:
        alice, bob = make_client("alice"), make_client("bob")
        first, second = submit(alice, body), submit(bob, body)
        alice_id, bob_id = key_id(session, "alice"), key_id(session, "bob")

        def listed(client: httpx2.Client, **query: str) -> list[tuple[str, str | None]]:
            items = client.get("/v1/jobs", params=query).raise_for_status().json()["items"]
            return [(item["id"], item["key_id"]) for item in items]

        assert listed(admin) == []
        assert listed(admin, key_id="all") == [(second, str(bob_id)), (first, str(alice_id))]
        assert listed(admin, key_id=str(alice_id)) == [(first, str(alice_id))]
        assert listed(alice) == listed(alice, key_id=str(alice_id)) == [(first, None)], "a key is told of no keys"
        for other in ("all", str(bob_id)):
            answer = alice.get("/v1/jobs", params={"key_id": other})
            assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")
            assert 'scope="admin"' in answer.headers["WWW-Authenticate"]
        assert alice.get("/v1/jobs", params={"key_id": "some"}).status_code == 422
        attempt = play.start(session, first)
        play.progress(session, first, attempt, 0.5)
        assert admin.get(f"/v1/jobs/{first}").json()["key_id"] == str(alice_id)
        assert admin.get(f"/v1/jobs/{first}", headers={"Prefer": "wait=1", "If-None-Match": '"0"'}).json()["key_id"]
        assert alice.get(f"/v1/jobs/{first}").json()["key_id"] is None
        for part in ("events", "steps", "recipe", "artifacts"):
            assert admin.get(f"/v1/jobs/{first}/{part}").status_code == 200, part
            assert bob.get(f"/v1/jobs/{first}/{part}").status_code == 404, part
        assert admin.post("/v1/jobs", json=body).status_code == 403, "which needs 'submit'"

    def test_acts_are_recorded(
        self,
        admin: httpx2.Client,
        make_client: Make,
        body: Body,
        session: Session,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        alice, bob = make_client("alice"), make_client("bob")
        job_id = submit(alice, body)
        for path in ("pause", "resume", "cancel"):
            assert bob.post(f"/v1/jobs/{job_id}/{path}").status_code == 404
            assert admin.post(f"/v1/jobs/{job_id}/{path}").status_code == 200
        assert bob.patch(f"/v1/jobs/{job_id}", json={"labels": {"a": "b"}}).status_code == 404
        assert admin.patch(f"/v1/jobs/{job_id}", json={"labels": {"a": "b"}}).json()["labels"] == {"a": "b"}
        events = alice.get(f"/v1/jobs/{job_id}/events").json()["items"]
        admin_id = str(key_id(session, "admin"))
        assert [event["data"] for event in events if event["type"] == "admin"] == [
            {"key_id": admin_id, "action": action} for action in ("pause", "resume", "cancel", "label")
        ]
        assert bob.delete(f"/v1/jobs/{job_id}").status_code == 404
        with caplog.at_level(logging.WARNING):
            assert admin.delete(f"/v1/jobs/{job_id}").status_code == 204
        line = f"audit: admin key {admin_id} deleted job {job_id} of key {key_id(session, 'alice')}"
        assert line in caplog.messages
        assert alice.get(f"/v1/jobs/{job_id}").status_code == 404

    def test_acts_on_own_jobs_are_ordinary(self, make_client: Make, body: Body) -> None:
        both = make_client("both", [*Scope])
        job_id = submit(both, body)
        both.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
        assert {event["type"] for event in both.get(f"/v1/jobs/{job_id}/events").json()["items"]} == {"state"}

    def test_revoking_may_cancel_the_jobs(
        self, admin: httpx2.Client, make_client: Make, body: Body, session: Session
    ) -> None:
        alice, bob = make_client("alice"), make_client("bob")
        queued, running, paused, publishing = (submit(alice, body) for _ in range(4))
        other = submit(bob, body)
        play.start(session, running)
        alice.post(f"/v1/jobs/{paused}/pause").raise_for_status()
        leases.record_export(session, uuid.UUID(publishing), play.start(session, publishing), {}, [])
        alice_id = key_id(session, "alice")
        assert admin.delete(f"/v1/keys/{alice_id}", params={"cancel_jobs": "true"}).status_code == 204
        states = {item["id"]: item["state"] for item in admin.get("/v1/jobs?key_id=all").json()["items"]}
        assert [states[job_id] for job_id in (queued, running, paused, publishing, other)] == [
            "cancelled", "cancelling", "cancelled", "publishing", "queued"
        ]  # fmt: skip
        last = admin.get(f"/v1/jobs/{queued}/events").json()["items"][-1]
        assert last["data"] == {"key_id": str(key_id(session, "admin")), "action": "cancel"}

    def test_revoking_alone_leaves_the_jobs(
        self, admin: httpx2.Client, make_client: Make, body: Body, session: Session
    ) -> None:
        job_id = submit(make_client("alice"), body)
        assert admin.delete(f"/v1/keys/{key_id(session, 'alice')}").status_code == 204
        assert admin.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"

    def test_a_request_under_way_makes_no_job_after_the_revocation(
        self, make_client: Make, body: Body, session: Session
    ) -> None:
        make_client("alice")
        owner = key_id(session, "alice")
        auth.revoke(session, owner)
        with pytest.raises(Problem) as caught:
            asyncio.run(service.create(get_settings(), Caller(owner, USER), JobRequest.model_validate(body), None))
        assert caught.value.status == 401
        session.rollback()
        assert session.scalar(select(func.count()).select_from(Job)) == 0


class TestUsage:
    def test_by_key_and_day(self, make_client: Make, body: Body, session: Session, settings: Settings) -> None:
        alice, bob, admin = make_client("alice"), make_client("bob"), make_client("admin", [Scope.ADMIN])
        good, bad, lost, waiting = (submit(alice, body) for _ in range(4))
        submit(bob, body)
        attempts = {job_id: play.start(session, job_id) for job_id in (good, bad, lost)}
        session.execute(update(Job).where(Job.state == "running").values(claimed_at=func.now() - dt.timedelta(hours=1)))
        session.commit()
        play.succeed(session, settings, good, attempts[good])
        play.fail(session, bad, attempts[bad])
        ended = func.now() - dt.timedelta(minutes=30)
        session.execute(update(Job).where(Job.id == uuid.UUID(lost)).values(lease_expires_at=ended))
        session.commit()
        assert leases.reap(session, play.LIMITS) == [uuid.UUID(lost)]
        for job_id in (good, bad):
            assert alice.delete(f"/v1/jobs/{job_id}").status_code == 204
        [day] = alice.get("/v1/usage").json()["items"]
        assert day["key_id"] == str(key_id(session, "alice")) and day["bytes_stored"] == sum(
            map(len, play.CONTENTS.values())
        )
        assert (day["jobs_created"], day["jobs_succeeded"], day["jobs_failed"]) == (4, 1, 1)
        assert 9000 <= day["worker_seconds"] < 9000 + 3600, (
            "two hours, and the half hour up to the end of the lost lease"
        )
        assert alice.get(f"/v1/jobs/{waiting}").json()["state"] == "queued"
        assert (
            len(admin.get("/v1/usage?key_id=all").json()["items"]) == 2 and admin.get("/v1/usage").json()["items"] == []
        )
        assert admin.get("/v1/usage", params={"key_id": day["key_id"]}).json()["items"] == [day]
        assert alice.get("/v1/usage?key_id=all").status_code == 403
        tomorrow = (dt.datetime.now(dt.UTC) + dt.timedelta(days=2)).date()
        assert alice.get("/v1/usage", params={"since": str(tomorrow)}).json()["items"] == []
        metrics = httpx2.get(f"{alice.base_url}/metrics").text
        assert f'secateur_key_jobs_total{{key="{day["key_id"]}",what="created"}} 4.0' in metrics
        assert f'secateur_key_worker_seconds_total{{key="{day["key_id"]}"}} {day["worker_seconds"]}' in metrics

    def test_every_end_of_an_attempt_counts(self, make_client: Make, body: Body, session: Session) -> None:
        alice = make_client("alice")
        ids = [uuid.UUID(submit(alice, body)) for _ in range(3)]
        for job_id in ids:
            play.start(session, str(job_id))
        session.execute(update(Job).values(claimed_at=func.now() - dt.timedelta(hours=1)))
        session.commit()
        leases.release(session, ids[0], 1)
        alice.post(f"/v1/jobs/{ids[1]}/cancel").raise_for_status()
        leases.move(session, ids[1], 1, Trigger.STOPPED)
        alice.post(f"/v1/jobs/{ids[2]}/pause").raise_for_status()
        leases.release(session, ids[2], 1)
        [day] = alice.get("/v1/usage").json()["items"]
        assert day["worker_seconds"] >= 3 * 3600 and (day["jobs_succeeded"], day["jobs_failed"]) == (0, 0)

    def test_many_at_once_are_all_counted(
        self, make_client: Make, body: Body, session: Session, settings: Settings
    ) -> None:
        owners = [(make_client(f"key-{n}"), f"key-{n}") for n in range(3)]
        for client, _ in owners:
            for _ in range(4):
                play.start(session, submit(client, body))
        session.execute(update(Job).values(lease_expires_at=func.now() - dt.timedelta(seconds=1)))
        session.commit()
        once = replace(play.LIMITS, max_losses=1)
        reaped = _at_once(session_factory(), *[lambda s: leases.reap(s, once, limit=4) for _ in range(4)])
        while more := leases.reap(session, once):
            reaped.append(more)
        assert sum(map(len, reaped)) == 12
        failed = [client.get("/v1/usage").json()["items"][0]["jobs_failed"] for client, _ in owners]
        assert failed == [4, 4, 4]


class TestLimits:
    def test_a_keys_own_limit_of_open_jobs(self, make_client: Make, body: Body, session: Session) -> None:
        admin, alice, bob = (
            make_client("admin", [Scope.ADMIN]),
            make_client("alice", max_open_jobs=1),
            make_client("bob"),
        )
        submit(alice, body)
        full = alice.post("/v1/jobs", json=body)
        assert (full.status_code, full.json()["code"]) == (429, "too_many_jobs") and "has 1 jobs" in full.json()[
            "detail"
        ]
        for _ in range(2):
            submit(bob, body)
        path = f"/v1/keys/{key_id(session, 'alice')}"
        shown = admin.patch(path, json={"max_open_jobs": 2, "max_running_jobs": 7}).json()
        assert (shown["max_open_jobs"], shown["max_running_jobs"]) == (2, 7)
        submit(alice, body)
        assert alice.post("/v1/jobs", json=body).status_code == 429
        shown = admin.patch(path, json={"max_open_jobs": None}).json()
        assert (shown["max_open_jobs"], shown["max_running_jobs"]) == (None, 7)
        submit(alice, body)

    def test_a_keys_own_limit_beats_the_settings(
        self, make_client: Make, body: Body, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SECATEUR_MAX_OPEN_JOBS", "1")
        get_settings.cache_clear()
        alice = make_client("alice", max_open_jobs=2)
        submit(alice, body)
        submit(alice, body)
        assert alice.post("/v1/jobs", json=body).status_code == 429


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"namespace": "a/b"}, "namespace"),
        ({"namespace": "a--b"}, "namespace"),
        ({"namespace": "-a"}, "namespace"),
        ({"namespace": ".."}, "namespace"),
        ({"namespace": ""}, "namespace"),
        ({"namespace": "n" * 43}, "namespace"),
        ({"lend_hub_token": None}, "lend_hub_token"),
        ({"max_open_jobs": 0}, "max_open_jobs"),
        ({"max_running_jobs": 2**40}, "max_running_jobs"),
        ({"secret": "x"}, "secret"),
    ],
)
def test_bad_settings_of_keys(make_client: Make, session: Session, content: Body, field: str) -> None:
    admin = make_client("admin", [Scope.ADMIN])
    for answer in (
        admin.patch(f"/v1/keys/{key_id(session, 'admin')}", json=content),
        admin.post("/v1/keys", json={"name": "new"} | content),
    ):
        assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field, answer.text
    assert admin.patch(f"/v1/keys/{uuid.uuid4()}", json={}).status_code == 404


def test_settings_of_keys(make_client: Make) -> None:
    admin = make_client("admin", [Scope.ADMIN])
    made = admin.post("/v1/keys", json={"name": "x", "namespace": "org", "lend_hub_token": True}).json()
    assert (made["namespace"], made["lend_hub_token"], made["max_open_jobs"]) == ("org", True, None)
    path = f"/v1/keys/{made['id']}"
    assert admin.patch(path, json={}).json() == {name: value for name, value in made.items() if name != "secret"}
    changed = admin.patch(path, json={"namespace": None, "lend_hub_token": False}).json()
    assert changed["namespace"].startswith("x-") and not changed["lend_hub_token"]
    assert [key for key in admin.get("/v1/keys").json()["items"] if key["id"] == made["id"]] == [changed]


class TestLabels:
    def test_they_are_replaced(self, make_client: Make, body: Body) -> None:
        alice = make_client("alice")
        made = alice.post("/v1/jobs", json=body | {"labels": {"team": "nlp", "run": "1"}})
        path, tag = made.headers["Location"], made.headers["ETag"]
        changed = alice.patch(path, json={"labels": {"team": "vision"}}, headers={"If-Match": tag})
        assert changed.status_code == 200 and changed.json()["labels"] == {"team": "vision"}
        assert changed.headers["ETag"] != tag and alice.get(path, headers={"If-None-Match": tag}).status_code == 200
        assert alice.get(path).json()["request"]["labels"] == {"team": "nlp", "run": "1"}, "what was asked for"
        assert len(alice.get("/v1/jobs?label.team=vision").json()["items"]) == 1
        assert alice.get("/v1/jobs?label.team=nlp").json()["items"] == []
        late = alice.patch(path, json={"labels": {}}, headers={"If-Match": tag})
        assert (late.status_code, late.json()["code"]) == (412, "job_changed")
        weak = alice.patch(path, json={"labels": {}}, headers={"If-Match": "W/" + changed.headers["ETag"]})
        assert weak.status_code == 412, "If-Match compares strongly"
        assert alice.patch(path, json={"labels": {"team": "vision"}}).headers["ETag"] == changed.headers["ETag"]
        assert alice.patch(path, json={"labels": {}}, headers={"If-Match": "*"}).json()["labels"] == {}

    def test_a_job_that_has_ended_keeps_its_end(
        self, make_client: Make, body: Body, session: Session, settings: Settings
    ) -> None:
        alice = make_client("alice")
        job_id = submit(alice, body)
        play.succeed(session, settings, job_id, play.start(session, job_id))
        before = alice.get(f"/v1/jobs/{job_id}").json()
        after = alice.patch(f"/v1/jobs/{job_id}", json={"labels": {"kept": "yes"}}).json()
        assert after == before | {"labels": {"kept": "yes"}}

    @pytest.mark.parametrize(
        ("content", "field"),
        [
            ({}, "labels"),
            ({"labels": None}, "labels"),
            ({"labels": {"bad name": "x"}}, "labels.bad name.[key]"),
            ({"labels": {"a": "x\n"}}, "labels.a"),
            ({"labels": {f"l{n}": "" for n in range(33)}}, "labels"),
            ({"labels": {}, "state": "succeeded"}, "state"),
        ],
    )
    def test_bad_ones(self, make_client: Make, body: Body, content: Body, field: str) -> None:
        alice = make_client("alice")
        job_id = submit(alice, body)
        answer = alice.patch(f"/v1/jobs/{job_id}", json=content)
        assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field


def test_names_in_the_folders(make_client: Make, make_model: Any, settings: Settings) -> None:
    alice = make_client("alice")
    assert [alice.get(f"/v1/{kind}").json()["items"] for kind in ("models", "texts")] == [[], []]
    for name in ("b", "a"):
        make_model(name)
    (settings.models_dir / "no model").mkdir()
    (settings.models_dir / "file").touch()
    settings.texts_dir.mkdir()
    (settings.texts_dir / "novel.txt").touch()
    (settings.texts_dir / "folder").mkdir()
    settings.tasks_dir.mkdir()
    (settings.tasks_dir / "ours.jsonl").touch()
    assert alice.get("/v1/models").json()["items"] == ["local:a", "local:b"]
    assert alice.get("/v1/texts").json()["items"] == ["local:novel.txt"]
    tasks = alice.get("/v1/tasks").json()["items"]
    assert tasks[-1] == "ours" and "piqa" in tasks and str(settings.data_dir) not in str(tasks)


class TestCommandLine:
    @pytest.fixture
    def service(self, url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
        """Create a key with options, put it into the environment, and return its id."""
        monkeypatch.setenv("SECATEUR_URL", url)

        def use(name: str, *options: str) -> str:
            made = run("keys", "create", name, *options)
            assert made.returncode == 0, made.stderr
            monkeypatch.setenv("SECATEUR_API_KEY", made.stdout.strip())
            return made.stderr.split()[1]

        return use

    def test_settings_of_keys(self, settings: Settings, session: Session) -> None:
        options = ("--namespace", "org", "--lend-hub-token", "--max-open-jobs", "3", "--max-running-jobs", "2")
        assert run("keys", "create", "ops", *options).returncode == 0
        key = session.scalars(select(ApiKey)).one()
        assert (key.namespace, key.lend_hub_token, key.max_open_jobs, key.max_running_jobs) == ("org", True, 3, 2)
        assert (
            "namespace org, the service's Hub token, at most 3 open jobs, at most 2 running jobs"
            in run("keys", "list").stdout
        )
        changed = run("keys", "set", str(key.id), "--keep-hub-token", "--namespace", "", "--max-open-jobs", "0")
        session.refresh(key)
        assert key.namespace in changed.stdout and key.namespace.startswith("ops-")
        assert (key.lend_hub_token, key.max_open_jobs, key.max_running_jobs) == (False, None, 2)
        wrong = run("keys", "set", str(key.id), "--namespace", "a/b")
        assert wrong.returncode == 2 and "--namespace: " in wrong.stderr and "Traceback" not in wrong.stderr
        assert run("keys", "set", str(uuid.uuid4())).returncode == 2

    def test_an_administrator(
        self, service: Callable[..., str], make_client: Make, body: Body, session: Session
    ) -> None:
        alice = make_client("alice")
        first, second = submit(alice, body), submit(alice, body)
        service("ops", "--scope", "admin")
        alice_id = str(key_id(session, "alice"))
        listed = run("jobs", "--key-id", "all").stdout
        assert [line.split()[0] for line in listed.splitlines()] == [second, first] and f"key {alice_id}" in listed
        assert len(run("jobs", "--key-id", alice_id, "--limit", "1", "--json").stdout.splitlines()) == 1
        assert run("cancel", first).returncode == 0
        assert run("delete", first).returncode == 0 and run("delete", first).returncode == 2
        assert (
            alice_id in run("usage", "--key-id", "all").stdout
            and "2 created" in run("usage", "--key-id", alice_id).stdout
        )
        revoked = run("keys", "revoke", alice_id, "--cancel-jobs")
        assert "1 jobs are cancelled; 0 are publishing" in revoked.stdout
        assert session.scalars(select(Job.state)).all() == ["cancelled"]

    def test_a_user(self, service: Callable[..., str], body: Body, make_client: Make, settings: Settings) -> None:
        own = service("carol")
        job_id = run("submit", body["model_id"], "--ratio", "0.2", "--method", "piem").stdout.strip()
        assert "team=nlp" in run("label", job_id, "team=nlp", "run=1").stdout
        assert job_id in run("jobs", "--label", "team=nlp", "--state", "queued").stdout
        assert run("jobs", "--label", "team=x").stdout == ""
        assert run("label", job_id, "team").returncode == 2
        assert run("models").stdout == "local:tiny\n" and run("texts").stdout == "" and "piqa" in run("tasks").stdout
        assert "1 created, 0 succeeded" in run("usage", "--since", "2020-01-01").stdout and own in run("usage").stdout
        denied = run("jobs", "--key-id", "all")
        assert denied.returncode == 2 and "no scope 'admin'" in denied.stderr
