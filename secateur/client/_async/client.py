"""The asynchronous client.

``make client`` generates the synchronous client from this file; the generated file is never edited.
"""

import datetime as dt
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx2

from secateur.client.errors import (
    JobCancelled,
    JobFailed,
    Unauthorized,
    Unavailable,
    Unreachable,
    WaitTimeout,
    error_of,
)
from secateur.client.frames import Frame, Frames
from secateur.client.pauses import ATTEMPTS, async_sleep, pause
from secateur.client.report import Report
from secateur.contract.catalog import Inspection, MethodList, NameList
from secateur.contract.datasets import JSON_LINES, DatasetPage, DatasetView
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
    Progress,
    StepList,
    StepMetrics,
    StepView,
)
from secateur.contract.keys import DayOfUsage, KeyList, KeyView, KeyWithSecret, Scope, UsageList
from secateur.contract.states import TERMINAL, State
from secateur.contract.workers import WorkerList, WorkerView

DEFAULT_URL = "http://127.0.0.1:8000"
LONG_POLL = 20
"""Seconds for which the service holds back a response until the job changes."""
TIMEOUT = 30.0
PATIENCE = 60.0
"""Seconds for which watching a job continues while the service cannot be reached."""
CHUNK = 2**20
UPLOAD_TIMEOUT = 600.0
"""Seconds for which an upload may wait while the service stores the data set."""


class AsyncClient:
    """A client of the service at ``url`` with the API key ``api_key``; it is a context manager.

    ``url`` defaults to ``SECATEUR_URL``, and ``api_key`` to ``SECATEUR_API_KEY``. After connection errors and the
    statuses 429 and 503, the client repeats requests that may be repeated. The pauses between the attempts grow, or
    follow ``Retry-After``.

    Raises:
        ValueError: There is no API key, or the key has characters that no API key has.
        Unreachable: The URL is not valid.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout: float = TIMEOUT) -> None:
        key = api_key or os.environ.get("SECATEUR_API_KEY", "")
        if not key:
            raise ValueError("no API key: set SECATEUR_API_KEY, or give one")
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ValueError("The API key has characters that no API key has.")
        self.url = url or os.environ.get("SECATEUR_URL", DEFAULT_URL)
        try:
            self._http = httpx2.AsyncClient(
                base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=timeout
            )
        except httpx2.InvalidURL as error:
            raise Unreachable(f"The service at {self.url} cannot be reached: {error}") from error
        self.jobs = AsyncJobs(self)
        self.datasets = AsyncDatasets(self)
        self.keys = AsyncKeys(self)
        self.workers = AsyncWorkers(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def methods(self) -> MethodList:
        """Return the pruning methods, and the kinds of component that can replace those of a method."""
        return MethodList.model_validate((await self.request("GET", "/v1/methods")).json())

    async def models(self) -> Sequence[str]:
        """Return the models of the service's models folder, as ``model_id`` names them."""
        return NameList.model_validate((await self.request("GET", "/v1/models")).json()).items

    async def texts(self) -> Sequence[str]:
        """Return the texts of the service's texts folder, as ``dataset`` names them."""
        return NameList.model_validate((await self.request("GET", "/v1/texts")).json()).items

    async def tasks(self) -> Sequence[str]:
        """Return the zero-shot tasks of the service, as ``evaluation.zero_shot`` names them."""
        return NameList.model_validate((await self.request("GET", "/v1/tasks")).json()).items

    async def usage(
        self, *, key_id: uuid.UUID | str | None = None, since: dt.date | None = None
    ) -> Sequence[DayOfUsage]:
        """Return what this API key used by day (UTC), newest day first; ``since`` defaults to 29 days ago.

        With the scope ``admin``, ``key_id`` is another API key, or ``"all"``.
        """
        parameters = _given(key_id=key_id and str(key_id), since=since and since.isoformat())
        return UsageList.model_validate((await self.request("GET", "/v1/usage", params=parameters)).json()).items

    async def inspect(
        self, model_id: str, *, revision: str | None = None, gguf_file: str | None = None, hub_token: str | None = None
    ) -> Inspection:
        """Return a model's sizes, and the sizes and layouts that the pruned model can have."""
        body = _given(model_id=model_id, revision=revision, gguf_file=gguf_file, hub_token=hub_token)
        return Inspection.model_validate((await self.request("POST", "/v1/models/inspect", json=body)).json())

    async def request(
        self, method: str, path: str, *, repeat: bool = True, attempts: int = ATTEMPTS, **options: Any
    ) -> httpx2.Response:
        """Send a request, and return the response if the service did not refuse the request.

        Raises:
            ApiError: The service refused the request; :mod:`secateur.client.errors` has the subclasses.
            Unreachable: There was no connection.
        """
        attempt = 0
        while True:
            attempt += 1
            response = None
            try:
                response = await self._http.request(method, path, **options)
            except httpx2.TransportError as error:
                if not repeat or attempt >= attempts:
                    raise Unreachable(f"The service at {self.url} cannot be reached: {error}") from error
            except httpx2.InvalidURL as error:
                raise Unreachable(f"The service at {self.url} cannot be reached: {error}") from error
            if response is not None and response.status_code < 400:
                return response
            if response is not None and (response.status_code not in (429, 503) or not repeat or attempt >= attempts):
                raise error_of(response)
            await async_sleep(pause(attempt, response))

    def stream(self, path: str, headers: Mapping[str, str]) -> Any:
        """Return an open response to a GET request, as a context manager.

        A redirect to the object store is followed; the API key is sent to the service alone.
        """
        return self._http.stream("GET", path, headers=headers, follow_redirects=True)


