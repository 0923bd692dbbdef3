"""What goes wrong is a problem document that helps; who calls is known; nothing leaks."""

import json
import re
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from sqlalchemy.exc import InterfaceError, TimeoutError
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.models import ApiKey
from app.config import Settings
from app.jobs import service
from secateur.catalog.request import JobRequest
from tests.api.conftest import CONFIG

Body = dict[str, Any]


def _problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Checks what every problem has."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code, problem
    assert problem["status"] == status and problem["detail"] and problem["title"]
    assert problem["request_id"] == response.headers["X-Request-Id"]
    return problem


def test_fields_at_fault_are_named(api: httpx2.Client, body: Body) -> None:
    cases: list[tuple[Body, str, str]] = [
        ({"target_ratio": 0}, "target_ratio", "more than 0"),
        ({"target_ratio": 0.91}, "target_ratio", "at most 0.9"),
        ({"target_ratio": "lots"}, "target_ratio", "number"),
        ({"target_ratio": None}, "goal", "either 'target_ratio' or 'goal'"),
        ({"goal": {"bytes": 1}}, "goal", "either 'target_ratio' or 'goal'"),
        ({"target_ratio": []}, "target_ratio", "length at least 1"),
        ({"target_ratio": [n / 10 for n in range(1, 10)]}, "target_ratio", "length at most 8"),
        ({"target_ratio": [0.2, 0.91]}, "target_ratio.1", "at most 0.9"),
        ({"target_ratio": [0.2, "lots"]}, "target_ratio.1", "number"),
        ({"target_ratio": [0.3, 0.2]}, "target_ratio", "ascend"),
        ({"target_ratio": [0.2, 0.2]}, "target_ratio", "differ"),
        ({"target_ratio": [0.2, 0.2000001]}, "target_ratio", "six digits"),
        ({"target_ratio": [0.2, 0.89]}, "target_ratio", "nearest"),
        ({"target_ratio": [0.2], "publish": {"repo_id": f"a/{'x' * 94}"}}, "publish.repo_id", "96"),
        ({"target_ratio": None, "goal": {}}, "goal", "either 'parameters' or 'bytes'"),
        ({"target_ratio": None, "goal": {"parameters": 1e5, "bytes": 1e5}}, "goal", "either 'parameters' or"),
        ({"target_ratio": None, "goal": {"parameters": 0}}, "goal.parameters", "more than 0"),
        ({"target_ratio": None, "goal": {"params": 1e5}}, "goal.params", "parameters, bytes"),
        ({"target_ratio": None, "goal": {"parameters": 1e9}}, "goal", "252,736"),
        ({"target_ratio": None, "goal": {"bytes": 1}}, "goal", "252,736"),
        ({"target_ratio": None, "goal": {"parameters": 252_735}}, "goal", "nearest"),
        ({"scoring": {"kind": "sparse"}}, "scoring.kind", "'wanda'"),
        ({"allocation": {"kind": "owl"}}, "allocation.kind", "'lsps'"),
        ({"method": "wanda", "allocation": {"kind": "threshold"}}, "allocation", "allowed: cosine, inner, lsps"),
        ({"method": "flap", "scoring": {"kind": "obs"}}, "allocation", "'obs' has none"),
        ({"recovery": {"layerwise": {"kind": "qlora"}}}, "recovery.layerwise.kind", "least-squares"),
        ({"recovery": {"training": {"kind": "lora", "epochs": 0}}}, "recovery.training.epochs", "more than 0"),
        ({"recovery": {"training": {"kind": "lora", "ranks": 8}}}, "recovery.training.ranks", "rank"),
        ({"rounds": 0}, "rounds", "at least 1"),
        ({"rounds": 1.5}, "rounds", "integer"),
        ({"method": "owl"}, "method", "piem-lsps"),
        ({"metod": "piem"}, "metod", "model_id"),
        ({"calibration": {"sample": 3}}, "calibration.sample", "samples"),
        ({"calibration": {"samples": 0}}, "calibration.samples", "at least 1"),
        ({"calibration": {"dataset": "c4", "texts": ["x"]}}, "calibration", "not both"),
        ({"calibration": {"texts": ["\0"]}}, "calibration.texts.0", "pattern"),
        ({"calibration": {"texts": ["\ud800"]}}, "calibration.texts.0", "unicode"),
        ({"evaluation": {"zero_shot": ["pica"]}}, "evaluation.zero_shot.0", "boolq, piqa"),
        ({"evaluation": {"zero_shot": ["../x"]}}, "evaluation.zero_shot.0", "pattern"),
        ({"evaluation": {"zero_shot": ["piqa", "piqa"]}}, "evaluation.zero_shot", "twice"),
        ({"evaluation": {"perplexity": ["ptb", "local:x"]}}, "evaluation.perplexity.1", "no text"),
        ({"evaluation": {"limit": 0}}, "evaluation.limit", "at least 1"),
        ({"evaluation": {"latency": "v100"}}, "evaluation.latency", "slimllm"),
        ({"evaluation": {"prompts": [""]}}, "evaluation.prompts.0", "at least 1"),
        ({"dtype": "int8"}, "dtype", "'bfloat16'"),
        ({"publish": {"repo_id": "no namespace"}}, "publish.repo_id", "alphanumeric"),
        ({"publish": {"repo_id": "name"}}, "publish.repo_id", "namespace"),
        ({"publish": {"repo_id": "a/../b"}}, "publish.repo_id", "Repo id"),
        ({"publish": {"repo_id": "a/b", "repo": "a/b"}}, "publish.repo", "repo_id, private"),
        ({"model_id": "../../etc"}, "model_id", "Hub id"),
        ({"model_id": "local:../x"}, "model_id", "local:NAME"),
        ({"model_id": "local:"}, "model_id", "local:NAME"),
        ({"model_id": "/etc/passwd"}, "model_id", "Hub id"),
        ({"model_id": "a\0b"}, "model_id", "Hub id"),
        ({"model_id": "local:tinny"}, "model_id", "did you mean tiny?"),
        ({"revision": "../x"}, "revision", "pattern"),
        ({"revision": "a/../x"}, "revision", "within"),
        ({"gguf_file": "../x.gguf"}, "gguf_file", "within"),
        ({"gguf_file": "x.bin"}, "gguf_file", "pattern"),
        ({"webhook_url": "ftp://x"}, "webhook_url", "'http' or 'https'"),
        ({"webhook_url": "file:///etc/passwd"}, "webhook_url", "'http' or 'https'"),
        ({"webhook_url": "https://x"}, "webhook_url", "SECATEUR_WEBHOOK_SECRET"),
        ({"labels": {"a b": "x"}}, "labels.a b.[key]", "pattern"),
        ({"labels": {"a": "x\n"}}, "labels.a", "pattern"),
        ({"labels": {"a": "x" * 256}}, "labels.a", "pattern"),
        ({"labels": {f"k{n}": "" for n in range(33)}}, "labels", "at most 32"),
        ({"max_runtime_seconds": 0}, "max_runtime_seconds", "more than 0"),
        ({"seed": -1}, "seed", "at least 0"),
        ({"target_ratio": 0.89}, "target_ratio", "nearest"),
    ]
    for change, field, hint in cases:
        response = api.post("/v1/jobs", content=json.dumps(body | change), headers={"Content-Type": "application/json"})
        assert response.status_code == 422, (change, response.text)
        [error] = response.json()["errors"]
        assert error["field"] == field, change
        assert hint in error["message"] + (error.get("allowed") or ""), error


