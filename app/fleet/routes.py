"""``/v1/workers``: shows and drains workers, for callers with the scope ``admin``."""

from fastapi import APIRouter, Response

from app.auth.routes import AdminRoute
from app.deps import EVERY_V1_ROUTE, SessionDep, SettingsDep
from app.fleet import service
from app.http.problem import Problem, documented
from app.jobs import dispatch
from secateur.contract.errors import ErrorCode
from secateur.contract.workers import Drain, DrainRequest, WorkerList

router = APIRouter(
    prefix="/v1/workers",
    tags=["workers"],
    route_class=AdminRoute,
    dependencies=EVERY_V1_ROUTE,
    responses=documented(401, 403, 422, 429, 503),
)


@router.get("", response_model=WorkerList)
def every(session: SessionDep, settings: SettingsDep) -> WorkerList:
    """List the workers, what they offer, and the jobs that they work on."""
    return WorkerList(items=service.every(session, settings))


@router.post("/{name}/drain", status_code=204, response_class=Response, responses=documented(400, 404, 413))
def drain(name: str, body: DrainRequest, session: SessionDep) -> None:
    """Let a worker take no new job; idempotent. The drain ends when the worker is resumed or its process ends."""
    _set_drain(session, name, Drain.RELEASE if body.now else Drain.FINISH)


@router.post("/{name}/resume", status_code=204, response_class=Response, responses=documented(404))
def resume(name: str, session: SessionDep) -> None:
    """Let a drained worker take jobs again; idempotent."""
    _set_drain(session, name, None)
    dispatch.wake_worker()


def _set_drain(session: SessionDep, name: str, wanted: Drain | None) -> None:
    try:
        service.set_drain(session, name, wanted)
    except service.UnknownWorker:
        raise Problem(404, ErrorCode.NOT_FOUND, f"There is no worker {name}.") from None
