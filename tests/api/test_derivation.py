"""Jobs that are derived from earlier jobs: what they take over, what the changes do, and what is refused."""

import asyncio
import json
import uuid
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from sqlalchemy.orm import Session

from app.config import Settings
from app.jobs.derivation import patched
from secateur.client import AsyncClient, Client
from secateur.contract.keys import Scope
from tests.api import play
from tests.api.test_problems import ODD

Body = dict[str, Any]
Make = Callable[..., httpx2.Client]
TEXT = "A text of the earlier job. " * 30


@pytest.fixture
def earlier(api: httpx2.Client, body: Body) -> Body:
    """A job with texts, training and labels."""
    asked = body | {
        "calibration": {"texts": [TEXT], "samples": 4, "sequence_length": 32},
        "recovery": {"training": {"kind": "lora", "rank": 4}},
        "labels": {"team": "nlp", "run": "1"},
        "seed": 7,
        "priority": 3,
    }
    made: Body = api.post("/v1/jobs", json=asked).json()
    return made


def derive(api: httpx2.Client, earlier: Body, **changes: Any) -> Body:
    answer = api.post("/v1/jobs", json={"from": earlier["id"], **changes})
    assert answer.status_code == 202, answer.text
    made: Body = answer.json()
    return made


def refused(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 422, answer.text
    return {error["field"]: error for error in answer.json()["errors"]}


def test_without_changes_it_is_the_same_request(api: httpx2.Client, earlier: Body) -> None:
    made = derive(api, earlier)
    assert made["id"] != earlier["id"] and made["request"] == earlier["request"]
    assert (made["derived_from"], earlier["derived_from"]) == (earlier["id"], None)
    assert api.get(f"/v1/jobs/{made['id']}/recipe").json()["calibration"]["texts"] == [TEXT]
    listed = {job["id"]: job["derived_from"] for job in api.get("/v1/jobs").json()["items"]}
    assert listed == {made["id"]: earlier["id"], earlier["id"]: None}
    assert derive(api, made)["derived_from"] == made["id"]


def test_changes_are_a_merge_patch(api: httpx2.Client, earlier: Body) -> None:
    changes = {
        "target_ratio": [0.1, 0.3],
        "seed": None,
        "labels": {"run": None, "note": "x"},
        "calibration": {"samples": 2},
        "recovery": {"training": {"rank": 8}},
        "evaluation": {"latency": False},
    }
    request = derive(api, earlier, **changes)["request"]
    kept = earlier["request"]
    assert request["target_ratio"] == [0.1, 0.3] and request["seed"] == 0
    assert request["labels"] == {"team": "nlp", "note": "x"}
    assert request["calibration"] == kept["calibration"] | {"samples": 2}
    assert request["recovery"]["training"] == kept["recovery"]["training"] | {"rank": 8}
    assert request["evaluation"] == kept["evaluation"] | {"latency": False}
    same = request.keys() - changes.keys() - {"publish"}
    assert {name: request[name] for name in same} == {name: kept[name] for name in same}
    assert derive(api, earlier, recovery={"training": None})["request"]["recovery"]["training"] is None


def test_fields_that_exclude_or_belong_to_another(api: httpx2.Client, earlier: Body, make_model: Any) -> None:
    aimed = derive(api, earlier, goal={"parameters": 200_000})
    assert aimed["request"]["target_ratio"] is None and aimed["request"]["goal"]["parameters"] == 200_000
    back = derive(api, aimed, target_ratio=0.2)
    assert (back["request"]["target_ratio"], back["request"]["goal"]) == (0.2, None)
    pinned = derive(api, earlier)["request"]
    assert pinned["revision"] == earlier["request"]["revision"]
    other = derive(api, earlier, model_id=make_model("other"))
    assert (other["model_id"], other["request"]["revision"]) == ("local:other", None)


def test_a_name_that_the_service_chose_is_chosen_again(api: httpx2.Client, earlier: Body, settings: Settings) -> None:
    assert settings.hub_dir is not None
    assert earlier["request"]["publish"]["repo_id"].endswith("-20")
    assert derive(api, earlier, target_ratio=0.3)["request"]["publish"]["repo_id"].endswith("-30")
    named = derive(api, earlier, publish={"repo_id": "org/mine", "private": False})
    again = derive(api, named, target_ratio=0.3)
    assert again["request"]["publish"] == {"repo_id": "org/mine", "private": False}
    renamed = derive(api, named, publish={"repo_id": "org/other"})
    assert renamed["request"]["publish"] == {"repo_id": "org/other", "private": False}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"target_ratio": 2}, "target_ratio"),
        ({"method": "owl"}, "method"),
        ({"method": None}, "method"),
        ({"layut": "padded"}, "layut"),
        ({"layut": None}, "layut"),
        ({"from_job": "x"}, "from_job"),
        ({"recovery": {"trainig": None}}, "recovery.trainig"),
        ({"calibration": {"dataset": "wikitext2"}}, "calibration"),
        ({"target_ratio": 0.2, "goal": {"bytes": 1e6}}, "goal"),
        ({"model_id": None}, "model_id"),
        ({"recovery": 7}, "recovery"),
    ],
)
def test_the_field_at_fault_is_named(api: httpx2.Client, earlier: Body, changes: Body, field: str) -> None:
    for query in ("", "?validate_only=true"):
        found = refused(api.post(f"/v1/jobs{query}", json={"from": earlier["id"], **changes}))
        assert any(name == field or name.startswith(f"{field}.") for name in found), found


