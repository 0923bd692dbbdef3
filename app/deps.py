"""What routes ask for: settings, a session, who is calling.

What does not wait is ``async``: FastAPI would hand it to a thread otherwise.
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
from app.http import rate
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
    """A session until the route returns: for routes that answer at once, not for those that wait."""
    with session_factory()() as session:
        yield session


class KeyedRoute(APIRoute):
    """A route that looks at the API key before it reads a body: FastAPI's own holds and parses those of strangers too.

    ``reading`` and ``writing`` are the scopes that its methods need. ``query`` finds the key and, in the same round trip,
    whatever else the route is sure to read, with what ``parameters`` gives; the row is in the request's ``state.found``.
    """

    reading = Scope.READ
    writing = Scope.SUBMIT
    query: Executable = FIND

    def parameters(self, request: Request) -> dict[str, Any]:
        """Of :attr:`query`, beside the key's."""
        return {}

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def keyed(request: Request) -> Response:
            await run_in_threadpool(self._admit, request, await bearer(request))
            return await handle(request)

        return keyed

    def _admit(self, request: Request, credentials: HTTPAuthorizationCredentials | None) -> None:
        """Put the caller, what was found, and the headers that tell how often it may still ask, into the request's state.

        Raises:
            Problem: 401, 403, 422, 429.
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
    """The API key of the caller of a :class:`KeyedRoute`."""
    owner: Caller = request.state.owner
    return owner


def unauthorized() -> Problem:
    """401, and how to do better."""
    detail = "Send a valid API key: 'Authorization: Bearer sk-secateur-…'. 'secateur keys create' makes one."
    return Problem(401, ErrorCode.UNAUTHORIZED, detail, headers={"WWW-Authenticate": 'Bearer realm="secateur"'})


def _refuse_unknown_parameters(request: Request) -> None:
    """Nothing in the query but the route's own parameters: a misspelt ``validate_only`` is not to make a job.

    Names that only ``openapi_extra`` can tell, as ``label.KEY``, stand there.

    Raises:
        Problem: 422.
    """
    if not request.query_params:
        return
    route: APIRoute = request.scope["route"]
    known = {field.alias for field in route.dependant.query_params}
    known |= {extra["name"] for extra in (route.openapi_extra or {}).get("parameters", ())}
    for name in request.query_params:
        if name not in known and re.sub(r"\..*", ".KEY", name) not in known:
            raise invalid(name, "unknown parameter", allowed=", ".join(sorted(known)) or "no parameters")


# FastAPI's default scope would keep the connection until the last byte of the response is sent.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
Owner = Annotated[Caller, Depends(get_owner)]
SettingsDep = Annotated[Settings, Depends(get_settings)]
EVERY_V1_ROUTE = [Depends(bearer)]
"""Of a :class:`KeyedRoute`; ``bearer`` is what the OpenAPI document knows of the key."""


async def get_feed(request: Request) -> Feed:
    """The process's feed of job changes."""
    feed: Feed = request.app.state.feed
    return feed


FeedDep = Annotated[Feed, Depends(get_feed)]
