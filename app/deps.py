"""What routes ask for: settings, a session, who is calling."""

import re
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.models import ApiKey
from app.auth.service import Scope
from app.config import Settings, get_settings
from app.db.session import session_factory
from app.jobs.events import Feed
from app.kit import rate
from app.kit.problem import Problem, invalid

bearer = HTTPBearer(
    auto_error=False,
    scheme_name="ApiKey",
    description="`Authorization: Bearer sk-secateur-…`, from `secateur keys create`.",
)


def get_session() -> Iterator[Session]:
    """A session until the route returns: for routes that answer at once, not for those that wait."""
    with session_factory()() as session:
        yield session


def get_owner(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> ApiKey:
    """The API key of the caller.

    Raises:
        Problem: 401.
    """
    with session_factory()() as session:
        owner = auth.authenticate(session, credentials.credentials) if credentials else None
    if owner is None:
        raise unauthorized()
    return owner


def unauthorized() -> Problem:
    """401, and how to do better."""
    detail = "Send a valid API key: 'Authorization: Bearer sk-secateur-…'. 'secateur keys create' makes one."
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": 'Bearer realm="secateur"'})


def refuse_unknown_parameters(request: Request) -> None:
    """Nothing in the query but the route's own parameters: a misspelt ``validate_only`` is not to make a job.

    Names that only ``openapi_extra`` can tell, as ``label.KEY``, stand there.

    Raises:
        Problem: 422.
    """
    route: APIRoute = request.scope["route"]
    known = {field.alias for field in route.dependant.query_params}
    known |= {extra["name"] for extra in (route.openapi_extra or {}).get("parameters", ())}
    for name in request.query_params:
        if name not in known and re.sub(r"\..*", ".KEY", name) not in known:
            raise invalid(name, "unknown parameter", allowed=", ".join(sorted(known)) or "no parameters")


# FastAPI's default scope would keep the connection until the last byte of the response is sent.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
Owner = Annotated[ApiKey, Depends(get_owner)]
SettingsDep = Annotated[Settings, Depends(get_settings)]


def limit_rate(request: Request, owner: Owner, settings: SettingsDep) -> None:
    """Count the request against its key's.

    Raises:
        Problem: 429.
    """
    request.state.headers = rate.count(settings, owner.id)


def v1(reading: Scope, writing: Scope) -> list[Any]:
    """The dependencies of every route of a router: a live key of the scope that the method needs, and known parameters alone.

    Raises:
        Problem: 401, 403, 422, 429.
    """

    def has_scope(request: Request, owner: Owner) -> None:
        needed = reading if request.method in ("GET", "HEAD") else writing
        if needed not in owner.scopes:
            challenge = f'Bearer realm="secateur", error="insufficient_scope", scope="{needed}"'  # RFC 6750, 3.1
            detail = f"This API key has no scope '{needed}'; it has: {', '.join(owner.scopes)}."
            raise Problem(403, "insufficient_scope", detail, headers={"WWW-Authenticate": challenge})

    return [Depends(has_scope), Depends(limit_rate), Depends(refuse_unknown_parameters)]


def get_feed(request: Request) -> Feed:
    """The process's feed of job changes."""
    feed: Feed = request.app.state.feed
    return feed


FeedDep = Annotated[Feed, Depends(get_feed)]
