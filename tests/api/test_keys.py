"""API keys over HTTP: scopes, rotation, revocation, Hub tokens."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth import vault
from app.auth.models import ApiKey
from app.config import Settings, get_settings
from app.jobs import leases, tokens
from app.jobs.transitions import Trigger
from secateur.contract.keys import Scope
from tests import hub as fake
from tests.forked import secateur as run

TOKEN = "hf_planted_token_that_is_nowhere_to_be_found"


@pytest.fixture
def with_scopes(url: str, session: Session) -> Iterator[Callable[..., httpx2.Client]]:
    """A client whose key has these scopes."""
    clients = []

    def make(*scopes: Scope) -> httpx2.Client:
        _, secret = auth.create(session, "scoped", scopes)
        clients.append(httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_each_scope_opens_its_own_routes(with_scopes: Callable[..., httpx2.Client], body: dict[str, Any]) -> None:
    some = uuid.uuid4()
    admin, read, submit = Scope.ADMIN, Scope.READ, Scope.SUBMIT
    routes: list[tuple[set[Scope], list[tuple[str, str, Any]]]] = [
        (
            {read, admin},
            [
                ("GET", "/v1/jobs", None),
                ("GET", f"/v1/jobs/{some}", None),
                ("HEAD", f"/v1/jobs/{some}/artifacts/x", None),
                ("GET", f"/v1/jobs/{some}/report", None),
                ("GET", f"/v1/jobs/{some}/events/stream", None),
                ("GET", "/v1/usage", None),
            ],
        ),
        (
            {read},
            [
                *[("GET", f"/v1/{name}", None) for name in ("methods", "models", "texts", "tasks")],
                ("POST", "/v1/models/inspect", {"model_id": body["model_id"]}),
            ],
        ),
        ({submit}, [("POST", "/v1/jobs", body), ("POST", "/v1/jobs?validate_only=true", body)]),
        (
            {submit, admin},
            [
                *[("POST", f"/v1/jobs/{some}/{trigger}", None) for trigger in ("cancel", "pause", "resume", "retry")],
                ("PATCH", f"/v1/jobs/{some}", {"labels": {}}),
                ("DELETE", f"/v1/jobs/{some}", None),
            ],
        ),
        (
            {admin},
            [
                ("GET", "/v1/keys", None),
                ("POST", "/v1/keys", {"name": "new"}),
                ("PATCH", f"/v1/keys/{some}", {}),
                ("POST", f"/v1/keys/{some}/rotate", {}),
                ("PUT", f"/v1/keys/{some}/hub-token", {"hub_token": None}),
                ("DELETE", f"/v1/keys/{some}", None),
            ],
        ),
    ]
    for scope in Scope:
        client = with_scopes(scope)
        for allowed, cases in routes:
            for method, path, content in cases:
                answer = client.request(method, path, json=content)
                assert (answer.status_code == 403) == (scope not in allowed), (scope, method, path, answer.text)
                if scope not in allowed:
                    assert 'error="insufficient_scope", scope="' in answer.headers["WWW-Authenticate"]
                    assert method == "HEAD" or answer.json()["code"] == "insufficient_scope"


def test_a_rotated_key_keeps_its_jobs(
    with_scopes: Callable[..., httpx2.Client], body: dict[str, Any], url: str
) -> None:
    admin = with_scopes(Scope.ADMIN)
    made = admin.post("/v1/keys", json={"name": "team"}).json()
    assert made["scopes"] == ["read", "submit"]

    def ask(secret: str) -> httpx2.Response:
        return httpx2.get(f"{url}/v1/jobs", headers={"Authorization": f"Bearer {secret}"})

    httpx2.post(f"{url}/v1/jobs", json=body, headers={"Authorization": f"Bearer {made['secret']}"}).raise_for_status()
    second = admin.post(f"/v1/keys/{made['id']}/rotate", json={"grace_seconds": 3600}).json()
    assert second["id"] == made["id"] and second["secret"] != made["secret"]
    for secret in (made["secret"], second["secret"]):
        assert len(ask(secret).json()["items"]) == 1
    third = admin.post(f"/v1/keys/{made['id']}/rotate", json={"grace_seconds": 0}).json()
    assert [ask(each["secret"]).status_code for each in (made, second, third)] == [401, 401, 200]
    assert admin.delete(f"/v1/keys/{made['id']}").status_code == 204
    assert ask(third["secret"]).status_code == 401
    assert admin.post(f"/v1/keys/{made['id']}/rotate", json={}).status_code == 404
    shown = admin.get("/v1/keys").text
    assert not any(each["secret"] in shown for each in (made, second, third))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes.0"),
        ({"name": " "}, "name"),
    ],
)
def test_bad_keys(with_scopes: Callable[..., httpx2.Client], content: dict[str, Any], field: str) -> None:
    answer = with_scopes(Scope.ADMIN).post("/v1/keys", json=content)
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field


@pytest.fixture
def keyed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with a key to encrypt with, and a service token."""
    monkeypatch.setenv("SECATEUR_SECRET_KEYS", Fernet.generate_key().decode())
    monkeypatch.setenv("SECATEUR_HF_TOKEN", "hf_service")
    get_settings.cache_clear()
    return get_settings()