class AsyncJobs:
    """The operations of ``/v1/jobs``."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
        self,
        *,
        model_id: str | None,
        method: str | None,
        target_ratio: float | Sequence[float] | None = None,
        rounds: int | None = None,
        idempotency_key: str | None = None,
        **rest: Any,
    ) -> "AsyncJob":
        """Create a job; ``rest`` are the request's other fields, as the API names them.

        The request is safe to repeat because it carries an idempotency key.
        """
        body = _given(model_id=model_id, method=method, target_ratio=target_ratio, rounds=rounds) | rest
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return AsyncJob(self._client, await self._client.request("POST", "/v1/jobs", json=body, headers=headers))

    async def dry_run(self, **request: Any) -> DryRun:
        """Return what :meth:`create` would do with the same fields; no job is created."""
        body = _given(**request)
        response = await self._client.request("POST", "/v1/jobs", params={"validate_only": "true"}, json=body)
        return DryRun.model_validate(response.json())

    async def get(self, job_id: uuid.UUID | str) -> "AsyncJob":
        """Return a job of this API key; with the scope ``admin``, of any API key."""
        return AsyncJob(self._client, await self._client.request("GET", f"/v1/jobs/{job_id}"))

    async def list(
        self,
        *,
        state: Sequence[State | str] = (),
        method: str | None = None,
        model_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        key_id: uuid.UUID | str | None = None,
        page_size: int = 100,
    ) -> AsyncIterator[JobSummary]:
        """Yield the jobs of this API key, newest first; each page is requested when it is needed.

        With the scope ``admin``, ``key_id`` is another API key, or ``"all"``.
        """
        parameters = _given(method=method, model_id=model_id, page_size=page_size, key_id=key_id and str(key_id))
        parameters["state"] = [str(each) for each in state]
        parameters |= {f"label.{name}": value for name, value in (labels or {}).items()}
        while True:
            page = JobPage.model_validate((await self._client.request("GET", "/v1/jobs", params=parameters)).json())
            for item in page.items:
                yield item
            if page.next_page_token is None:
                return
            parameters["page_token"] = page.next_page_token


class AsyncJob:
    """A job as the service last described it; ``view`` has all of its fields."""

    def __init__(self, client: AsyncClient, response: httpx2.Response) -> None:
        self._client = client
        self._take(response)

    def _take(self, response: httpx2.Response) -> None:
        self.view = JobView.model_validate(response.json())
        self._etag = response.headers.get("ETag", "")

    @property
    def id(self) -> uuid.UUID:
        return self.view.id

    @property
    def state(self) -> State:
        return self.view.state

    @property
    def progress(self) -> Progress | None:
        return self.view.progress

    @property
    def result(self) -> dict[str, Any] | None:
        return self.view.result

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state} {self.view.model_id} {self.view.method}>"

    @property
    def _path(self) -> str:
        return f"/v1/jobs/{self.id}"

    async def refresh(self) -> Self:
        """Request the job again, and return it with its current fields."""
        self._take(await self._client.request("GET", self._path))
        return self

    async def changes(self) -> AsyncIterator[Self]:
        """Yield the job now and after every change, until the job ends.

        If the service cannot be reached, the client tries again for 60 seconds.

        Raises:
            Unreachable, Unavailable: The service did not respond for more than 60 seconds.
        """
        yield self
        heard = time.monotonic()
        while self.state not in TERMINAL:
            headers = {"If-None-Match": self._etag, "Prefer": f"wait={LONG_POLL}"}
            try:
                response = await self._client.request("GET", self._path, headers=headers, attempts=1)
            except (Unreachable, Unavailable):
                if time.monotonic() - heard > PATIENCE:
                    raise
                await async_sleep(1.0)
                continue
            heard = time.monotonic()
            if response.status_code != 304:
                self._take(response)
                yield self

    async def wait(self, timeout: float | None = None, on_progress: Callable[[Self], object] | None = None) -> Self:
        """Wait until the job succeeds; ``on_progress`` is called with the job after every change.

        Raises:
            JobFailed: The job failed.
            JobCancelled: The job was cancelled.
            WaitTimeout: ``timeout`` seconds have passed; the job continues.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        async for _ in self.changes():
            if on_progress is not None:
                on_progress(self)
            if deadline is not None and time.monotonic() > deadline and self.state not in TERMINAL:
                raise WaitTimeout(f"Job {self.id} is still {self.state} after {timeout:g} s.")
        if self.state == State.FAILED:
            raise JobFailed(self.id, self.view.error)
        if self.state == State.CANCELLED:
            raise JobCancelled(f"Job {self.id} was cancelled.")
        return self

    async def cancel(self) -> Self:
        """Cancel the job for good."""
        return await self._ask("cancel")

    async def pause(self) -> Self:
        """Pause the job at the end of its current step."""
        return await self._ask("pause")

    async def resume(self) -> Self:
        """Resume the job after a pause."""
        return await self._ask("resume")

    async def retry(self) -> Self:
        """Queue the job again, from its last completed step."""
        return await self._ask("retry")

    async def derive(self, *, idempotency_key: str | None = None, **changes: Any) -> "AsyncJob":
        """Create and return a job like this job, with changes to the request's fields.

        ``None`` gives a field its default, mappings are merged field by field, and other values are replaced.
        """
        body = {"from": str(self.id), **changes}
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return AsyncJob(self._client, await self._client.request("POST", "/v1/jobs", json=body, headers=headers))

    async def _ask(self, what: str) -> Self:
        self._take(await self._client.request("POST", f"{self._path}/{what}"))
        return self

    async def label(self, labels: Mapping[str, str], *, if_unchanged: bool = False) -> Self:
        """Replace the labels of the job; with ``if_unchanged``, only if the job is as this object shows it.

        Raises:
            ApiError: The job has changed (``job_changed``).
        """
        headers = {"If-Match": self._etag} if if_unchanged else {}
        self._take(await self._client.request("PATCH", self._path, json={"labels": dict(labels)}, headers=headers))
        return self

    async def delete(self) -> None:
        """Delete a job that has ended, with its files; a published model stays in its repository."""
        await self._client.request("DELETE", self._path)

    async def events(self) -> AsyncIterator[EventView]:
        """Yield the events of the job so far, oldest first."""
        parameters: dict[str, Any] = {"page_size": 100}
        while True:
            response = await self._client.request("GET", f"{self._path}/events", params=parameters)
            page = EventPage.model_validate(response.json())
            for item in page.items:
                yield item
            if page.next_page_token is None:
                return
            parameters["page_token"] = page.next_page_token

    async def stream(self, after: int = 0) -> AsyncIterator[Frame]:
        """Yield the events after the id ``after`` as they happen, the progress between events, and ``end``.

        The client opens a broken connection again.

        Raises:
            Unauthorized: The API key was revoked during the stream.
            Unreachable: The connection broke again and again.
        """
        failures = 0
        while True:
            try:
                async with self._client.stream(
                    f"{self._path}/events/stream", {"Last-Event-ID": str(after)}
                ) as response:
                    if response.status_code >= 400:
                        await response.aread()
                        if response.status_code not in (429, 503):
                            raise error_of(response)
                    else:
                        frames = Frames()
                        async for line in response.aiter_lines():
                            frame = frames.take(line)
                            if frame is None:
                                continue
                            failures = 0
                            after = frame.id or after
                            if frame.event == "end" and frame.data.get("code") == "unauthorized":
                                raise Unauthorized(401, frame.data)
                            yield frame
                            if frame.event == "end":
                                return
            except httpx2.TransportError as error:
                if failures >= ATTEMPTS:
                    raise Unreachable(f"The service at {self._client.url} cannot be reached: {error}") from error
            failures += 1
            await async_sleep(pause(failures, None))

    async def logs(self, follow: bool = False) -> AsyncIterator[LogLineView]:
        """Yield the newest lines that the job's processes wrote on their worker, oldest first.

        With ``follow``, new lines are yielded as they come, until the job ends.
        """
        parameters: dict[str, Any] = {"page_size": 100}
        while True:
            response = await self._client.request("GET", f"{self._path}/logs", params=parameters)
            page = LogPage.model_validate(response.json())
            for item in page.items:
                yield item
            if page.next_page_token is None:
                return
            parameters["page_token"] = page.next_page_token
            if "Retry-After" in response.headers:  # these are all lines so far
                if not follow:
                    return
                await async_sleep(float(response.headers["Retry-After"]))

    async def steps(self) -> list[StepView]:
        """Return the completed steps of the job."""
        return StepList.model_validate((await self._client.request("GET", f"{self._path}/steps")).json()).items

    async def metrics(self) -> list[StepMetrics]:
        """Return the figures of the completed steps of the job, one flat row for each step."""
        return MetricsList.model_validate((await self._client.request("GET", f"{self._path}/metrics")).json()).items

    async def publish_step(self, number: int, *, idempotency_key: str | None = None, **rest: Any) -> Self:
        """Create a job that publishes the model of a completed step of this job, which has ended.

        ``rest`` are the fields of :class:`secateur.catalog.request.StepPublication`.

        Raises:
            ApiError: The step has no checkpoint (``step_not_kept``); the message names the steps that have one.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        path = f"{self._path}/steps/{number}/publish"
        return type(self)(self._client, await self._client.request("POST", path, json=rest, headers=headers))

    async def recipe(self) -> dict[str, Any]:
        """Return the fields of the job's request that differ from their defaults.

        A job that is created with these fields makes the same model.
        """
        found: dict[str, Any] = (await self._client.request("GET", f"{self._path}/recipe")).json()
        return found

    async def report(self) -> Report:
        """Return the report of a job with one target ratio.

        Raises:
            ValueError: The job has several target ratios; :meth:`reports` returns their reports.
        """
        found = await self.reports()
        if len(found) != 1:
            raise ValueError(f"this job has {len(found)} targets: ask for reports()")
        return found[0]

    async def reports(self) -> list[Report]:
        """Return the report of each target ratio."""
        found = (await self._client.request("GET", f"{self._path}/report")).json()
        return [Report(each) for each in found.get("targets", [found])]

    async def artifacts(self) -> list[Artifact]:
        """Return the files of the pruned model; there are none before the model is written and checked."""
        return ArtifactList.model_validate((await self._client.request("GET", f"{self._path}/artifacts")).json()).items

    async def download(self, folder: Path | str) -> Path:
        """Download the files of the pruned model to ``folder``, and return the folder.

        The download continues files that an earlier, broken download left in the folder.

        Raises:
            Unreachable: The connection broke again and again.
        """
        root = Path(folder)
        for artifact in await self.artifacts():
            await self._fetch(artifact, root / artifact.name)
        return root

    async def _fetch(self, artifact: Artifact, target: Path) -> None:
        if target.exists() and target.stat().st_size == artifact.size:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        part.touch()
        for attempt in range(1, ATTEMPTS + 1):
            have = part.stat().st_size
            if have == artifact.size:
                break
            try:
                async with self._client.stream(artifact.url, {"Range": f"bytes={have}-"}) as response:
                    if response.status_code >= 400:
                        await response.aread()
                        raise error_of(response)
                    with part.open("r+b" if response.status_code == 206 else "wb") as file:
                        file.seek(0, os.SEEK_END)
                        async for chunk in response.aiter_bytes(CHUNK):
                            file.write(chunk)
            except httpx2.TransportError:
                await async_sleep(pause(attempt, None))
        if part.stat().st_size != artifact.size:
            raise Unreachable(f"{artifact.name}: {part.stat().st_size} of {artifact.size} bytes came.")
        part.replace(target)


class AsyncDatasets:
    """The operations of ``/v1/datasets``."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def upload(self, content: Path | str, *, name: str | None = None) -> DatasetView:
        """Upload a data set; a job names it as ``f"upload:{id}"``.

        ``content`` is a text, or the path (:class:`pathlib.Path`) of a UTF-8 text file or, with the suffix ``.jsonl`` or
        ``.ndjson``, of a file of JSON Lines. ``name`` defaults to the name of the file. The upload is sent once, because
        repeating it could make two data sets.

        Raises:
            ValueError: A text has no name.
            ApiError: The service refused the data set; ``text_invalid`` names the line at fault.
        """
        if name is None:
            if isinstance(content, str):
                raise ValueError("A text needs a name.")
            name = content.name
        lines = isinstance(content, Path) and content.suffix in JSON_LINES
        headers = {"Content-Type": "application/x-ndjson" if lines else "text/plain; charset=utf-8"}
        body: Any = content.encode() if isinstance(content, str) else _pieces(content)
        if isinstance(content, Path):
            headers["Content-Length"] = str(content.stat().st_size)
        response = await self._client.request(
            "POST",
            "/v1/datasets",
            repeat=False,
            params={"name": name},
            headers=headers,
            content=body,
            timeout=UPLOAD_TIMEOUT,
        )
        return DatasetView.model_validate(response.json())

    async def get(self, dataset_id: uuid.UUID | str) -> DatasetView:
        """Return a data set of this API key, without its content; with the scope ``admin``, of any API key."""
        return DatasetView.model_validate((await self._client.request("GET", f"/v1/datasets/{dataset_id}")).json())

    async def list(self, *, key_id: uuid.UUID | str | None = None, page_size: int = 100) -> AsyncIterator[DatasetView]:
        """Yield the data sets of this API key, newest first; each page is requested when it is needed.

        With the scope ``admin``, ``key_id`` is another API key, or ``"all"``.
        """
        parameters = _given(page_size=page_size, key_id=key_id and str(key_id))
        while True:
            response = await self._client.request("GET", "/v1/datasets", params=parameters)
            page = DatasetPage.model_validate(response.json())
            for item in page.items:
                yield item
            if page.next_page_token is None:
                return
            parameters["page_token"] = page.next_page_token

    async def delete(self, dataset_id: uuid.UUID | str) -> None:
        """Delete a data set that no job names that has not ended."""
        await self._client.request("DELETE", f"/v1/datasets/{dataset_id}")


