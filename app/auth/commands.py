"""``secateur keys``: the commands with which an operator of the service manages API keys."""

import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.common import REFUSED, Json, stop

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.auth.models import ApiKey as KeyRow
    from secateur.contract.keys import KeySettings

Namespace = Annotated[
    str | None,
    typer.Option(
        help="Namespace of the key's repositories, and the only one that it may write with the service's Hub token or in the "
        "Hub folder. '' or unset for a new key: one that no other key has."
    ),
]
LendHubToken = Annotated[
    bool | None,
    typer.Option(
        "--lend-hub-token/--keep-hub-token", help="Whether the key uses the service's Hub token. [default: no]"
    ),
]
MaxOpenJobs = Annotated[
    int | None, typer.Option(min=0, help="Jobs that have not ended. 0 or unset: SECATEUR_MAX_OPEN_JOBS.")
]
MaxRunningJobs = Annotated[
    int | None, typer.Option(min=0, help="Jobs that run at once. 0 or unset: SECATEUR_MAX_RUNNING_JOBS.")
]

keys = typer.Typer(no_args_is_help=True, help="API keys; needs the database (SECATEUR_DATABASE_URL).")


@contextmanager
def database() -> Iterator["Session"]:
    from sqlalchemy.orm import Session

    from app.config import get_settings
    from app.db.session import make_engine

    with Session(make_engine(get_settings().nearest().database_url), expire_on_commit=False) as session:
        yield session


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Whom or what it is for.")],
    scope: Annotated[list[str] | None, typer.Option(help="read, submit, admin; several may be given.")] = None,
    namespace: Namespace = None,
    lend_hub_token: LendHubToken = None,
    max_open_jobs: MaxOpenJobs = None,
    max_running_jobs: MaxRunningJobs = None,
    as_json: Json = False,
) -> None:
    """Create an API key and show its secret once. Without --scope, the key may read and submit."""
    from app.auth import service

    settings = _settings(namespace, lend_hub_token, max_open_jobs, max_running_jobs)
    try:
        scopes = [service.Scope(each) for each in scope or service.USER]
    except ValueError as error:
        raise stop(f"--scope: {error}; allowed: {', '.join(service.Scope)}", REFUSED) from None
    with database() as session:
        try:
            key, secret = service.create(session, name, scopes, settings)
        except ValueError as error:
            raise stop(f"NAME: {error}", REFUSED) from None
    _show_secret(key, secret, as_json)


def _settings(
    namespace: str | None, lend_hub_token: bool | None, max_open_jobs: int | None, max_running_jobs: int | None
) -> "KeySettings":
    """Return the settings that the options give; an empty namespace and a limit of 0 stand for the default."""
    from pydantic import ValidationError

    from secateur.contract.keys import KeySettings

    named = {"namespace": namespace, "max_open_jobs": max_open_jobs, "max_running_jobs": max_running_jobs}
    given: dict[str, Any] = {name: value or None for name, value in named.items() if value is not None}
    if lend_hub_token is not None:
        given["lend_hub_token"] = lend_hub_token
    try:
        return KeySettings(**given)
    except ValidationError as error:
        reasons = [f"--{item['loc'][0]}: {item['msg']}".replace("_", "-") for item in error.errors()]
        raise stop("\n".join(reasons), REFUSED) from None


@keys.command("set")
def keys_set(
    key_id: Annotated[uuid.UUID, typer.Argument(help="From 'secateur keys list'.")],
    namespace: Namespace = None,
    lend_hub_token: LendHubToken = None,
    max_open_jobs: MaxOpenJobs = None,
    max_running_jobs: MaxRunningJobs = None,
) -> None:
    """Change the settings of an API key. Options that are left out change nothing."""
    from app.auth import service

    settings = _settings(namespace, lend_hub_token, max_open_jobs, max_running_jobs)
    with database() as session:
        key = service.change(session, key_id, settings)
    if key is None:
        raise stop(f"There is no key {key_id}.", REFUSED)
    typer.echo(_shown(key))


