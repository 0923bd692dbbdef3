"""The synchronous client, made from the asynchronous one: ``make client``. Not to be edited."""

import datetime as dt
import os
import re
import time
import uuid
from collections.abc import Iterator, Callable, Mapping, Sequence
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
from secateur.client.pauses import ATTEMPTS, sleep, pause
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


class Client:
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
            self._http = httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=timeout)
        except httpx2.InvalidURL as error:
            raise Unreachable(f"The service at {self.url} cannot be reached: {error}") from error
        self.jobs = Jobs(self)
        self.datasets = Datasets(self)
        self.keys = Keys(self)
        self.workers = Workers(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def methods(self) -> MethodList:
        """Return the pruning methods, and the kinds of component that can replace those of a method."""
        return MethodList.model_validate((self.request("GET", "/v1/methods")).json())

    def models(self) -> Sequence[str]:
        """Return the models of the service's models folder, as ``model_id`` names them."""
        return NameList.model_validate((self.request("GET", "/v1/models")).json()).items

    def texts(self) -> Sequence[str]:
        """Return the texts of the service's texts folder, as ``dataset`` names them."""
        return NameList.model_validate((self.request("GET", "/v1/texts")).json()).items

    def tasks(self) -> Sequence[str]:
        """Return the zero-shot tasks of the service, as ``evaluation.zero_shot`` names them."""
        return NameList.model_validate((self.request("GET", "/v1/tasks")).json()).items

    def usage(self, *, key_id: uuid.UUID | str | None = None, since: dt.date | None = None) -> Sequence[DayOfUsage]:
        """Return what this API key used by day (UTC), newest day first; ``since`` defaults to 29 days ago.

        With the scope ``admin``, ``key_id`` is another API key, or ``"all"``.
        """
        parameters = _given(key_id=key_id and str(key_id), since=since and since.isoformat())
        return UsageList.model_validate((self.request("GET", "/v1/usage", params=parameters)).json()).items

    def inspect(
        self, model_id: str, *, revision: str | None = None, gguf_file: str | None = None, hub_token: str | None = None
    ) -> Inspection:
        """Return a model's sizes, and the sizes and layouts that the pruned model can have."""
        body = _given(model_id=model_id, revision=revision, gguf_file=gguf_file, hub_token=hub_token)
        return Inspection.model_validate((self.request("POST", "/v1/models/inspect", json=body)).json())

    def request(
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
                response = self._http.request(method, path, **options)
            except httpx2.TransportError as error:
                if not repeat or attempt >= attempts:
                    raise Unreachable(f"The service at {self.url} cannot be reached: {error}") from error
            except httpx2.InvalidURL as error:
                raise Unreachable(f"The service at {self.url} cannot be reached: {error}") from error
            if response is not None and response.status_code < 400:
                return response
            if response is not None and (response.status_code not in (429, 503) or not repeat or attempt >= attempts):
                raise error_of(response)
            sleep(pause(attempt, response))

    def stream(self, path: str, headers: Mapping[str, str]) -> Any:
        """Return an open response to a GET request, as a context manager.

        A redirect to the object store is followed; the API key is sent to the service alone.
        """
        return self._http.stream("GET", path, headers=headers, follow_redirects=True)


class Jobs:
    """The operations of ``/v1/jobs``."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self,
        *,
        model_id: str | None,
        method: str | None,
        target_ratio: float | Sequence[float] | None = None,
        rounds: int | None = None,
        idempotency_key: str | None = None,
        **rest: Any,
    ) -> "Job":
        """Create a job; ``rest`` are the request's other fields, as the API names them.

        The request is safe to repeat because it carries an idempotency key.
        """
        body = _given(model_id=model_id, method=method, target_ratio=target_ratio, rounds=rounds) | rest
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return Job(self._client, self._client.request("POST", "/v1/jobs", json=body, headers=headers))

    def dry_run(self, **request: Any) -> DryRun:
        """Return what :meth:`create` would do with the same fields; no job is created."""
        body = _given(**request)
        response = self._client.request("POST", "/v1/jobs", params={"validate_only": "true"}, json=body)
        return DryRun.model_validate(response.json())

    def get(self, job_id: uuid.UUID | str) -> "Job":
        """Return a job of this API key; with the scope ``admin``, of any API key."""
        return Job(self._client, self._client.request("GET", f"/v1/jobs/{job_id}"))

    def list(
        self,
        *,
        state: Sequence[State | str] = (),
        method: str | None = None,
        model_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        key_id: uuid.UUID | str | None = None,
        page_size: int = 100,
    ) -> Iterator[JobSummary]:
        """Yield the jobs of this API key, newest first; each page is requested when it is needed.

        With the scope ``admin``, ``key_id`` is another API key, or ``"all"``.
        """
        parameters = _given(method=method, model_id=model_id, page_size=page_size, key_id=key_id and str(key_id))
        parameters["state"] = [str(each) for each in state]
        parameters |= {f"label.{name}": value for name, value in (labels or {}).items()}
        while True:
            page = JobPage.model_validate((self._client.request("GET", "/v1/jobs", params=parameters)).json())
            for item in page.items:
                yield item
            if page.next_page_token is None:
                return
            parameters["page_token"] = page.next_page_token


class Job:
    """A job as the service last described it; ``view`` has all of its fields."""

    def __init__(self, client: Client, response: httpx2.Response) -> None:
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

    def refresh(self) -> Self:
        """Request the job again, and return it with its current fields."""
        self._take(self._client.request("GET", self._path))
        return self

    def changes(self) -> Iterator[Self]:
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
                response = self._client.request("GET", self._path, headers=headers, attempts=1)
            except (Unreachable, Unavailable):
                if time.monotonic() - heard > PATIENCE:
                    raise
                sleep(1.0)
                continue
            heard = time.monotonic()
            if response.status_code != 304:
                self._take(response)
                yield self

    def wait(self, timeout: float | None = None, on_progress: Callable[[Self], object] | None = None) -> Self:
        """Wait until the job succeeds; ``on_progress`` is called with the job after every change.

        Raises:
            JobFailed: The job failed.
            JobCancelled: The job was cancelled.
            WaitTimeout: ``timeout`` seconds have passed; the job continues.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for _ in self.changes():
            if on_progress is not None:
                on_progress(self)
            if deadline is not None and time.monotonic() > deadline and self.state not in TERMINAL:
                raise WaitTimeout(f"Job {self.id} is still {self.state} after {timeout:g} s.")
        if self.state == State.FAILED:
            raise JobFailed(self.id, self.view.error)
        if self.state == State.CANCELLED:
            raise JobCancelled(f"Job {self.id} was cancelled.")
        return self

    def cancel(self) -> Self:
        """Cancel the job for good."""
        return self._ask("cancel")

    def pause(self) -> Self:
        """Pause the job at the end of its current step."""
        return self._ask("pause")

    def resume(self) -> Self:
        """Resume the job after a pause."""
        return self._ask("resume")

    def retry(self) -> Self:
        """Queue the job again, from its last completed step."""
        return self._ask("retry")

    def derive(self, *, idempotency_key: str | None = None, **changes: Any) -> "Job":
        """Create and return a job like this job, with changes to the request's fields.

        ``None`` gives a field its default, mappings are merged field by field, and other values are replaced.
        """
        body = {"from": str(self.id), **changes}
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return Job(self._client, self._client.request("POST", "/v1/jobs", json=body, headers=headers))

    def _ask(self, what: str) -> Self:
        self._take(self._client.request("POST", f"{self._path}/{what}"))
        return self

    def label(self, labels: Mapping[str, str], *, if_unchanged: bool = False) -> Self:
        """Replace the labels of the job; with ``if_unchanged``, only if the job is as this object shows it.

        Raises:
            ApiError: The job has changed (``job_changed``).
        """
        headers = {"If-Match": self._etag} if if_unchanged else {}
        self._take(self._client.request("PATCH", self._path, json={"labels": dict(labels)}, headers=headers))
        return self

    def delete(self) -> None:
        """Delete a job that has ended, with its files; a published model stays in its repository."""
        self._client.request("DELETE", self._path)

    def events(self) -> Iterator[EventView]:
        """Yield the events of the job so far, oldest first."""
        parameters: dict[str, Any] = {"page_size": 100}
        while True:
            response = self._client.request("GET", f"{self._path}/events", params=parameters)
            page = EventPage.model_validate(response.json())
            for item in page.items:
                yield item
            if page.next_page_token is None:
                return
            parameters["page_token"] = page.next_page_token

    def stream(self, after: int = 0) -> Iterator[Frame]:
        """Yield the events after the id ``after`` as they happen, the progress between events, and ``end``.

        The client opens a broken connection again.

        Raises:
            Unauthorized: The API key was revoked during the stream.
            Unreachable: The connection broke again and again.
        """
        failures = 0
        while True:
            try:
                with self._client.stream(f"{self._path}/events/stream", {"Last-Event-ID": str(after)}) as response:
                    if response.status_code >= 400:
                        response.read()
                        if response.status_code not in (429, 503):
                            raise error_of(response)
                    else:
                        frames = Frames()
                        for line in response.iter_lines():
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
            sleep(pause(failures, None))

    def logs(self, follow: bool = False) -> Iterator[LogLineView]:
        """Yield the newest lines that the job's processes wrote on their worker, oldest first.

        With ``follow``, new lines are yielded as they come, until the job ends.
        """
        parameters: dict[str, Any] = {"page_size": 100}
        while True:
            response = self._client.request("GET", f"{self._path}/logs", params=parameters)
            page = LogPage.model_validate(response.json())
            for item in page.items:
                yield item
            if page.next_page_token is None:
                return
            parameters["page_token"] = page.next_page_token
            if "Retry-After" in response.headers:  # these are all lines so far
                if not follow:
                    return
                sleep(float(response.headers["Retry-After"]))

    def steps(self) -> list[StepView]:
        """Return the completed steps of the job."""
        return StepList.model_validate((self._client.request("GET", f"{self._path}/steps")).json()).items

    def metrics(self) -> list[StepMetrics]:
        """Return the figures of the completed steps of the job, one flat row for each step."""
        return MetricsList.model_validate((self._client.request("GET", f"{self._path}/metrics")).json()).items

    def publish_step(self, number: int, *, idempotency_key: str | None = None, **rest: Any) -> Self:
        """Create a job that publishes the model of a completed step of this job, which has ended.

        ``rest`` are the fields of :class:`secateur.catalog.request.StepPublication`.

        Raises:
            ApiError: The step has no checkpoint (``step_not_kept``); the message names the steps that have one.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        path = f"{self._path}/steps/{number}/publish"
        return type(self)(self._client, self._client.request("POST", path, json=rest, headers=headers))

    def recipe(self) -> dict[str, Any]:
        """Return the fields of the job's request that differ from their defaults.

        A job that is created with these fields makes the same model.
        """
        found: dict[str, Any] = (self._client.request("GET", f"{self._path}/recipe")).json()
        return found

    def report(self) -> Report:
        """Return the report of a job with one target ratio.

        Raises:
            ValueError: The job has several target ratios; :meth:`reports` returns their reports.
        """
        found = self.reports()
        if len(found) != 1:
            raise ValueError(f"this job has {len(found)} targets: ask for reports()")
        return found[0]

    def reports(self) -> list[Report]:
        """Return the report of each target ratio."""
        found = (self._client.request("GET", f"{self._path}/report")).json()
        return [Report(each) for each in found.get("targets", [found])]

    def artifacts(self) -> list[Artifact]:
        """Return the files of the pruned model; there are none before the model is written and checked."""
        return ArtifactList.model_validate((self._client.request("GET", f"{self._path}/artifacts")).json()).items

    def download(self, folder: Path | str) -> Path:
        """Download the files of the pruned model to ``folder``, and return the folder.

        The download continues files that an earlier, broken download left in the folder.

        Raises:
            Unreachable: The connection broke again and again.
        """
        root = Path(folder)
        for artifact in self.artifacts():
            self._fetch(artifact, root / artifact.name)
        return root

    def _fetch(self, artifact: Artifact, target: Path) -> None:
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
                with self._client.stream(artifact.url, {"Range": f"bytes={have}-"}) as response:
                    if response.status_code >= 400:
                        response.read()
                        raise error_of(response)
                    with part.open("r+b" if response.status_code == 206 else "wb") as file:
                        file.seek(0, os.SEEK_END)
                        for chunk in response.iter_bytes(CHUNK):
                            file.write(chunk)
            except httpx2.TransportError:
                sleep(pause(attempt, None))
        if part.stat().st_size != artifact.size:
            raise Unreachable(f"{artifact.name}: {part.stat().st_size} of {artifact.size} bytes came.")
        part.replace(target)


class Datasets:
    """The operations of ``/v1/datasets``."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def upload(self, content: Path | str, *, name: str | None = None) -> DatasetView:
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
        response = self._client.request(
            "POST",
            "/v1/datasets",
            repeat=False,
            params={"name": name},
            headers=headers,
            content=body,
            timeout=UPLOAD_TIMEOUT,
        )
        return DatasetView.model_validate(response.json())

    def get(self, dataset_id: uuid.UUID | str) -> DatasetView:
        """Return a data set of this API key, without its content; with the scope ``admin``, of any API key."""
        return DatasetView.model_validate((self._client.request("GET", f"/v1/datasets/{dataset_id}")).json())

    def list(self, *, key_id: uuid.UUID | str | None = None, page_size: int = 100) -> Iterator[DatasetView]:
        """Yield the data sets of this API key, newest first; each page is requested when it is needed.

        With the scope ``admin``, ``key_id`` is another API key, or ``"all"``.
        """
        parameters = _given(page_size=page_size, key_id=key_id and str(key_id))
        while True:
            response = self._client.request("GET", "/v1/datasets", params=parameters)
            page = DatasetPage.model_validate(response.json())
            for item in page.items:
                yield item
            if page.next_page_token is None:
                return
            parameters["page_token"] = page.next_page_token

    def delete(self, dataset_id: uuid.UUID | str) -> None:
        """Delete a data set that no job names that has not ended."""
        self._client.request("DELETE", f"/v1/datasets/{dataset_id}")


class Keys:
    """The operations of ``/v1/keys``, for API keys with the scope ``admin``."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> Sequence[KeyView]:
        """Return all API keys, oldest first."""
        return KeyList.model_validate((self._client.request("GET", "/v1/keys")).json()).items

    def create(self, name: str, scopes: Sequence[Scope | str] | None = None, **settings: Any) -> KeyWithSecret:
        """Create an API key; the service shows the key's secret only in this response.

        ``settings`` are the fields of :class:`secateur.contract.keys.KeySettings`.
        """
        body = _given(name=name, scopes=None if scopes is None else [str(scope) for scope in scopes]) | settings
        return KeyWithSecret.model_validate((self._client.request("POST", "/v1/keys", json=body, repeat=False)).json())

    def change(self, key_id: uuid.UUID | str, **settings: Any) -> KeyView:
        """Change the settings of an API key, the fields of :class:`secateur.contract.keys.KeySettings`.

        A field that is left out keeps its value; ``None`` gives the field its default.
        """
        return KeyView.model_validate((self._client.request("PATCH", f"/v1/keys/{key_id}", json=settings)).json())

    def rotate(self, key_id: uuid.UUID | str, grace_seconds: float | None = None) -> KeyWithSecret:
        """Give an API key another secret; the previous secret stays valid for ``grace_seconds``."""
        body = _given(grace_seconds=grace_seconds)
        response = self._client.request("POST", f"/v1/keys/{key_id}/rotate", json=body, repeat=False)
        return KeyWithSecret.model_validate(response.json())

    def hub_token(self, key_id: uuid.UUID | str, hub_token: str | None) -> None:
        """Set the Hub token of the API key's jobs; ``None`` removes the token."""
        self._client.request("PUT", f"/v1/keys/{key_id}/hub-token", json={"hub_token": hub_token})

    def revoke(self, key_id: uuid.UUID | str, *, cancel_jobs: bool = False) -> None:
        """Revoke an API key for good; with ``cancel_jobs``, also cancel the key's jobs that have not ended."""
        parameters = {"cancel_jobs": "true"} if cancel_jobs else {}
        self._client.request("DELETE", f"/v1/keys/{key_id}", params=parameters)


class Workers:
    """The operations of ``/v1/workers``, for API keys with the scope ``admin``."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> Sequence[WorkerView]:
        """Return the workers, sorted by name."""
        return WorkerList.model_validate((self._client.request("GET", "/v1/workers")).json()).items

    def drain(self, name: str, *, now: bool = False) -> None:
        """Let a worker take no new job; with ``now``, it also releases its job at the end of the step."""
        self._client.request("POST", f"/v1/workers/{name}/drain", json={"now": now})

    def resume(self, name: str) -> None:
        """Let a drained worker take jobs again."""
        self._client.request("POST", f"/v1/workers/{name}/resume")


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def _given(**fields: Any) -> dict[str, Any]:
    """Return the fields that are not ``None``; the service has defaults for the other fields."""
    return {name: value for name, value in fields.items() if value is not None}
