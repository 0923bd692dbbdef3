"""The Python client, both forms, against the service; tests/test_acceptance.py runs it with a real worker."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings
from secateur.client import (
    AsyncClient,
    Client,
    Forbidden,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    NotFound,
    Unauthorized,
    Unreachable,
    WaitTimeout,
    WrongState,
)
from secateur.client.frames import Frame
from tests.api import play
from tests.patience import PATIENCE

CHUNK = 4096


class Breaking:
    """A proxy that drops a connection when ``allowed`` bytes of answers have passed, as often as ``breaks`` says."""

    def __init__(self, url: str) -> None:
        self.target = int(url.rpartition(":")[2])
        self.allowed, self.breaks = 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        passed = 0
        try:
            while data := source.recv(CHUNK):
                if answers and self.breaks and passed + len(data) > self.allowed:
                    self.breaks -= 1
                    sink.sendall(data[: max(self.allowed - passed, 0)])
                    break
                passed += len(data)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def breaking(url: str) -> Iterator[Breaking]:
    proxy = Breaking(url)
    yield proxy
    proxy.close()


@pytest.fixture
def secret(session: Session) -> str:
    return auth.create(session, "client", [*auth.Scope])[1]


@pytest.fixture
def client(url: str, secret: str) -> Iterator[Client]:
    with Client(url, secret) as client:
        yield client


def test_a_job_from_its_request_to_its_files(
    client: Client, body: dict[str, Any], session: Session, settings: Settings, tmp_path: Path
) -> None:
    assert client.jobs.dry_run(**body).targets[0].target_ratio == 0.2
    job = client.jobs.create(**body, labels={"team": "nlp"})
    seen: list[tuple[str, float]] = []

    def work() -> None:
        attempt = play.start(session, str(job.id))
        for share in (0.2, 0.6):
            play.progress(session, str(job.id), attempt, share)
        play.finish_round(session, str(job.id), attempt, 1)
        play.succeed(session, settings, str(job.id), attempt)

    with pytest.raises(WaitTimeout):
        job.wait(timeout=0, on_progress=lambda job: work() if not seen else None)
    job.wait(
        timeout=PATIENCE, on_progress=lambda job: seen.append((job.state, job.progress.share if job.progress else 0))
    )
    assert seen[-1][0] == "succeeded" and job.result == play.RESULT and job.refresh().state == "succeeded"
    assert job.report()["perplexity"] == play.REPORT["perplexity"] and job.report().ratio == 0.2
    assert [each.number for each in job.steps()] == [1]
    assert [(each.step, each.perplexity) for each in job.metrics()] == [(1, 11.0)]
    assert [each.data["to"] for each in job.events() if each.type == "state"] == [
        "queued",
        "running",
        "publishing",
        "succeeded",
    ]
    frames = list(job.stream())
    assert [frame.id for frame in frames[:-1]] == [each.id for each in job.events()] and frames[-1].event == "end"
    out = tmp_path / "out"
    assert job.download(out) == out
    assert (out / "model.safetensors").read_bytes() == bytes(range(256)) * 40
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}
    [found] = client.jobs.list(labels={"team": "nlp"}, state=["succeeded"])
    assert found.id == job.id and not list(client.jobs.list(state=["failed"]))
    with pytest.raises(WrongState):
        job.cancel()
    job.delete()
    with pytest.raises(NotFound):
        job.refresh()


def test_the_same_with_await(
    url: str, secret: str, body: dict[str, Any], session: Session, settings: Settings, tmp_path: Path
) -> None:
    async def use() -> list[str]:
        async with AsyncClient(url, secret) as client:
            jobs = [await client.jobs.create(**body) for _ in range(2)]
            waiting = [asyncio.create_task(job.wait(timeout=PATIENCE)) for job in jobs]
            streams = asyncio.create_task(_collect(jobs[0].stream()))
            await asyncio.sleep(0.1)
            for job in jobs:
                attempt = await asyncio.to_thread(play.start, session, str(job.id))
                await asyncio.to_thread(play.succeed, session, settings, str(job.id), attempt)
            await asyncio.gather(*waiting)
            assert (await streams)[-1].event == "end"
            await jobs[0].download(tmp_path)
            assert (await jobs[0].report()).perplexity == (10.0, 11.0)
            assert [each.data["to"] async for each in jobs[0].events()][-1] == "succeeded"
            assert (await client.methods()).items and (await client.inspect(body["model_id"])).supported
            return [item.state async for item in client.jobs.list()]

    assert asyncio.run(use()) == ["succeeded"] * 2
    assert (tmp_path / "model.safetensors").stat().st_size == 256 * 40


async def _collect(stream: Any) -> list[Frame]:
    return [frame async for frame in stream]


def test_pages_are_asked_for_as_they_are_needed(client: Client, body: dict[str, Any]) -> None:
    made = [client.jobs.create(**body).id for _ in range(5)]
    assert [job.id for job in client.jobs.list(page_size=2)] == made[::-1]


def test_what_does_not_succeed_is_raised(client: Client, body: dict[str, Any], session: Session) -> None:
    failed, cancelled = client.jobs.create(**body), client.jobs.create(**body)
    play.fail(session, str(failed.id), play.start(session, str(failed.id)))
    with pytest.raises(JobFailed, match="NaN") as caught:
        failed.wait()
    assert caught.value.error is not None and caught.value.error.code == "nan_weights"
    assert failed.retry().state == "queued"
    cancelled.cancel()
    with pytest.raises(JobCancelled):
        cancelled.wait()


def test_refusals_are_exceptions_that_name_the_field(
    client: Client, url: str, session: Session, body: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match="target_ratio") as caught:
        client.jobs.create(**body | {"target_ratio": 7})
    [error] = caught.value.errors
    assert (caught.value.status, caught.value.code, error.field) == (422, "invalid_request", "target_ratio")
    assert error.allowed == "at most 0.9"
    with pytest.raises(Unauthorized), Client(url, "sk-secateur-wrong") as stranger:
        stranger.methods()
    _, reader = auth.create(session, "reader", [auth.Scope.READ])
    with pytest.raises(Forbidden), Client(url, reader) as other:
        other.jobs.create(**body)
    with pytest.raises(ValueError, match="SECATEUR_API_KEY"):
        Client(url)


def test_requests_are_repeated_and_make_one_job(breaking: Breaking, secret: str, body: dict[str, Any]) -> None:
    with Client(breaking.url, secret) as client:
        breaking.breaks = 2
        job = client.jobs.create(**body)
        assert breaking.breaks == 0 and [each.id for each in client.jobs.list()] == [job.id]
        breaking.breaks = 99
        with pytest.raises(Unreachable):
            job.refresh()


def test_broken_streams_and_downloads_are_taken_up_again(
    breaking: Breaking, secret: str, body: dict[str, Any], session: Session, settings: Settings, tmp_path: Path
) -> None:
    with Client(breaking.url, secret) as client:
        job = client.jobs.create(**body)
        attempt = play.start(session, str(job.id))
        for number in range(1, 9):
            play.finish_round(session, str(job.id), attempt, number)
        play.succeed(session, settings, str(job.id), attempt)
        whole = [frame.id for frame in job.stream()]
        breaking.allowed, breaking.breaks = 1500, 2
        assert [frame.id for frame in job.stream()] == whole and breaking.breaks == 0
        breaking.allowed, breaking.breaks = 6000, 1
        (tmp_path / "model.safetensors.part").write_bytes(bytes(range(256)) * 2)
        with Client(breaking.url, secret) as again:
            again.jobs.get(job.id).download(tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == bytes(range(256)) * 40 and breaking.breaks == 0


def test_busy_services_are_asked_again_when_they_say(
    client: Client, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("secateur.client._sync.client.sleep", slept.append)
    answers = iter(
        [httpx2.Response(503, headers={"Retry-After": "7"}), httpx2.Response(429), httpx2.Response(200, json={})]
    )
    monkeypatch.setattr(client._http, "request", lambda *arguments, **options: next(answers))
    assert client.request("GET", "/x").status_code == 200
    assert slept[0] == 7.0 and 0 < slept[1] <= 1.0


def test_keys(client: Client, url: str, body: dict[str, Any]) -> None:
    made = client.keys.create("carol", ["read"])
    assert made.scopes == ["read"] and made.name in [key.name for key in client.keys.list()]
    rotated = client.keys.rotate(made.id, grace_seconds=0)
    with Client(url, rotated.secret) as carol:
        assert not list(carol.jobs.list())
        client.keys.revoke(made.id)
        with pytest.raises(Unauthorized):
            list(carol.jobs.list())