@pytest.mark.parametrize("odd", ODD)
def test_odd_characters_anywhere(api: httpx2.Client, earlier: Body, odd: str) -> None:
    changes: list[Any] = [
        {odd: odd}, {odd: None}, {"labels": {odd: "x"}}, {"labels": {"x": odd}}, {"labels": {odd: None}},
        {"calibration": {"texts": [odd]}}, {"calibration": {odd: None}}, {"method": odd}, {"hub_token": odd}, {"from": odd},
    ]  # fmt: skip
    for change in changes:
        content = json.dumps({"from": earlier["id"]} | change).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": str(uuid.uuid4())}
        for url in ("/v1/jobs", "/v1/jobs?validate_only=true"):
            answer = api.post(url, content=content, headers=headers)
            assert answer.status_code in (200, 202, 422), (change, answer.text)
            answer.json()


def test_from_is_an_id_and_without_it_a_model_is_needed(api: httpx2.Client, body: Body) -> None:
    wrong: Any
    for wrong in (None, "x", 7, [], {}):
        assert list(refused(api.post("/v1/jobs", json={"from": wrong}))) == ["from"]
    plain = {name: value for name, value in body.items() if name != "model_id"}
    assert list(refused(api.post("/v1/jobs", json=plain))) == ["model_id"]
    assert {"model_id", "method"} <= refused(api.post("/v1/jobs", json={})).keys()
    nothing: Any
    for nothing in ([], "from", 7, None):
        assert api.post("/v1/jobs", json=nothing).status_code == 422
    assert list(refused(api.post("/v1/models/inspect", json={"from": str(uuid.UUID(int=0))}))) != []


def test_only_those_who_see_a_job_derive_from_it(
    api: httpx2.Client, make_client: Make, body: Body, earlier: Body
) -> None:
    bob = make_client("bob")
    for job_id in (earlier["id"], str(uuid.UUID(int=0))):
        answer = bob.post("/v1/jobs", json={"from": job_id})
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert bob.post("/v1/jobs?validate_only=true", json={"from": job_id}).status_code == 404
    admin = make_client("root", [*Scope])
    made = derive(admin, earlier)
    assert made["key_id"] != str(admin.get(f"/v1/jobs/{earlier['id']}").json()["key_id"]), "the deriver's own"
    assert api.get(f"/v1/jobs/{made['id']}").status_code == 404


def test_dry_runs_and_idempotency(api: httpx2.Client, earlier: Body, session: Session) -> None:
    asked = {"from": earlier["id"], "target_ratio": 0.3}
    planned = api.post("/v1/jobs?validate_only=true", json=asked).json()
    assert planned["targets"][0]["target_ratio"] == 0.3 and len(api.get("/v1/jobs").json()["items"]) == 1
    key = {"Idempotency-Key": "once"}
    made = api.post("/v1/jobs", json=asked, headers=key).json()
    assert api.post("/v1/jobs", json=asked | {"seed": 1}, headers=key).json()["code"] == "idempotency_key_reused"
    assert api.post("/v1/jobs", json=made["request"] | {"from": earlier["id"]}, headers=key).status_code == 422
    attempt = play.start(session, earlier["id"])
    play.fail(session, earlier["id"], attempt)
    assert api.delete(f"/v1/jobs/{earlier['id']}").status_code == 204
    again = api.post("/v1/jobs", json=asked, headers=key)
    assert (again.status_code, again.json()["id"]) == (202, made["id"]), "also after the earlier job is deleted"
    assert again.json()["derived_from"] == earlier["id"]
    assert api.post("/v1/jobs", json=asked).status_code == 404


def test_the_client_derives(url: str, api: httpx2.Client, earlier: Body) -> None:
    secret = api.headers["Authorization"].removeprefix("Bearer ")
    with Client(url, secret) as client:
        made = client.jobs.get(earlier["id"]).derive(target_ratio=0.3, seed=None)
        assert str(made.view.derived_from) == earlier["id"]
        assert (made.view.request["target_ratio"], made.view.request["seed"]) == (0.3, 0)

    async def derive() -> Any:
        async with AsyncClient(url, secret) as client:
            return (await (await client.jobs.get(earlier["id"])).derive(method="flap")).view.method

    assert asyncio.run(derive()) == "flap"


def test_patches() -> None:
    """The cases of RFC 7386, appendix A, that a request can have."""
    for fields, changes, result in (
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": 1}}, {"a": {"b": "d", "c": 1}}),
        ({"a": {"b": "c"}}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({}, {"a": None}, {"a": None}),
    ):
        before = repr(fields)
        assert patched(fields, changes) == result and repr(fields) == before
