"""What routes ask for: settings, a session, who is calling.

What does not wait is ``async``: FastAPI would hand it to a thread otherwise.
"""

import re
from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.models import ApiKey
from app.config import Settings, get_settings
from app.db.session import reading, session_factory
from app.jobs.events import Feed
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
    with reading() as session:
        owner = auth.authenticate(session, credentials.credentials) if credentials else None
    if owner is None:
        raise unauthorized()
    return owner


def unauthorized() -> Problem:
    """401, and how to do better."""
    detail = "Send a valid API key: 'Authorization: Bearer sk-secateur-…'. 'secateur keys create' makes one."
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": 'Bearer realm="secateur"'})


async def refuse_unknown_parameters(request: Request) -> None:
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


SettingsDep = Annotated[Settings, Depends(get_settings)]
# FastAPI's default scope would keep the connection until the last byte of the response is sent.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
Owner = Annotated[ApiKey, Depends(get_owner)]
EVERY_V1_ROUTE = [Depends(get_owner), Depends(refuse_unknown_parameters)]


async def get_feed(request: Request) -> Feed:
    """The process's feed of job changes."""
    feed: Feed = request.app.state.feed
    return feed


FeedDep = Annotated[Feed, Depends(get_feed)]
