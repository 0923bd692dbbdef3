"""A Hub that is slow, or whose files are huge, delays those who need it and nobody else."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from app import hub as hub_answers
from secateur.catalog import hub_reads
from secateur.catalog.sources import LARGEST_CONFIG
from tests import hub as fake
from tests.api.conftest import CONFIG
from tests.patience import wait_for

REQUEST: dict[str, Any] = {"model_id": "org/tiny", "target_ratio": 0.2, "method": "piem"}
PUBLISHER: dict[str, Any] = {"namespace": "org", "lend_hub_token": True}
MANY = 60
"""More than the threads that answer requests."""


@pytest.fixture
def silent_hub(hub: fake.FakeHub) -> Iterator[fake.FakeHub]:
    """A Hub that accepts requests and answers none until ``speaks`` is set."""
    hub.speaks.clear()
    yield hub
    hub.speaks.set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/jobs", REQUEST),
        ("/v1/jobs?validate_only=true", REQUEST),
        ("/v1/jobs", {"publish": {"repo_id": "org/out"}}),
        ("/v1/models/inspect", {"model_id": "org/tiny"}),
    ],
)
def test_others_are_served_while_the_hub_is_silent(
    silent_hub: fake.FakeHub,
    make_client: Callable[..., httpx2.Client],
    body_of_a_local_model: dict[str, Any],
    path: str,
    body: dict[str, Any],
) -> None:
    alice, bob = make_client("alice", **PUBLISHER), make_client("bob", **PUBLISHER)
    sent = body if "model_id" in body else body_of_a_local_model | body
    ended: list[int] = []

    def submit(_: int) -> httpx2.Response:
        answer = alice.post(path, json=sent)
        ended.append(answer.status_code)
        return answer

    with ThreadPoolExecutor(MANY) as pool:
        answers = pool.map(submit, range(MANY))
        wait_for(lambda: len(ended) == MANY - hub_answers.EACH)
        for _ in range(3):
            assert bob.get("/v1/jobs").status_code == 200
            assert bob.get("/v1/methods").status_code == 200
            assert bob.post("/v1/jobs", json=body_of_a_local_model).status_code == 202
        assert set(ended) == {429}, "the others wait for the Hub still"
        silent_hub.speaks.set()
        found = list(answers)
    refused = [answer for answer in found if answer.status_code == 429]
    assert len(found) - len(refused) == hub_answers.EACH and all(
        answer.status_code < 300 for answer in found if answer not in refused
    )
    assert {answer.json()["code"] for answer in refused} == {"too_many_at_once"}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)


@pytest.fixture
def body_of_a_local_model(make_model: Callable[..., str]) -> dict[str, Any]:
    return REQUEST | {"model_id": make_model()}


def test_a_full_pool_says_when_to_come_again(
    silent_hub: fake.FakeHub, make_client: Callable[..., httpx2.Client]
) -> None:
    clients = [make_client(name, **PUBLISHER) for name in ("alice", "bob", "carol")]
    inspected = {"model_id": "org/tiny"}
    with ThreadPoolExecutor(hub_answers.THREADS) as pool:
        waiting = [
            pool.submit(client.post, "/v1/models/inspect", json=inspected)
            for client in clients[:2]
            for _ in range(hub_answers.EACH)
        ]
        wait_for(lambda: len(silent_hub.asked) == hub_answers.THREADS)
        full = clients[2].post("/v1/models/inspect", json=inspected)
        assert (full.status_code, full.json()["code"]) == (503, "hub_busy") and int(full.headers["Retry-After"]) > 0
        silent_hub.speaks.set()
        assert {answer.result().status_code for answer in waiting} == {200}
    assert clients[2].post("/v1/models/inspect", json=inspected).status_code == 200


def test_every_question_has_an_end(
    silent_hub: fake.FakeHub, api: httpx2.Client, body_of_a_local_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is asked once: a retry would multiply the wait."""
    monkeypatch.setattr(hub_reads, "READ_SECONDS", 0.2)
    refused = api.post("/v1/models/inspect", json={"model_id": "org/tiny"})
    assert (refused.status_code, refused.json()["code"]) == (503, "hub_unavailable")
    published = body_of_a_local_model | {"publish": {"repo_id": "org/out"}}
    assert api.post("/v1/jobs", json=published).status_code == 202, "the worker will ask again"
    assert silent_hub.asked == ["/api/models/org/tiny", "/api/whoami-v2"]


def test_an_answer_that_trickles_has_an_end(
    hub: fake.FakeHub, api: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_reads, "WHOLE_SECONDS", -1.0)
    refused = api.post("/v1/models/inspect", json={"model_id": "org/tiny"})
    assert (refused.status_code, refused.json()["code"]) == (503, "hub_unavailable")


def test_what_was_asked_is_known_for_a_while(
    hub: fake.FakeHub, api: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        assert api.post("/v1/jobs", json=REQUEST | {"publish": {"repo_id": "org/out"}}).status_code == 202
        assert api.post("/v1/models/inspect", json={"model_id": "org/tiny"}).status_code == 200
    commit = hub.repositories["org/tiny"].head.sha
    assert hub.asked == ["/api/whoami-v2", "/api/models/org/tiny", f"/org/tiny/resolve/{commit}/config.json"]
    other = api.post("/v1/models/inspect", json={"model_id": "org/tiny", "hub_token": "hf_other"})
    assert other.status_code != 200, "what one token may read is not told to another"


def test_a_huge_config_is_not_read_whole(hub: fake.FakeHub, api: httpx2.Client, tmp_path: Any) -> None:
    size = 16 * LARGEST_CONFIG
    files = {"config.json": b" " * size, "tokenizer.json": b"{}", "model.safetensors": b""}
    hub.create("org/huge", files=files)
    hub.create("org/deep", files=files | {"config.json": b"[" * LARGEST_CONFIG})
    hub.create("org/fair", files=files | {"config.json": json.dumps(CONFIG).encode().ljust(LARGEST_CONFIG)})
    for path, body in (
        ("/v1/models/inspect", {"model_id": "org/huge"}),
        ("/v1/jobs", REQUEST | {"model_id": "org/huge"}),
    ):
        refused = api.post(path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (422, "config_invalid")
        assert "4,194,304 bytes" in refused.json()["detail"]
    assert hub.sent < size, "of two files of this size"
    assert not (tmp_path / "cache").exists(), "nothing is kept on disk"
    assert api.post("/v1/models/inspect", json={"model_id": "org/deep"}).json()["code"] == "config_invalid"
    assert api.post("/v1/models/inspect", json={"model_id": "org/fair"}).status_code == 200


def test_waiting_for_the_hub_holds_no_connection(
    silent_hub: fake.FakeHub, api: httpx2.Client, make_client: Callable[[str], httpx2.Client]
) -> None:
    from app.db.session import session_factory

    done = threading.Event()

    def submit() -> None:
        api.post("/v1/jobs", json=REQUEST | {"publish": {"repo_id": "org/out"}})
        done.set()

    threading.Thread(target=submit).start()
    wait_for(lambda: silent_hub.asked)
    assert session_factory().kw["bind"].pool.checkedout() == 0
    silent_hub.speaks.set()
    wait_for(done.is_set)
