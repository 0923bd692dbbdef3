"""``/v1/jobs``: the HTTP interface of :mod:`app.jobs.service`.

Routes that may wait are ``async`` and reach the database in short calls on the thread pool, so that a thousand waiting
clients hold neither a thread nor a database connection.
"""

import csv
import io
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import chain
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

from fastapi import APIRouter, BackgroundTasks, Depends, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import StringConstraints, TypeAdapter, ValidationError

from app.auth import service as auth
from app.auth.service import Caller
from app.config import get_settings
from app.db.session import reading
from app.deps import (
    EVERY_V1_ROUTE,
    FeedDep,
    KeyedRoute,
    KeyId,
    Owner,
    SessionDep,
    SettingsDep,
    chosen_key,
    unauthorized,
)
from app.http import pages, ranges
from app.http.etags import etag, matches
from app.http.fair import waits
from app.http.pages import PageSize, PageToken
from app.http.prefer import Wait
from app.http.problem import Problem, documented, invalid
from app.jobs import dispatch, repository, service
from app.jobs.events import Signal
from app.jobs.schemas import JobFilter
from app.jobs.texts import whole_request
from app.jobs.transitions import Trigger
from app.storage.store import ObjectMissing, open_store
from secateur.catalog.recipe import Recipe
from secateur.catalog.request import DerivedRequest, JobRequest, LabelChange, LabelName, LabelValue, StepPublication
from secateur.contract.errors import ErrorCode
from secateur.contract.jobs import (
    Artifact,
    ArtifactList,
    DryRun,
    EventPage,
    EventView,
    JobPage,
    JobSummary,
    JobView,
    LogLineView,
    LogPage,
    MetricsList,
    StepList,
    StepMetrics,
    StepView,
)
from secateur.contract.keys import Scope
from secateur.contract.states import TERMINAL, State

Shown = TypeVar("Shown", bound=JobSummary)
POLL_AFTER = 2
"""Number of seconds after which a client should poll again (``Retry-After``)."""
STREAM_BATCH = 100

SIGNED_SECONDS = 3600.0


class JobRoute(KeyedRoute):
    """A route to jobs that exist; the scope ``admin`` opens the route too, and shows the jobs of all API keys."""

    instead = Scope.ADMIN


router = APIRouter(
    prefix="/v1/jobs",
    tags=["jobs"],
    route_class=JobRoute,
    dependencies=EVERY_V1_ROUTE,
    responses=documented(401, 403, 422, 429, 503),
)

IdempotencyKey = Annotated[
    Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,255}$")] | None,
    Header(description="Makes sending the request again safe; kept for 24 hours."),
]
IfMatch = Annotated[
    str | None, Header(description="`ETag` of an earlier answer; the job is changed only if it is still that one.")
]
IfNoneMatch = Annotated[str | None, Header(description="`ETag` of an earlier answer.")]
LastEventId = Annotated[int, Header(ge=0, lt=2**63, description="The last event that was seen.")]
JobId = TypeAdapter(uuid.UUID)
Labels = TypeAdapter(dict[LabelName, LabelValue])
FILE_TYPE = "application/octet-stream"
FILE_CONTENT = {FILE_TYPE: {"schema": {"type": "string", "format": "binary"}}}
CSV_TYPE = "text/csv"
CSV_CONTENT = {CSV_TYPE: {"schema": {"type": "string"}}}
LABEL_PARAMETER = {
    "name": "label.KEY",
    "in": "query",
    "description": "The value of the label KEY; any number of labels.",
    "schema": {"type": "string"},
}


def _view(job: Any, caller: Caller, response: Response) -> JobView:
    """Return the job as ``caller`` sees it; this reads the database if the job is queued."""
    return _seen(job, caller, response, service.waiting_for(get_settings(), job))


def _seen(job: Any, caller: Caller, response: Response, waiting_for: str | None) -> JobView:
    """Return the job as ``caller`` sees it, and tell ``response`` its version and when to ask again."""
    response.headers["ETag"] = etag(job.version)
    if job.state not in TERMINAL:
        response.headers["Retry-After"] = str(POLL_AFTER)
    return _shown(JobView.model_validate(job).model_copy(update={"waiting_for": waiting_for}), job, caller)


def _shown(view: Shown, job: Any, caller: Caller) -> Shown:
    """Return the view of a job with the API key that created the job, which only administrators see."""
    view.key_id = job.owner_id if caller.is_admin else None
    return view


