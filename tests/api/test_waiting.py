"""``Prefer: wait`` and the event stream: told at once, resumed exactly, ended at the end."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import psycopg
import pytest
from fastapi import routing
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings, get_settings
from app.http import prefer
from app.http.prefer import wait_seconds
from app.jobs import events, service
from app.jobs.events import READERS_EACH
from tests.api import play
from tests.api.conftest import ServerThread
from tests.patience import PATIENCE, wait_for

Body = dict[str, Any]


@pytest.fixture
def job_id(api: httpx2.Client, body: Body) -> str:
    return str(api.post("/v1/jobs", json=body).json()["id"])


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Whoever waits for a job is in here, by the seconds he waits for, and waits until he is notified: he never looks for himself."""
    waiting: list[float] = []

    async def wait(signal: events.Signal, seconds: float) -> None:
        waiting.append(seconds)
        await signal._event.wait()
        signal._event.clear()

    monkeypatch.setattr(events.Signal, "wait", wait)
    return waiting


@pytest.fixture
def later(waiting: list[float]) -> Iterator[Callable[..., None]]:
    """Run something as soon as somebody waits, in a thread."""
    threads = []

    def run(call: Callable[..., Any], *arguments: Any) -> None:
        def run_then() -> None:
            wait_for(lambda: waiting)
            call(*arguments)

        thread = threading.Thread(target=run_then)
        thread.start()
        threads.append(thread)

    yield run
    for thread in threads:
        thread.join()


def test_reading_the_header() -> None:
    for header, wait in [
        ([], None),
        (["wait=5"], 5),
        (["respond-async, wait=5"], 5),
        (["respond-async; x=1", "WAIT = 5"], 5),
        (['wait="7"'], 7),
        (["wait=0"], 1),
        (["wait=61"], 60),
        (["wait=-1"], None),
        (["wait=x"], None),
        (["await=5"], None),
        (["wait=5x"], None),
    ]:
        assert asyncio.run(wait_seconds(header)) == wait, header


def test_get_waits_for_a_change(api: httpx2.Client, job_id: str, session: Session, later: Callable[..., None]) -> None:
    tag = api.get(f"/v1/jobs/{job_id}").headers["ETag"]
    later(play.start, session, job_id)
    response = api.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=20", "If-None-Match": tag})
    assert (response.status_code, response.json()["state"]) == (200, "running")
    assert response.headers["Preference-Applied"] == "wait=20"


def test_repeated_headers_are_one_list_of_preferences(api: httpx2.Client, body: dict[str, Any]) -> None:
    headers = [("Prefer", "respond-async"), ("Prefer", "wait=1")]
    assert api.post("/v1/jobs", json=body, headers=headers).headers["Preference-Applied"] == "wait=1"


def test_get_without_a_tag_waits_for_the_next_change(
    api: httpx2.Client, job_id: str, session: Session, later: Callable[..., None]
) -> None:
    later(play.start, session, job_id)
    assert api.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=20"}).json()["state"] == "running"


def test_get_gives_up_after_the_wait(api: httpx2.Client, job_id: str) -> None:
    tag = api.get(f"/v1/jobs/{job_id}").headers["ETag"]
    begun = time.monotonic()
    response = api.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=1", "If-None-Match": tag})
    assert response.status_code == 304 and response.headers["Preference-Applied"] == "wait=1"
    assert time.monotonic() - begun >= 1


def test_an_old_tag_or_an_ended_job_is_answered_at_once(api: httpx2.Client, job_id: str, waiting: list[float]) -> None:
    stale = api.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=60", "If-None-Match": '"0"'})
    assert stale.status_code == 200
    tag = api.post(f"/v1/jobs/{job_id}/cancel").headers["ETag"]
    ended = api.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=60", "If-None-Match": tag})
    assert ended.status_code == 304
    assert waiting == []


def test_create_waits_for_the_end(
    api: httpx2.Client, body: Body, session: Session, settings: Settings, later: Callable[..., None]
) -> None:
    def work() -> None:
        jobs = api.get("/v1/jobs").json()["items"]
        play.fail(session, jobs[0]["id"], play.start(session, jobs[0]["id"]))

    later(work)
    response = api.post("/v1/jobs", json=body, headers={"Prefer": "wait=20"})
    assert (response.status_code, response.json()["state"]) == (202, "failed")
    assert response.headers["Preference-Applied"] == "wait=20"
    assert "Retry-After" not in response.headers