class AsyncKeys:
    """The operations of ``/v1/keys``, for API keys with the scope ``admin``."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> Sequence[KeyView]:
        """Return all API keys, oldest first."""
        return KeyList.model_validate((await self._client.request("GET", "/v1/keys")).json()).items

    async def create(self, name: str, scopes: Sequence[Scope | str] | None = None, **settings: Any) -> KeyWithSecret:
        """Create an API key; the service shows the key's secret only in this response.

        ``settings`` are the fields of :class:`secateur.contract.keys.KeySettings`.
        """
        body = _given(name=name, scopes=None if scopes is None else [str(scope) for scope in scopes]) | settings
        return KeyWithSecret.model_validate(
            (await self._client.request("POST", "/v1/keys", json=body, repeat=False)).json()
        )

    async def change(self, key_id: uuid.UUID | str, **settings: Any) -> KeyView:
        """Change the settings of an API key, the fields of :class:`secateur.contract.keys.KeySettings`.

        A field that is left out keeps its value; ``None`` gives the field its default.
        """
        return KeyView.model_validate((await self._client.request("PATCH", f"/v1/keys/{key_id}", json=settings)).json())

    async def rotate(self, key_id: uuid.UUID | str, grace_seconds: float | None = None) -> KeyWithSecret:
        """Give an API key another secret; the previous secret stays valid for ``grace_seconds``."""
        body = _given(grace_seconds=grace_seconds)
        response = await self._client.request("POST", f"/v1/keys/{key_id}/rotate", json=body, repeat=False)
        return KeyWithSecret.model_validate(response.json())

    async def hub_token(self, key_id: uuid.UUID | str, hub_token: str | None) -> None:
        """Set the Hub token of the API key's jobs; ``None`` removes the token."""
        await self._client.request("PUT", f"/v1/keys/{key_id}/hub-token", json={"hub_token": hub_token})

    async def revoke(self, key_id: uuid.UUID | str, *, cancel_jobs: bool = False) -> None:
        """Revoke an API key for good; with ``cancel_jobs``, also cancel the key's jobs that have not ended."""
        parameters = {"cancel_jobs": "true"} if cancel_jobs else {}
        await self._client.request("DELETE", f"/v1/keys/{key_id}", params=parameters)


class AsyncWorkers:
    """The operations of ``/v1/workers``, for API keys with the scope ``admin``."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> Sequence[WorkerView]:
        """Return the workers, sorted by name."""
        return WorkerList.model_validate((await self._client.request("GET", "/v1/workers")).json()).items

    async def drain(self, name: str, *, now: bool = False) -> None:
        """Let a worker take no new job; with ``now``, it also releases its job at the end of the step."""
        await self._client.request("POST", f"/v1/workers/{name}/drain", json={"now": now})

    async def resume(self, name: str) -> None:
        """Let a drained worker take jobs again."""
        await self._client.request("POST", f"/v1/workers/{name}/resume")


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    """Yield the content of a file."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def _given(**fields: Any) -> dict[str, Any]:
    """Return the fields that are not ``None``; the service has defaults for the other fields."""
    return {name: value for name, value in fields.items() if value is not None}
