"""The outermost middleware of every request: the request's id, its duration and the answer when code fails."""

import logging
import re
import time
import uuid

from fastapi import Request
from prometheus_client import CollectorRegistry, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http import logs
from app.http.problem import Problem, respond
from secateur.contract.errors import ErrorCode

log = logging.getLogger(__name__)

SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Observe:
    """ASGI middleware that gives each request an id, measures its duration and handles uncaught exceptions.

    Every response carries ``X-Request-Id`` (the client's id if it matches :data:`SANE_ID`, else a new id) and the
    headers in the request state's ``headers``. An uncaught exception is logged with that id and answered with 500; the
    answer reveals no internals.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self.durations = Histogram(
            "secateur_http_request_duration_seconds",
            "Time to the first byte of the response.",
            ["method", "route", "status"],
            buckets=BUCKETS,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SANE_ID.fullmatch(given) else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        begun, responded = time.perf_counter(), False

        async def stamped(message: Message) -> None:
            nonlocal responded
            if message["type"] == "http.response.start":
                responded = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.update(scope["state"].get("headers", {}))
                route = getattr(scope.get("route"), "path", "unmatched")
                self.durations.labels(scope["method"], route, message["status"]).observe(time.perf_counter() - begun)
            await send(message)

        with logs.about(request_id=request_id):
            try:
                await self.app(scope, receive, stamped)
            except Exception:
                if responded:
                    raise
                log.exception("request %s failed", request_id)
                problem = Problem(
                    500, ErrorCode.INTERNAL_ERROR, "Something went wrong here; the request id finds it in the log."
                )
                await respond(Request(scope), problem)(scope, receive, stamped)