def _look(caller: Caller, job_id: uuid.UUID) -> Any:
    """Return the job, if the API key is still valid.

    Raises:
        Problem: 401 when the API key was revoked since the last read, 404 when the job does not exist.
    """
    with reading() as session:
        if not auth.is_live(session, caller.id):
            raise unauthorized()
        return service.view(session, caller, job_id)


async def _wait(feed: FeedDep, caller: Caller, job_id: uuid.UUID, seconds: int, done: Callable[[Any], bool]) -> Any:
    """Return the job as soon as it is ``done`` or ``seconds`` have passed.

    Raises:
        Problem: 401 when the API key is revoked meanwhile, 404 when the job is deleted.
    """
    waits()
    deadline = time.monotonic() + seconds
    with feed.signal(caller.id, job_id) as signal:
        while True:
            job = await feed.read(caller.id, lambda: _look(caller, job_id))
            left = deadline - time.monotonic()
            if done(job) or left <= 0:
                return job
            await signal.wait(left)


async def create(
    body: JobRequest | DerivedRequest,
    response: Response,
    background: BackgroundTasks,
    owner: Owner,
    settings: SettingsDep,
    feed: FeedDep,
    wait: Wait,
    idempotency_key: IdempotencyKey = None,
    validate_only: Annotated[
        bool,
        Query(
            description="Dry run: check the request and return what the job would do; no job is created, the status is 200."
        ),
    ] = False,
) -> Any:
    """Create a job, or derive one `from` an earlier job.

    `Prefer: wait=n` delays the answer until the job ends or n seconds have passed.
    """
    if validate_only:
        planned = await service.dry_run(settings, owner, body)
        return Response(planned.model_dump_json(), media_type="application/json")
    job: Any = await service.create(settings, owner, body, idempotency_key)
    if wait is None:
        background.add_task(dispatch.wake_worker)
    else:
        await run_in_threadpool(dispatch.wake_worker)
        if not feed.is_full(owner.id):  # the job is made, so its answer comes at once where it cannot wait
            job = await _wait(feed, owner, job.id, wait, lambda job: job.state in TERMINAL)
            response.headers["Preference-Applied"] = f"wait={wait}"
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return await run_in_threadpool(_view, job, owner, response)


router.add_api_route(
    "",
    create,
    methods=["POST"],
    status_code=202,
    response_model=JobView,
    responses={200: {"model": DryRun}, **documented(400, 404, 410, 413)},
    route_class_override=KeyedRoute,
)