def test_every_fault_is_named_at_once(api: httpx2.Client) -> None:
    problem = _problem(api.post("/v1/jobs", json={"target_ratio": 7, "rounds": 0}), 422, "invalid_request")
    assert {error["field"] for error in problem["errors"]} == {"model_id", "method", "target_ratio", "rounds"}


def test_bodies_that_are_no_json_object(api: httpx2.Client) -> None:
    for content in (b"", b"{", b"[]", b'"x"', b"null", b"\xff", b'{"target_ratio": NaN}', b"[" * 100_000):
        response = api.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code in (400, 422), content
        assert response.headers["Content-Type"] == "application/problem+json"


def test_models_that_cannot_be_pruned(api: httpx2.Client, body: Body, make_model: Callable[..., str]) -> None:
    make_model("opt", CONFIG | {"model_type": "blenderbot", "is_encoder_decoder": True})
    make_model("odd", CONFIG | {"num_attention_heads": "many"})
    make_model("list", [1])
    for name, code in (("opt", "unsupported_architecture"), ("odd", "config_invalid"), ("list", "config_invalid")):
        problem = _problem(api.post("/v1/jobs", json=body | {"model_id": f"local:{name}"}), 422, code)
        assert problem["errors"][0]["field"] == "model_id"


def test_a_truncated_weights_file(api: httpx2.Client, body: Body, settings: Settings) -> None:
    weights = settings.models_dir / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    _problem(api.post("/v1/jobs", json=body), 422, "weights_corrupt")