def _shown(key: "KeyRow") -> str:
    """Return the settings of an API key in one line."""
    parts = [f"namespace {key.namespace}", "the service's Hub token" if key.lend_hub_token else "no lent Hub token"]
    for name, limit in (("open", key.max_open_jobs), ("running", key.max_running_jobs)):
        parts += [] if limit is None else [f"at most {limit} {name} jobs"]
    return f"{key.id}  {key.name}  {', '.join(parts)}"


def _show_secret(key: "KeyRow", secret: str, as_json: bool) -> None:
    if as_json:
        shown = {
            "id": str(key.id),
            "name": key.name,
            "scopes": key.scopes,
            "namespace": key.namespace,
            "secret": secret,
        }
        typer.echo(json.dumps(shown))
    else:
        typer.echo(f"Key {key.id} for {key.name}. Keep the secret, it is not shown again:", err=True)
        typer.echo(secret)


@keys.command("rotate")
def keys_rotate(
    key_id: Annotated[uuid.UUID, typer.Argument(help="From 'secateur keys list'.")],
    grace: Annotated[float, typer.Option(min=0, help="Seconds for which the secret it has serves on.")] = 86_400,
    as_json: Json = False,
) -> None:
    """Give an API key a new secret and show it once. The key keeps its jobs."""
    from app.auth import service

    with database() as session:
        made = service.rotate(session, key_id, grace)
    if made is None:
        raise stop(f"There is no key {key_id} that is not revoked.", REFUSED)
    _show_secret(*made, as_json)


@keys.command("hub-token")
def keys_hub_token(key_id: Annotated[uuid.UUID, typer.Argument(help="From 'secateur keys list'.")]) -> None:
    """Store a Hub token, read from standard input, for the jobs of an API key. An empty line removes the token."""
    from pydantic import SecretStr

    from app.auth import service, vault
    from app.config import get_settings

    token = sys.stdin.readline().strip()
    with database() as session:
        try:
            key = service.keep_hub_token(session, get_settings(), key_id, SecretStr(token) if token else None)
        except vault.VaultError as error:
            raise stop(f"{error}.", REFUSED) from None
    if key is None:
        raise stop(f"There is no key {key_id}.", REFUSED)
    typer.echo(f"Key {key_id} has {'a' if token else 'no'} Hub token.")


@keys.command("list")
def keys_list(as_json: Json = False) -> None:
    """List all API keys without their secrets."""
    from app.auth import service

    with database() as session:
        found = service.every(session)
    rows = [
        {
            "id": str(key.id),
            "name": key.name,
            "scopes": ",".join(key.scopes),
            "namespace": key.namespace,
            "lend_hub_token": key.lend_hub_token,
            "max_open_jobs": key.max_open_jobs,
            "max_running_jobs": key.max_running_jobs,
            "created_at": key.created_at.isoformat(),
            "last_used_at": key.last_used_at and key.last_used_at.isoformat(),
            "revoked_at": key.revoked_at and key.revoked_at.isoformat(),
        }
        for key in found
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for key, row in zip(found, rows, strict=True):
        state = f"revoked {row['revoked_at']}" if row["revoked_at"] else f"last used {row['last_used_at'] or 'never'}"
        typer.echo(f"{_shown(key)}  {row['scopes']}  created {row['created_at']}  {state}")


@keys.command("revoke")
def keys_revoke(
    key_id: Annotated[uuid.UUID, typer.Argument(help="From 'secateur keys list'.")],
    cancel_jobs: Annotated[
        bool, typer.Option("--cancel-jobs", help="Also cancel the key's jobs; a job that is publishing goes on.")
    ] = False,
) -> None:
    """Revoke an API key permanently. The key's jobs continue to run, unless --cancel-jobs is given."""
    from app.auth import service

    with database() as session:
        if service.revoke(session, key_id) is None:
            raise stop(f"There is no key {key_id}.", REFUSED)
        typer.echo(f"Key {key_id} is revoked.")
        if cancel_jobs:
            from app.jobs.service import cancel_all

            cancelled, left = cancel_all(session, key_id, None)
            typer.echo(f"{cancelled} jobs are cancelled; {left} are publishing and go on.")