@router.get("", response_model=JobPage, openapi_extra={"parameters": [LABEL_PARAMETER]})
def newest(
    request: Request,
    owner: Owner,
    session: SessionDep,
    state: Annotated[list[State], Query(description="One or more.")] = [],  # noqa: B006
    method: Annotated[str | None, Query(pattern=r"^[^\x00]*$")] = None,
    model_id: Annotated[str | None, Query(pattern=r"^[^\x00]*$")] = None,
    key_id: KeyId = None,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> JobPage:
    """List the jobs of this API key, newest first. The query parameters restrict the list."""
    wanted = JobFilter(state=state, method=method, model_id=model_id)
    before = pages.decode(page_token, uuid.UUID)
    jobs, cursor = service.page(session, chosen_key(owner, key_id), wanted, _labels(request), before, page_size)
    items = [_shown(JobSummary.model_validate(job), job, owner) for job in jobs]
    return JobPage(items=items, next_page_token=pages.encode(cursor) if cursor else None)


def _labels(request: Request) -> dict[str, str]:
    query = request.query_params
    labels = {name.removeprefix("label."): value for name, value in query.items() if name.startswith("label.")}
    try:
        return Labels.validate_python(labels)
    except ValidationError as error:
        raise invalid("label", error.errors()[0]["msg"]) from None


class PolledRoute(JobRoute):
    """The route of one job, which clients request far more often than any other route."""

    query = repository.VIEW_WITH_KEY

    def parameters(self, request: Request) -> dict[str, Any]:
        try:
            return {"job_id": JobId.validate_python(request.path_params["job_id"])}
        except ValidationError:
            return {"job_id": None}  # FastAPI refuses the id after the API key is checked

    def _admit(self, request: Request, credentials: HTTPAuthorizationCredentials | None) -> None:
        """Do as other routes do, and read what the job waits for, which takes no thread of its own here."""
        super()._admit(request, credentials)
        request.state.waiting_for = service.waiting_for(get_settings(), request.state.found)


async def get(
    job_id: uuid.UUID,
    request: Request,
    response: Response,
    owner: Owner,
    feed: FeedDep,
    wait: Wait,
    if_none_match: IfNoneMatch = None,
) -> Any:
    """Return a job.

    `Prefer: wait=n` delays the answer until the job differs from the version that `If-None-Match` names or, without
    that header, from its current version; the answer comes after n seconds at the latest.
    """
    job, waiting_for = request.state.found, request.state.waiting_for
    if job.id is None:
        raise service.no_job(job_id)
    seen = if_none_match or etag(job.version)
    if wait is not None:
        response.headers["Preference-Applied"] = f"wait={wait}"
        job = await _wait(
            feed, owner, job_id, wait, lambda job: job.state in TERMINAL or not matches(seen, etag(job.version))
        )
        waiting_for = await run_in_threadpool(service.waiting_for, get_settings(), job)
    view = _seen(job, owner, response, waiting_for)
    if if_none_match is not None and matches(if_none_match, etag(job.version)):
        return Response(status_code=304, headers=dict(response.headers))
    return view


router.add_api_route(
    "/{job_id}",
    get,
    response_model=JobView,
    responses={304: {"description": "Not changed."}, **documented(404)},
    route_class_override=PolledRoute,
)


@router.patch("/{job_id}", response_model=JobView, responses=documented(400, 404, 412, 413))
def change_labels(
    job_id: uuid.UUID,
    body: LabelChange,
    response: Response,
    owner: Owner,
    session: SessionDep,
    if_match: IfMatch = None,
) -> JobView:
    """Replace the labels of a job, in whatever state it is. The job's request keeps the labels that it had."""
    return _view(service.label(session, owner, job_id, body.labels, if_match), owner, response)


@router.delete("/{job_id}", status_code=204, responses=documented(404, 409))
def delete(job_id: uuid.UUID, owner: Owner, session: SessionDep) -> None:
    """Delete a job that has ended, together with its artifacts. Published models remain."""
    service.delete(session, owner, job_id)


def _ask(trigger: Trigger, summary: str) -> None:
    """Add a route that sends a trigger to a job."""

    def ask(
        job_id: uuid.UUID, response: Response, background: BackgroundTasks, owner: Owner, session: SessionDep
    ) -> JobView:
        job = service.ask(session, owner, job_id, trigger)
        if job.state == State.QUEUED:
            background.add_task(dispatch.wake_worker)
        return _view(job, owner, response)

    router.post(
        f"/{{job_id}}/{trigger}", response_model=JobView, summary=summary, name=trigger, responses=documented(404, 409)
    )(ask)


_ask(Trigger.CANCEL, "Cancel the job permanently; idempotent.")
_ask(Trigger.PAUSE, "Stop the job at the end of its step; idempotent.")
_ask(Trigger.RESUME, "Resume a paused job; idempotent.")
_ask(Trigger.RETRY, "Queue a failed or cancelled job again, from its last completed step; idempotent.")


@router.get("/{job_id}/events", response_model=EventPage, responses=documented(404))
def events(
    job_id: uuid.UUID,
    owner: Owner,
    session: SessionDep,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> EventPage:
    """List the events of a job, oldest first."""
    after = pages.decode(page_token, pages.read_id) or 0
    _, found = service.events(session, owner, job_id, after, page_size + 1)
    items = [EventView.model_validate(event) for event in found[:page_size]]
    return EventPage(items=items, next_page_token=pages.encode(items[-1].id) if len(found) > page_size else None)


@router.get("/{job_id}/logs", response_model=LogPage, responses=documented(404))
def logs(
    job_id: uuid.UUID,
    response: Response,
    owner: Owner,
    session: SessionDep,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> LogPage:
    """List the newest lines that the job's processes wrote on their worker, oldest first.

    A service keeps the last 1000 lines and 256 KiB of a job. While the job has not ended, the last page has a
    `next_page_token`, too: it returns the lines that are written later. Workers send lines with their heartbeats.
    """
    after = pages.decode(page_token, pages.read_place) or (0, 0)
    job, found = service.log_lines(session, owner, job_id, after, page_size + 1)
    items = [LogLineView.model_validate(line) for line in found[:page_size]]
    if len(found) <= page_size and job.state not in TERMINAL:
        response.headers["Retry-After"] = str(POLL_AFTER)
    elif len(found) <= page_size:
        return LogPage(items=items, next_page_token=None)
    attempt, number = (items[-1].attempt, items[-1].number) if items else after
    return LogPage(items=items, next_page_token=pages.encode(f"{attempt}.{number}"))


def _must_exist(job_id: uuid.UUID, owner: Owner) -> None:
    with reading() as session:
        service.view(session, owner, job_id)


async def _signal(job_id: uuid.UUID, owner: Owner, feed: FeedDep) -> AsyncIterator[Signal]:
    """Yield a signal that the job may have changed, until the stream has ended."""
    with feed.signal(owner.id, job_id) as signal:
        yield signal


@router.get(
    "/{job_id}/events/stream",
    response_class=EventSourceResponse,
    dependencies=[Depends(_must_exist)],
    responses=documented(404),
)
async def stream(
    job_id: uuid.UUID,
    owner: Owner,
    feed: FeedDep,
    signal: Annotated[Signal, Depends(_signal)],
    last_event_id: LastEventId = 0,
) -> AsyncIterator[ServerSentEvent]:
    """Send the job's past and new events as Server-Sent Events.

    Every event carries its id, from which `Last-Event-ID` resumes the stream. `progress` frames have no id; they show
    the job's `progress` as it changes. The last frame is `end` and carries the job's final state; a client then closes
    the stream. If the API key is revoked, the `end` frame comes earlier and carries the code `unauthorized`.
    """
    after, shown = last_event_id, None

    def read() -> Any:
        with reading() as session:
            if not auth.is_live(session, owner.id):
                return None
            return service.events(session, owner, job_id, after, STREAM_BATCH)

    while True:
        answer = await feed.read(owner.id, read)
        if answer is None:
            yield ServerSentEvent(data={"code": unauthorized().code}, event="end")
            return
        job, found = answer
        for event in found:
            after = event.id
            yield ServerSentEvent(data=EventView.model_validate(event), event=event.type, id=str(event.id))
        if len(found) == STREAM_BATCH:
            continue
        if job.state in TERMINAL:
            yield ServerSentEvent(data={"state": job.state}, event="end")
            return
        if job.progress is not None and job.progress != shown:
            shown = job.progress
            yield ServerSentEvent(data=JobSummary.model_validate(job).progress, event="progress")
        await signal.wait(float("inf"))


@router.get("/{job_id}/steps", response_model=StepList, responses=documented(404))
def steps(job_id: uuid.UUID, owner: Owner, session: SessionDep) -> StepList:
    """List the completed steps: for each step its ratio, widths by layer, perplexity, loss curve, time and memory."""
    found = service.steps(session, owner, job_id)
    return StepList(items=[StepView.model_validate(item) for item in found])


@router.get(
    "/{job_id}/metrics",
    response_model=MetricsList,
    responses={
        200: {"description": "JSON, or a table with a header for `Accept: text/csv`.", "content": CSV_CONTENT},
        **documented(404),
    },
)
def metrics(job_id: uuid.UUID, request: Request, response: Response, owner: Owner, session: SessionDep) -> Any:
    """List the figures of the completed steps, one flat row for each step; `Accept: text/csv` returns them as CSV."""
    found = service.steps(session, owner, job_id)
    items = [StepMetrics.of_step(step.number, step.attempt, step.created_at, step.data) for step in found]
    response.headers["Vary"] = "Accept"
    if CSV_TYPE not in _accepted(request):
        return MetricsList(items=items)
    table = io.StringIO()
    rows = csv.DictWriter(table, list(StepMetrics.model_fields))
    rows.writeheader()
    rows.writerows(item.model_dump(mode="json") for item in items)
    return Response(table.getvalue(), headers={"Vary": "Accept"}, media_type=f"{CSV_TYPE}; header=present")


def _accepted(request: Request) -> list[str]:
    """Return the media types that the client names in ``Accept``, without parameters; none if it takes JSON, too."""
    types = [part.partition(";")[0].strip() for part in request.headers.get("accept", "").split(",")]
    return [] if "application/json" in types else types


@router.post(
    "/{job_id}/steps/{number}/publish",
    status_code=202,
    response_model=JobView,
    responses=documented(400, 404, 409, 410, 413),
)
async def publish_step(
    job_id: uuid.UUID,
    number: Annotated[int, Path(ge=0, lt=2**31, description="The step, as the list of steps numbers it.")],
    response: Response,
    background: BackgroundTasks,
    owner: Owner,
    settings: SettingsDep,
    body: StepPublication = StepPublication(),
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Create a job that publishes the model of a completed step of this job, which has ended.

    The new job loads the source model, applies the step's checkpoint, measures, exports and checks the model, and
    publishes it; nothing is scored again. The request of the new job names this job in `resume_from`.
    """
    job = await service.publish_step(settings, owner, job_id, number, body, idempotency_key)
    background.add_task(dispatch.wake_worker)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return await run_in_threadpool(_view, job, owner, response)


@router.get("/{job_id}/recipe", response_model=dict[str, Any], responses=documented(404, 409))
def recipe(job_id: uuid.UUID, owner: Owner, session: SessionDep) -> dict[str, Any]:
    """Return the fields of the job's request that differ from their defaults, including texts.

    A job created with these fields produces the same model.
    """
    return dict(Recipe.of_request(whole_request(service.own_run(session, owner, job_id))).fields)


class ReportRoute(JobRoute):
    """A route that redirects browsers, which send no API key by themselves, to the web page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        keyed = super().get_route_handler()

        async def negotiated(request: Request) -> Response:
            if "text/html" in _accepted(request) and get_settings().dashboard:
                return RedirectResponse(f"/#/jobs/{request.path_params['job_id']}", 303)
            return await keyed(request)

        return negotiated


def report(job_id: uuid.UUID, owner: Owner, session: SessionDep) -> dict[str, Any]:
    """Return the complete result of a job that has succeeded. `Accept: text/html` redirects to the job's web page."""
    return service.report(session, owner, job_id)


router.add_api_route(
    "/{job_id}/report",
    report,
    response_model=dict[str, Any],
    responses={303: {"description": "The web page, for `Accept: text/html`."}, **documented(404, 409)},
    route_class_override=ReportRoute,
)


@router.get("/{job_id}/artifacts", response_model=ArtifactList, responses=documented(404))
def artifacts(job_id: uuid.UUID, owner: Owner, session: SessionDep) -> ArtifactList:
    """List the files of the pruned model. The list is empty until the model is written and checked."""
    prefix = f"/v1/jobs/{job_id}/artifacts"
    found = service.artifacts(session, owner, job_id)
    return ArtifactList(
        items=[
            Artifact(name=file.name, size=file.size, sha256=file.sha256, url=f"{prefix}/{quote(file.name)}")
            for file in found
        ]
    )


@router.head("/{job_id}/artifacts/{name:path}", response_class=Response, include_in_schema=False)
@router.get(
    "/{job_id}/artifacts/{name:path}",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": FILE_CONTENT},
        206: {"description": "The part that `Range` names.", "content": FILE_CONTENT},
        307: {"description": "The file is at the signed URL `Location`, without an API key, for an hour."},
        **documented(400, 404, 416),
    },
)
def artifact(
    job_id: uuid.UUID, name: str, request: Request, owner: Owner, session: SessionDep, settings: SettingsDep
) -> Response:
    """Return one file of the pruned model, or redirect to it. `Range` requests are supported."""
    file, store = service.artifact(session, owner, job_id, name), open_store(settings)
    if settings.storage_redirect and (url := store.signed_url(file.key, SIGNED_SECONDS)):
        return RedirectResponse(url, 307)
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=utf-8''{quote(name.rpartition('/')[2])}",
        "ETag": f'"{file.sha256}"',
    }
    start, end, status = 0, file.size, 200
    if (asked := request.headers.get("range")) and matches(
        request.headers.get("if-range", headers["ETag"]), headers["ETag"]
    ):
        try:
            part = ranges.parse(asked, file.size)
        except (ranges.RangeMalformed, ranges.RangeNotSatisfiable) as error:
            wrong = isinstance(error, ranges.RangeMalformed)
            status, code = (400, ErrorCode.RANGE_MALFORMED) if wrong else (416, ErrorCode.RANGE_NOT_SATISFIABLE)
            detail = f"Range '{asked[:100]}' is none of this file; 'bytes=0-99' names its first 100 bytes."
            extent = None if wrong else {"Content-Range": f"bytes */{file.size}"}
            raise Problem(status, code, detail, headers=extent) from None
        if part is not None:
            (start, end), status = part, 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD" or start == end:
        return Response(status_code=status, headers=headers, media_type=FILE_TYPE)
    chunks = store.stream(file.key, start, end)
    try:
        first = next(chunks)
    except ObjectMissing:
        raise Problem(404, ErrorCode.NOT_FOUND, f"The artifact '{name[:200]}' is no longer in the storage.") from None
    return StreamingResponse(chain([first], chunks), status, headers, FILE_TYPE)
