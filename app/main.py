"""The HTTP application: ``uvicorn app.main:create_app --factory``."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware

from app import catalog_routes, errors, health, startup, tracing
from app.auth import routes as keys
from app.config import get_settings
from app.dashboard import routes as dashboard
from app.datasets import routes as datasets
from app.fleet import routes as workers
from app.http import logs
from app.http.body_limit import BodyLimit
from app.http.browser_rules import DASHBOARD, DOCS, BrowserRules
from app.http.fair import Fair
from app.http.observe import Observe
from app.http.problem import ProblemDetails
from app.jobs import routes as jobs
from app.jobs.events import Feed
from app.metrics import ServiceCollector

DESCRIPTION = """
Prunes large language models: post a job, get back a smaller model with a report of what it cost.

Errors are problem details (RFC 9457) with a stable `code`. Times are RFC 3339 UTC. Ids are UUIDv7. Unknown fields are
refused. Every response carries `X-Request-Id`; a sane one of the request is kept.
"""

CORS_REQUEST_HEADERS = (
    "Authorization", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match", "Last-Event-ID", "Prefer", "Range", "X-Request-Id",
)  # fmt: skip
CORS_RESPONSE_HEADERS = (
    "Content-Range", "ETag", "Location", "Preference-Applied", "Retry-After", "WWW-Authenticate", "X-Request-Id",
)  # fmt: skip


def create_app() -> FastAPI:
    """Return the application, configured with the settings of this process.

    Raises:
        SystemExit: the process cannot start; the reason is printed.
    """
    with startup.refusing():
        settings = get_settings()
        logs.configure(settings)
        startup.check(settings, owns_folder=False)
    feed, registry = Feed(settings.max_waiting), CollectorRegistry()
    registry.register(ServiceCollector(settings))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with feed.listening(settings.database_url):
            yield

    app = FastAPI(
        title="Secateur",
        version=version("secateur"),
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.docs else None,
        telemetry=tracing.of_requests(),
    )
    app.state.feed, app.state.registry = feed, registry
    app.add_middleware(
        BodyLimit, largest=settings.max_body_bytes, at={datasets.router.prefix: settings.max_dataset_bytes}
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=CORS_REQUEST_HEADERS,
            expose_headers=CORS_RESPONSE_HEADERS,
        )
    app.add_middleware(Fair)
    app.add_middleware(Observe, registry=registry)
    app.add_middleware(BrowserRules, private="/v1/", pages={"/docs": DOCS, "/redoc": DOCS, "/": DASHBOARD})
    errors.install(app)
    for router in (
        jobs.router, datasets.router, catalog_routes.router, keys.router, keys.usage_router, workers.router, health.router,
    ):  # fmt: skip
        app.include_router(router)
    if settings.dashboard:
        dashboard.install(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's OpenAPI document with problem details in place of FastAPI's own error schema."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = document["components"]["schemas"]
        problem = ProblemDetails.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(problem.pop("$defs"), ProblemDetails=problem)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
