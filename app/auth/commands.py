"""``secateur keys``: the commands with which an operator of the service manages API keys."""

import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.common import REFUSED, Json, stop

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.auth.models import ApiKey as KeyRow

keys = typer.Typer(no_args_is_help=True, help="API keys; needs the database (SECATEUR_DATABASE_URL).")


@contextmanager
def database() -> Iterator["Session"]:
    from sqlalchemy.orm import Session

    from app.config import get_settings
    from app.db.session import make_engine

    with Session(make_engine(get_settings().nearest_database_url()), expire_on_commit=False) as session:
        yield session


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Whom or what it is for.")],
    scope: Annotated[list[str] | None, typer.Option(help="read, submit, admin; several may be given.")] = None,
    as_json: Json = False,
) -> None:
    """Create an API key and show its secret once. Without --scope, the key may read and submit."""
    from app.auth import service

    try:
        scopes = [service.Scope(each) for each in scope or service.USER]
    except ValueError as error:
        raise stop(f"--scope: {error}; allowed: {', '.join(service.Scope)}", REFUSED) from None
    with database() as session:
        try:
            key, secret = service.create(session, name, scopes)
        except ValueError as error:
            raise stop(f"NAME: {error}", REFUSED) from None
    _show_secret(key, secret, as_json)


def _show_secret(key: "KeyRow", secret: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"id": str(key.id), "name": key.name, "scopes": key.scopes, "secret": secret}))
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
        rows = [
            {
                "id": str(key.id),
                "name": key.name,
                "scopes": ",".join(key.scopes),
                "created_at": key.created_at.isoformat(),
                "last_used_at": key.last_used_at and key.last_used_at.isoformat(),
                "revoked_at": key.revoked_at and key.revoked_at.isoformat(),
            }
            for key in service.every(session)
        ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        state = f"revoked {row['revoked_at']}" if row["revoked_at"] else f"last used {row['last_used_at'] or 'never'}"
        typer.echo(f"{row['id']}  {row['name']}  {row['scopes']}  created {row['created_at']}  {state}")


@keys.command("revoke")
def keys_revoke(key_id: Annotated[uuid.UUID, typer.Argument(help="From 'secateur keys list'.")]) -> None:
    """Revoke an API key permanently. The key's jobs continue to run."""
    from app.auth import service

    with database() as session:
        if service.revoke(session, key_id) is None:
            raise stop(f"There is no key {key_id}.", REFUSED)
    typer.echo(f"Key {key_id} is revoked.")
