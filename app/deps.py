"""What routes ask for: settings, a session, who is calling."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.models import ApiKey
from app.config import Settings, get_settings
from app.db.session import session_factory
from app.jobs.events import Feed
from app.kit.problem import Problem

bearer = HTTPBearer(
    auto_error=False,
    scheme_name="ApiKey",
    description="`Authorization: Bearer sk-secateur-…`, from `secateur keys create`.",
)


def get_session() -> Iterator[Session]:
    """A session for the length of the request: for routes that answer at once, not for those that wait."""
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
        detail = "Send a valid API key: 'Authorization: Bearer sk-secateur-…'. 'secateur keys create' makes one."
        raise Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": 'Bearer realm="secateur"'})
    return owner


SettingsDep = Annotated[Settings, Depends(get_settings)]
SessionDep = Annotated[Session, Depends(get_session)]
Owner = Annotated[ApiKey, Depends(get_owner)]


def get_feed(request: Request) -> Feed:
    """The process's feed of job changes."""
    feed: Feed = request.app.state.feed
    return feed


FeedDep = Annotated[Feed, Depends(get_feed)]
