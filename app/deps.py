"""Dependencies of routes: the settings, a database session and the caller's API key.

Dependencies that do not block are ``async``, because FastAPI runs the others in a thread.
"""

import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Executable
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.repository import FIND
from app.auth.service import Caller
from app.config import Settings, get_settings
from app.db.session import reading, session_factory
from app.http import body, rate
from app.http.problem import Problem, invalid
from app.jobs.events import Feed
from secateur.contract.errors import ErrorCode
from secateur.contract.keys import Scope

bearer = HTTPBearer(
    auto_error=False,
    scheme_name="ApiKey",
    description="`Authorization: Bearer sk-secateur-…`, from `secateur keys create`.",
)


def get_session() -> Iterator[Session]:
    """Yield a database session until the route returns; routes that wait must not use this dependency."""
    with session_factory()() as session:
        yield session


class KeyedRoute(APIRoute):
    """A route that checks the API key before it reads the body; FastAPI's own route reads and parses the body first.

    ``reading`` and ``writing`` are the scopes that the route's methods need. ``query`` finds the API key and, in the
    same round trip, any other data that the route always reads; :meth:`parameters` supplies the parameters of the
    query. The resulting row is in the request's ``state.found``.
    """

    reading = Scope.READ
    writing = Scope.SUBMIT
    query: Executable = FIND

    def parameters(self, request: Request) -> dict[str, Any]:
        """Return the parameters of :attr:`query` other than those that identify the API key."""
        return {}

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model: Any = self.body_field and self.body_field.field_info.annotation

        async def keyed(request: Request) -> Response:
            await run_in_threadpool(self._admit, request, await bearer(request))
            return await handle(await body.read(request, model) if model else request)

        return keyed

    def _admit(self, request: Request, credentials: HTTPAuthorizationCredentials | None) -> None:
        """Store the caller, the row that was found and the rate-limit headers in the request's state.

        Raises:
            Problem: 401, 403, 422 or 429: the API key is invalid, its scope is missing, a query parameter is unknown,
                or the rate limit is reached.
        """
        state, parameters = request.state, self.parameters(request)
        with reading() as session:
            known = credentials and auth.authenticate(session, credentials.credentials, self.query, **parameters)
        if not known:
            raise unauthorized()
        state.owner, state.found = known
        needed = self.reading if request.method in ("GET", "HEAD") else self.writing
        if needed not in state.owner.scopes:
            challenge = f'Bearer realm="secateur", error="insufficient_scope", scope="{needed}"'  # RFC 6750, 3.1
            detail = f"This API key has no scope '{needed}'; it has: {', '.join(state.owner.scopes)}."
            raise Problem(403, ErrorCode.INSUFFICIENT_SCOPE, detail, headers={"WWW-Authenticate": challenge})
        state.headers = rate.count(get_settings(), state.owner.id)
        _refuse_unknown_parameters(request)


async def get_owner(request: Request) -> Caller:
    """Return the API key of the caller of a :class:`KeyedRoute`."""
    owner: Caller = request.state.owner
    return owner


def unauthorized() -> Problem:
    """Return a 401 problem that explains how to send a valid API key."""
    detail = "Send a valid API key: 'Authorization: Bearer sk-secateur-…'. 'secateur keys create' makes one."
    return Problem(401, ErrorCode.UNAUTHORIZED, detail, headers={"WWW-Authenticate": 'Bearer realm="secateur"'})


def _refuse_unknown_parameters(request: Request) -> None:
    """Refuse query parameters that the route does not have, so that a misspelt ``validate_only`` creates no job.

    A route lists parameters that have no fixed name, such as ``label.KEY``, in ``openapi_extra``.

    Raises:
        Problem: 422 if the query has a parameter that the route does not have.
    """
    if not request.query_params:
        return
    route: APIRoute = request.scope["route"]
    known = {field.alias for field in route.dependant.query_params}
    known |= {extra["name"] for extra in (route.openapi_extra or {}).get("parameters", ())}
    for name in request.query_params:
        if name not in known and re.sub(r"\..*", ".KEY", name) not in known:
            raise invalid(name, "unknown parameter", allowed=", ".join(sorted(known)) or "no parameters")


# FastAPI's default scope would hold the database connection until the last byte of the response is sent.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
Owner = Annotated[Caller, Depends(get_owner)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
EVERY_V1_ROUTE = [Depends(bearer)]
"""Dependencies of every :class:`KeyedRoute`; ``bearer`` describes the API key in the OpenAPI document."""


async def get_feed(request: Request) -> Feed:
    """Return the process's feed of job changes."""
    feed: Feed = request.app.state.feed
    return feed


FeedDep = Annotated[Feed, Depends(get_feed)]