def everything_stored(session: Session) -> str:
    """All rows of all tables, as text."""
    names = session.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
    return "".join(str(row) for name in names for row in session.execute(text(f'SELECT t::text FROM "{name}" t')).all())


def test_whose_token_a_job_has(keyed: Settings, api: httpx2.Client, body: dict[str, Any], session: Session) -> None:
    def token_of(**changes: Any) -> str:
        job = api.post("/v1/jobs", json={**body, **changes}).json()
        assert "hub_token" not in job["request"]
        found = tokens.of_job(session, keyed, uuid.UUID(job["id"]))
        assert found is not None
        return found.get_secret_value()

    owner = session.query(ApiKey).one()
    assert token_of() == "hf_service", "which the operator lends to this key"
    auth.keep_hub_token(session, keyed, owner.id, SecretStr("hf_of_the_key"))
    assert token_of() == "hf_of_the_key"
    assert token_of(hub_token=TOKEN) == TOKEN
    auth.keep_hub_token(session, keyed, owner.id, None)
    assert token_of() == "hf_service"
    stored = everything_stored(session)
    assert TOKEN not in stored and "hf_of_the_key" not in stored and len(stored) > 1000


def test_a_token_goes_when_the_job_has_succeeded(
    keyed: Settings, api: httpx2.Client, body: dict[str, Any], session: Session
) -> None:
    job_id = uuid.UUID(api.post("/v1/jobs", json={**body, "hub_token": TOKEN}).json()["id"])
    leases.claim(session, job_id, "w", 60)
    leases.move(session, job_id, 1, Trigger.PUBLISH)
    assert session.scalar(text("SELECT hub_token IS NOT NULL FROM jobs"))
    leases.move(session, job_id, 1, Trigger.SUCCEED)
    assert session.scalar(text("SELECT hub_token IS NULL FROM jobs"))


def test_the_same_request_with_another_token_is_the_same(
    keyed: Settings, api: httpx2.Client, body: dict[str, Any]
) -> None:
    headers = {"Idempotency-Key": "k"}
    first, again = (
        api.post("/v1/jobs", json={**body, "hub_token": token}, headers=headers).json()
        for token in (TOKEN, TOKEN + "2")
    )
    assert first["id"] == again["id"]


def test_no_key_to_encrypt_with(api: httpx2.Client, body: dict[str, Any], settings: Settings) -> None:
    answer = api.post("/v1/jobs", json={**body, "hub_token": TOKEN})
    assert (answer.status_code, answer.json()["code"]) == (422, "hub_tokens_disabled")
    assert answer.json()["errors"][0]["field"] == "hub_token" and TOKEN not in answer.text


@pytest.mark.parametrize("token", ["", "x" * 513, [TOKEN], {"a": TOKEN}])
def test_bad_tokens_are_not_repeated(keyed: Settings, api: httpx2.Client, body: dict[str, Any], token: Any) -> None:
    answer = api.post("/v1/jobs", json={**body, "hub_token": token})
    assert answer.status_code == 422 and TOKEN not in answer.text and "xxxx" not in answer.text


def test_keys_of_the_vault_can_be_replaced(keyed: Settings) -> None:
    stored = vault.encrypt(keyed, SecretStr(TOKEN))
    assert TOKEN.encode() not in stored
    assert keyed.secret_keys is not None
    old, new = keyed.secret_keys.get_secret_value(), Fernet.generate_key().decode()
    both = keyed.model_copy(update={"secret_keys": SecretStr(f"{new},{old}")})
    assert vault.decrypt(both, stored).get_secret_value() == TOKEN
    alone = keyed.model_copy(update={"secret_keys": SecretStr(new)})
    with pytest.raises(vault.VaultError, match="encrypted with"):
        vault.decrypt(alone, stored)


def test_admission_asks_the_hub_with_the_requests_token(
    keyed: Settings, url: str, api: httpx2.Client, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake.running() as hub:
        monkeypatch.setenv("SECATEUR_HF_ENDPOINT", hub.url)
        monkeypatch.delenv("SECATEUR_HUB_DIR")
        get_settings.cache_clear()
        wanted = {**body, "publish": {"repo_id": "org/out"}}
        assert api.post("/v1/jobs", json=wanted).json()["code"] == "hub_forbidden", (
            "the service's token is no good there"
        )
        assert api.post("/v1/jobs", json={**wanted, "hub_token": fake.TOKEN}).status_code == 202


def test_the_command_line(keyed: Settings, session: Session) -> None:
    made = run("keys", "create", "ops", "--scope", "admin", "--scope", "read", "--json")
    assert made.returncode == 0 and '"scopes": ["admin", "read"]' in made.stdout
    key = session.query(ApiKey).one()
    rotated = run("keys", "rotate", str(key.id), "--grace", "0")
    session.expire_all()
    assert rotated.returncode == 0 and auth.authenticate(session, rotated.stdout.strip()) is not None
    kept = run("keys", "hub-token", str(key.id), input=TOKEN + "\n")
    assert kept.returncode == 0 and TOKEN not in kept.stdout + kept.stderr
    found = tokens.for_request(session, keyed, key.id, None).token
    assert found is not None and found.get_secret_value() == TOKEN
    assert run("keys", "create", "x", "--scope", "root").returncode == 2
    assert run("keys", "rotate", str(uuid.uuid4())).returncode == 2