def test_many_wait_and_the_service_still_answers(
    api: httpx2.Client, job_id: str, session: Session, waiting: list[float]
) -> None:
    """More waiters than the service has threads or connections."""
    answers: list[int] = []

    def wait() -> None:
        answers.append(api.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=30"}).status_code)

    limits = httpx2.Limits(max_connections=200)
    with httpx2.Client(base_url=api.base_url, headers=api.headers, limits=limits, timeout=PATIENCE) as api:
        threads = [threading.Thread(target=wait) for _ in range(80)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(waiting) == 80)
        assert api.get(f"/v1/jobs/{job_id}").status_code == 200
        assert answers == []
        play.start(session, job_id)
        for thread in threads:
            thread.join(timeout=PATIENCE)
    assert answers == [200] * 80


def test_the_waiters_of_one_key_read_in_turn(
    api: httpx2.Client, job_id: str, session: Session, waiting: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One change wakes many long polls and streams of a key; few of them read the database at once."""
    reading, most, lock, read = 0, 0, threading.Lock(), service.view

    def view(*values: Any) -> Any:
        nonlocal reading, most
        with lock:
            reading += 1
            most = max(most, reading)
        time.sleep(0.01)
        with lock:
            reading -= 1
        return read(*values)

    def wait() -> None:
        assert client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=60"}).json()["state"] == "running"

    def watch() -> None:
        with client.stream("GET", f"/v1/jobs/{job_id}/events/stream") as response:
            arriving = _frames(response.iter_lines())
            assert [next(arriving)["event"] for _ in range(2)] == ["state", "state"]

    limits = httpx2.Limits(max_connections=100)
    connected = httpx2.Client(base_url=api.base_url, headers=api.headers, limits=limits, timeout=PATIENCE)
    with connected as client, ThreadPoolExecutor(30) as pool:
        calls = [pool.submit(wait) for _ in range(20)] + [pool.submit(watch) for _ in range(10)]
        wait_for(lambda: len(waiting) == 30)
        monkeypatch.setattr(service, "view", view)
        play.start(session, job_id)
        for call in calls:
            call.result()
    assert most == READERS_EACH


def test_the_listener_comes_back(
    api: httpx2.Client, job_id: str, session: Session, database_url: str, later: Callable[..., None]
) -> None:
    url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        killed = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE query LIKE 'LISTEN%' AND datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchall()
        assert len(killed) == 1
        while not connection.execute(
            "SELECT 1 FROM pg_stat_activity"
            " WHERE query LIKE 'LISTEN%' AND datname = current_database() AND state = 'idle'"
        ).fetchall():
            time.sleep(0.1)
    test_get_waits_for_a_change(api, job_id, session, later)


class Frame(dict[str, str]):
    """One event of a stream: its fields."""


def _frames(lines: Iterator[str]) -> Iterator[Frame]:
    frame = Frame()
    for line in lines:
        if not line:
            if frame:
                yield frame
            frame = Frame()
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            frame[name] = value


def test_stream(api: httpx2.Client, job_id: str, session: Session, settings: Settings, waiting: list[float]) -> None:
    frames: list[Frame] = []
    with api.stream("GET", f"/v1/jobs/{job_id}/events/stream") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        arriving = _frames(response.iter_lines())
        frames.append(next(arriving))
        attempt = play.start(session, job_id)
        frames.append(next(arriving))
        play.progress(session, job_id, attempt, 0.5)
        frames.append(next(arriving))
        play.finish_round(session, job_id, attempt, 1)
        frames.append(next(arriving))
        play.succeed(session, settings, job_id, attempt)
        frames += arriving
    assert [frame["event"] for frame in frames] == ["state", "state", "progress", "step", "state", "state", "end"]
    assert json.loads(frames[2]["data"])["share"] == 0.5 and "id" not in frames[2]
    assert json.loads(frames[3]["data"])["data"]["perplexity"] == 11.0
    assert json.loads(frames[-1]["data"]) == {"state": "succeeded"}
    stored = api.get(f"/v1/jobs/{job_id}/events").json()["items"]
    assert [json.loads(frame["data"]) for frame in frames if "id" in frame] == stored
    assert [frame["id"] for frame in frames if "id" in frame] == [str(event["id"]) for event in stored]


def test_stream_resumes(api: httpx2.Client, job_id: str, session: Session) -> None:
    attempt = play.start(session, job_id)
    for number in range(150):  # more than the stream reads at once
        play.finish_round(session, job_id, attempt, number)
    play.fail(session, job_id, attempt)
    path = f"/v1/jobs/{job_id}/events/stream"
    with api.stream("GET", path) as response:
        whole = list(_frames(response.iter_lines()))
    assert len(whole) == 150 + 4
    for seen in (0, 1, 100, 152, 153):
        last = whole[seen - 1]["id"] if seen else "0"
        with api.stream("GET", path, headers={"Last-Event-ID": last}) as response:
            assert list(_frames(response.iter_lines())) == whole[seen:]
    assert api.get(path, headers={"Last-Event-ID": "x"}).status_code == 422


def test_stream_goes_on_after_a_retry(api: httpx2.Client, job_id: str) -> None:
    api.post(f"/v1/jobs/{job_id}/cancel")
    api.post(f"/v1/jobs/{job_id}/retry")
    with api.stream("GET", f"/v1/jobs/{job_id}/events/stream") as response:
        arriving = _frames(response.iter_lines())
        seen = [json.loads(next(arriving)["data"])["data"]["to"] for _ in range(3)]
        api.post(f"/v1/jobs/{job_id}/cancel")
        rest = list(arriving)
    assert seen == ["queued", "cancelled", "queued"]
    assert [frame["event"] for frame in rest] == ["state", "end"]


def test_stream_is_kept_alive(api: httpx2.Client, job_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_PING_INTERVAL", 0.2)
    with api.stream("GET", f"/v1/jobs/{job_id}/events/stream") as response:
        assert any(line.startswith(":") for line in response.iter_lines())


def test_a_deleted_job_ends_the_stream(api: httpx2.Client, job_id: str) -> None:
    api.post(f"/v1/jobs/{job_id}/cancel")
    with api.stream("GET", f"/v1/jobs/{job_id}/events/stream") as response:
        assert [frame["event"] for frame in _frames(response.iter_lines())] == ["state", "state", "end"]


class TestARevokedKey:
    @pytest.fixture
    def revoke(self, session: Session) -> Callable[[], None]:
        def revoke() -> None:
            for key in auth.every(session):
                auth.revoke(session, key.id)

        return revoke

    def test_ends_the_stream(
        self, api: httpx2.Client, job_id: str, session: Session, revoke: Callable[[], None]
    ) -> None:
        with api.stream("GET", f"/v1/jobs/{job_id}/events/stream") as response:
            arriving = _frames(response.iter_lines())
            assert next(arriving)["event"] == "state"
            revoke()
            play.start(session, job_id)
            [end] = arriving
        assert (end["event"], json.loads(end["data"])) == ("end", {"code": "unauthorized"})

    def test_ends_the_wait(
        self,
        api: httpx2.Client,
        job_id: str,
        revoke: Callable[[], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Nobody is notified of it: whoever waits, here for longer than the client does, looks for himself."""
        monkeypatch.setattr(prefer, "LONGEST", 10 * PATIENCE)
        monkeypatch.setattr(events, "POLL", 0.2)
        look, waiting = events.Signal.wait, threading.Event()

        async def wait(signal: events.Signal, seconds: float) -> None:
            waiting.set()
            await look(signal, seconds)

        monkeypatch.setattr(events.Signal, "wait", wait)

        def revoke_when_waiting() -> None:
            if waiting.wait(PATIENCE):
                revoke()

        revoking = threading.Thread(target=revoke_when_waiting)
        revoking.start()
        assert api.get(f"/v1/jobs/{job_id}", headers={"Prefer": f"wait={10 * PATIENCE:.0f}"}).status_code == 401
        revoking.join()


def test_a_key_waits_only_so_often(
    settings: Settings, session: Session, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams and long polls of a key share its places; another key is not affected, and a place is free when it is left."""
    monkeypatch.setenv("SECATEUR_MAX_WAITING", "2")
    get_settings.cache_clear()
    clients = []
    with ServerThread() as url:
        for name in ("alice", "bob"):
            _, secret = auth.create(session, name)
            clients.append(httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=PATIENCE))
        alice, bob = clients
        streams = [f"/v1/jobs/{client.post('/v1/jobs', json=body).json()['id']}/events/stream" for client in clients]
        poll = streams[0].removesuffix("/events/stream")
        with alice.stream("GET", streams[0]) as first, alice.stream("GET", streams[0]) as second:
            assert (first.status_code, second.status_code) == (200, 200)
            for path, headers in ((streams[0], {}), (poll, {"Prefer": "wait=60"})):
                full = alice.get(path, headers=headers)
                assert (full.status_code, full.json()["code"]) == (429, "too_many_at_once"), path
                assert int(full.headers["Retry-After"]) > 0
            full = alice.post("/v1/jobs", json=body, headers={"Prefer": "wait=60", "Idempotency-Key": "x"})
            assert full.status_code == 202, "the job was made; its answer comes at once"
            assert alice.get(poll).status_code == 200
            with bob.stream("GET", streams[1]) as other:
                assert other.status_code == 200

        def again() -> bool:
            with alice.stream("GET", streams[0]) as third:
                return third.status_code == 200

        wait_for(again)
        for client in clients:
            client.close()