def test_what_is_not_there(api: httpx2.Client) -> None:
    for path in ("/nothing", "/v1/jobs/nothing", f"/v1/jobs/{uuid.uuid4()}", f"/v1/jobs/{uuid.uuid4()}/events/stream"):
        _problem(api.get(path), 404, "not_found")


def test_the_methods_of_a_path(whole: httpx2.Client) -> None:
    """All of them, of whichever route."""
    job = f"/v1/jobs/{uuid.uuid4()}"
    for method, path, allowed in (
        ("PUT", "/healthz", "GET"),
        ("PUT", "/v1/jobs", "GET, POST"),
        ("PUT", job, "DELETE, GET, PATCH"),
        ("GET", f"{job}/cancel", "POST"),
        ("POST", f"{job}/artifacts/a/b", "GET, HEAD"),
        ("DELETE", "/v1/keys", "GET, POST"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ):
        answer = whole.request(method, path)
        assert allowed in _problem(answer, 405, "method_not_allowed")["detail"], path
        assert answer.headers["Allow"] == allowed, path


def test_the_names_of_others_are_not_listed(
    api: httpx2.Client, body: Body, make_model: Callable[..., str], settings: Settings
) -> None:
    """A misspelt name is told the names near it; nobody is told all names."""
    make_model("private-model")
    for folder, name in ((settings.texts_dir, "private-text.txt"), (settings.tasks_dir, "private-task.jsonl")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    for wrong, near in (("anything", None), ("private-modle", "private-model")):
        answer = api.post("/v1/models/inspect", json={"model_id": f"local:{wrong}"})
        assert "private" not in answer.text if near is None else near in answer.text
    for part, far, close in (
        ("perplexity", ["local:anything"], ["local:private-txt"]),
        ("zero_shot", ["anything"], ["private-tasks"]),
    ):
        assert "private" not in api.post("/v1/jobs", json=body | {"evaluation": {part: far}}).text
        [error] = api.post("/v1/jobs", json=body | {"evaluation": {part: close}}).json()["errors"]
        assert "private-t" in error["allowed"]


ODD = ("\ud800", "a\udfffb", "\x00", "a\x00b", "\x7f", "\u202e", "\uffff")


@pytest.mark.parametrize("odd", ODD)
def test_odd_characters_anywhere(whole: httpx2.Client, body: Body, odd: str, session: Session) -> None:
    """No text of a request, wherever it stands, is a defect of the service."""
    text = body | {"calibration": {"texts": ["some words " * 50]}}
    fields = [
        (name,) for name in JobRequest.model_fields
    ] + [
        ("calibration", "dataset"), ("calibration", "texts", 0), ("evaluation", "prompts", 0), ("evaluation", "zero_shot", 0),
        ("evaluation", "perplexity", 0), ("publish", "repo_id"), ("labels", "team"), ("labels", odd), (odd,),
        ("calibration", odd), ("scoring", "kind"), ("formats", 0), ("goal", "bytes"), ("target_ratio", 0),
    ]  # fmt: skip
    for path in fields:
        value: Any = odd
        for part in reversed(path):
            value = [value] if isinstance(part, int) else {part: value}
        content = json.dumps(text | value).encode()
        for url in ("/v1/jobs", "/v1/jobs?validate_only=true", "/v1/models/inspect"):
            answer = whole.post(url, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 202, 422), (path, answer.text)
            answer.json()
    for url, changed in (
        ("/v1/keys", {"name": odd}),
        ("/v1/keys", {"name": "x", "scopes": [odd]}),
        (f"/v1/keys/{uuid.uuid4()}/hub-token", {"hub_token": odd}),
        (f"/v1/keys/{uuid.uuid4()}/rotate", {"grace_seconds": odd}),
    ):
        method = "PUT" if "hub-token" in url else "POST"
        answer = whole.request(
            method, url, content=json.dumps(changed).encode(), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in (201, 404, 422), (url, answer.text)
    escaped = quote(odd.encode(errors="surrogatepass"))
    job = whole.post("/v1/jobs", json=body).json()["id"]
    for url in (
        *(f"/v1/jobs?{name}={escaped}" for name in ("state", "method", "model_id", "page_size", "page_token", "label.a", "x")),
        f"/v1/jobs?label.{escaped}=x", f"/v1/jobs?{escaped}=x", f"/v1/jobs/{escaped}", f"/v1/{escaped}",
        f"/v1/jobs/{job}/artifacts/{escaped}", f"/v1/jobs/{job}/events?page_token={escaped}",
    ):  # fmt: skip
        assert whole.get(url).status_code in (200, 404, 422), url
    for name in ("Idempotency-Key", "If-None-Match", "Last-Event-ID", "Prefer", "X-Request-Id", "Range", "Accept"):
        header = [(name, odd.encode("latin-1", "replace").replace(b"\x00", b"\xff"))]
        for url in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/report", f"/v1/jobs/{job}/artifacts/x"):
            assert whole.get(url, headers=header).status_code < 500, (name, url)  # type: ignore[arg-type]


def test_a_bug_is_answered_without_its_inside(api: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr(service, "page", broken)
    problem = _problem(api.get("/v1/jobs"), 500, "internal_error")
    assert "hunter2" not in json.dumps(problem)


@pytest.mark.parametrize("kind", [TimeoutError("no connection"), InterfaceError("", None, Exception("closed"))])
def test_a_database_that_is_away(api: httpx2.Client, monkeypatch: pytest.MonkeyPatch, kind: Exception) -> None:
    def away(*arguments: object) -> None:
        raise kind

    monkeypatch.setattr(service, "page", away)
    response = api.get("/v1/jobs")
    _problem(response, 503, "database_unavailable")
    assert int(response.headers["Retry-After"]) > 0
    monkeypatch.setattr(auth, "authenticate", away)
    _problem(api.post("/v1/jobs", content=b"{"), 503, "database_unavailable")


def test_request_ids(api: httpx2.Client) -> None:
    assert api.get("/healthz", headers={"X-Request-Id": "my-id.1"}).headers["X-Request-Id"] == "my-id.1"
    for insane in ("a b", "x" * 129, "<script>", ""):
        given = api.get("/healthz", headers={"X-Request-Id": insane}).headers["X-Request-Id"]
        assert uuid.UUID(given)


class TestKeys:
    def test_v1_wants_a_key(self, url: str) -> None:
        for headers in (
            {},
            {"Authorization": "Bearer sk-secateur-x"},
            {"Authorization": "Basic eDp5"},
            {"Authorization": "x"},
        ):
            for path in ("/v1/jobs", f"/v1/jobs/{uuid.uuid4()}", "/v1/methods"):
                response = httpx2.get(url + path, headers=headers)
                _problem(response, 401, "unauthorized")
                assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert httpx2.get(f"{url}/healthz").status_code == 200

    def test_every_v1_route_wants_a_key(self, url: str) -> None:
        for path, operations in httpx2.get(f"{url}/openapi.json").json()["paths"].items():
            if path.startswith("/v1"):
                for method in operations:
                    concrete = re.sub(r"\{(job|key)_id\}", str(uuid.uuid4()), path).replace("{name}", "x")
                    assert httpx2.request(method, url + concrete).status_code == 401, (method, path)

    def test_a_revoked_key_is_none(self, url: str, session: Session) -> None:
        key, secret = auth.create(session, "x")
        headers = {"Authorization": f"Bearer {secret}"}
        assert httpx2.get(f"{url}/v1/jobs", headers=headers).status_code == 200
        auth.revoke(session, key.id)
        assert httpx2.get(f"{url}/v1/jobs", headers=headers).status_code == 401

    def test_secrets_are_not_kept(self, session: Session) -> None:
        key, secret = auth.create(session, "x")
        assert secret.startswith("sk-secateur-") and len(secret) >= 12 + 43
        stored = session.get_one(ApiKey, key.id, populate_existing=True)
        assert secret not in map(str, vars(stored).values())
        assert len(stored.secret_sha256) == 64

    def test_use_is_noted_once_a_minute(self, session: Session) -> None:
        key, secret = auth.create(session, "x")
        assert key.last_used_at is None
        auth.authenticate(session, secret)
        session.refresh(key)
        first = key.last_used_at
        auth.authenticate(session, secret)
        session.refresh(key)
        assert first is not None and key.last_used_at == first
