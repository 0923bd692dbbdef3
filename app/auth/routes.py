"""``/v1/keys``: manages API keys, for callers with the scope ``admin``; ``/v1/usage``: what API keys used.

A secret appears only in the answer to the request that created it.
"""

import datetime as dt
import uuid
from typing import Annotated

from fastapi import APIRouter, Query

from app.auth import service
from app.auth.models import ApiKey
from app.auth.vault import VaultError
from app.deps import EVERY_V1_ROUTE, KeyedRoute, KeyId, Owner, SessionDep, SettingsDep, chosen_key
from app.http.problem import Problem, documented, invalid
from app.jobs import service as jobs
from app.jobs import usage
from secateur.contract.errors import ErrorCode
from secateur.contract.keys import (
    DayOfUsage,
    HubToken,
    KeyList,
    KeySettings,
    KeyView,
    KeyWithSecret,
    NewKey,
    Rotation,
    Scope,
    UsageList,
)

USAGE_DAYS = dt.timedelta(days=29)


class UsageRoute(KeyedRoute):
    """A route that the scope ``read`` opens for the caller's own usage, and the scope ``admin`` for that of all keys."""

    instead = Scope.ADMIN


class AdminRoute(KeyedRoute):
    """A route that only API keys with the scope ``admin`` may call."""

    reading = writing = Scope.ADMIN


router = APIRouter(
    prefix="/v1/keys",
    tags=["keys"],
    route_class=AdminRoute,
    dependencies=EVERY_V1_ROUTE,
    responses=documented(401, 403, 422, 429, 503),
)


def _with_secret(made: tuple[ApiKey, str]) -> KeyWithSecret:
    key, secret = made
    return KeyWithSecret(**KeyView.model_validate(key).model_dump(), secret=secret)


def _no_key(key_id: uuid.UUID) -> Problem:
    return Problem(404, ErrorCode.NOT_FOUND, f"There is no key {key_id} that is not revoked.")


@router.get("", response_model=KeyList)
def every(session: SessionDep) -> KeyList:
    """List all API keys, including revoked ones."""
    return KeyList(items=[KeyView.model_validate(key) for key in service.every(session)])


@router.post("", status_code=201, response_model=KeyWithSecret, responses=documented(400, 413))
def create(body: NewKey, session: SessionDep) -> KeyWithSecret:
    """Create an API key. The answer contains the secret, which is never shown again."""
    try:
        return _with_secret(service.create(session, body.name, body.scopes, body))
    except ValueError as error:
        raise invalid("name", str(error)) from None


@router.patch("/{key_id}", response_model=KeyView, responses=documented(400, 404, 413))
def change(key_id: uuid.UUID, body: KeySettings, session: SessionDep) -> KeyView:
    """Change the settings of an API key; fields that are left out keep their values."""
    key = service.change(session, key_id, body)
    if key is None:
        raise _no_key(key_id)
    return KeyView.model_validate(key)


@router.post("/{key_id}/rotate", response_model=KeyWithSecret, responses=documented(400, 404, 413))
def rotate(key_id: uuid.UUID, body: Rotation, session: SessionDep) -> KeyWithSecret:
    """Give an API key a new secret."""
    made = service.rotate(session, key_id, body.grace_seconds)
    if made is None:
        raise _no_key(key_id)
    return _with_secret(made)


@router.put("/{key_id}/hub-token", status_code=204, responses=documented(400, 404, 413))
def hub_token(key_id: uuid.UUID, body: HubToken, session: SessionDep, settings: SettingsDep) -> None:
    """Store the Hub token for the jobs of an API key. The token is encrypted and never shown again."""
    try:
        key = service.keep_hub_token(session, settings, key_id, body.hub_token)
    except VaultError as error:
        raise invalid("hub_token", str(error), code=ErrorCode.HUB_TOKENS_DISABLED) from None
    if key is None:
        raise _no_key(key_id)


@router.delete("/{key_id}", status_code=204, responses=documented(404))
def revoke(
    key_id: uuid.UUID,
    owner: Owner,
    session: SessionDep,
    cancel_jobs: Annotated[
        bool, Query(description="Also cancel the key's jobs that have not ended; a job that is publishing goes on.")
    ] = False,
) -> None:
    """Revoke an API key permanently and immediately; idempotent. The key's jobs continue, unless `cancel_jobs` is set."""
    if service.revoke(session, key_id) is None:
        raise _no_key(key_id)
    if cancel_jobs:
        jobs.cancel_all(session, key_id, owner.id)


usage_router = APIRouter(
    prefix="/v1/usage",
    tags=["keys"],
    route_class=UsageRoute,
    dependencies=EVERY_V1_ROUTE,
    responses=documented(401, 403, 422, 429, 503),
)


@usage_router.get("", response_model=UsageList)
def by_day(
    owner: Owner,
    session: SessionDep,
    key_id: KeyId = None,
    since: Annotated[dt.date | None, Query(description="First day (UTC); unset: 29 days ago.")] = None,
) -> UsageList:
    """List what this API key used, by day (UTC), newest day first. The figures remain when a job is deleted."""
    first = since or dt.datetime.now(dt.UTC).date() - USAGE_DAYS
    found = usage.by_day(session, chosen_key(owner, key_id), first)
    return UsageList(items=[DayOfUsage.model_validate(day) for day in found])
