"""The synchronous client, made from the asynchronous one: ``make client``. Not to be edited."""

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
from secateur.contract.catalog import Inspection, MethodList
from secateur.contract.jobs import (
    Artifact,
    ArtifactList,
    DryRun,
    EventPage,
    EventView,
    JobPage,
    JobSummary,
    JobView,
    Progress,
    StepList,
    StepView,
)
from secateur.contract.keys import KeyList, KeyView, KeyWithSecret, Scope
from secateur.contract.states import TERMINAL, State

DEFAULT_URL = "http://127.0.0.1:8000"
LONG_POLL = 20
"""Seconds that the service holds an answer back for a change."""
TIMEOUT = 30.0
PATIENCE = 60.0
"""Seconds for which watching a job bridges a service that went away."""
CHUNK = 2**20


class Client:
    """The service at ``url`` (``SECATEUR_URL``), as the API key ``api_key`` (``SECATEUR_API_KEY``); a context manager.

    Requests that may be repeated are, after connection errors, 429 and 503: with growing pauses, or what ``Retry-After`` says.

    Raises:
        ValueError: there is no API key, or it has characters that none has.
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
        self.keys = Keys(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def methods(self) -> MethodList:
        """The pruning methods, and what their parts can be replaced by."""
        return MethodList.model_validate((self.request("GET", "/v1/methods")).json())

    def inspect(
        self, model_id: str, *, revision: str | None = None, gguf_file: str | None = None, hub_token: str | None = None
    ) -> Inspection:
        """What a model is made of, and what can be made of it."""
        body = _given(model_id=model_id, revision=revision, gguf_file=gguf_file, hub_token=hub_token)
        return Inspection.model_validate((self.request("POST", "/v1/models/inspect", json=body)).json())

    def request(
        self, method: str, path: str, *, repeat: bool = True, attempts: int = ATTEMPTS, **options: Any
    ) -> httpx2.Response:
        """The response to a request that was not refused.

        Raises:
            ApiError: see :mod:`secateur.client.errors`.
            Unreachable: there was no connection.
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
        """An open response, as a context manager."""
        return self._http.stream("GET", path, headers=headers)


class Jobs:
    """``/v1/jobs``."""

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
        """Make a job; ``rest`` are the request's other fields, as the API has them. Safe to repeat by its idempotency key."""
        body = _given(model_id=model_id, method=method, target_ratio=target_ratio, rounds=rounds) | rest
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return Job(self._client, self._client.request("POST", "/v1/jobs", json=body, headers=headers))

    def dry_run(self, **request: Any) -> DryRun:
        """What :meth:`create` would do with the same fields; nothing is made."""
        body = _given(**request)
        response = self._client.request("POST", "/v1/jobs", params={"validate_only": "true"}, json=body)
        return DryRun.model_validate(response.json())

    def get(self, job_id: uuid.UUID | str) -> "Job":
        """A job of this API key."""
        return Job(self._client, self._client.request("GET", f"/v1/jobs/{job_id}"))

    def list(
        self,
        *,
        state: Sequence[State | str] = (),
        method: str | None = None,
        model_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        page_size: int = 100,
    ) -> Iterator[JobSummary]:
        """The jobs of this API key, newest first, page by page as they are asked for."""
        parameters = _given(method=method, model_id=model_id, page_size=page_size, state=[str(each) for each in state])
        parameters |= {f"label.{name}": value for name, value in (labels or {}).items()}
        while True:
            page = JobPage.model_validate((self._client.request("GET", "/v1/jobs", params=parameters)).json())
            for item in page.items:
                yield item
            if page.next_page_token is None:
                return
            parameters["page_token"] = page.next_page_token


class Job:
    """One job, as it was when it was last looked at: ``view`` has all of it."""

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
        """Look again."""
        self._take(self._client.request("GET", self._path))
        return self

    def changes(self) -> Iterator[Self]:
        """The job now, and after every change, to its end. A service that goes away meanwhile is waited for, a minute long."""
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
        """Wait for its success; ``on_progress`` is called with the job after every change.

        Raises:
            JobFailed, JobCancelled: it has ended otherwise.
            WaitTimeout: ``timeout`` seconds have passed; it goes on.
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
        """Stop it for good."""
        return self._ask("cancel")

    def pause(self) -> Self:
        """Stop it at the end of its step."""
        return self._ask("pause")

    def resume(self) -> Self:
        """Go on after a pause."""
        return self._ask("resume")

    def retry(self) -> Self:
        """Queue it again, from its last completed step."""
        return self._ask("retry")

    def _ask(self, what: str) -> Self:
        self._take(self._client.request("POST", f"{self._path}/{what}"))
        return self

    def delete(self) -> None:
        """Delete it with its files, when it has ended; what was published stays."""
        self._client.request("DELETE", self._path)

    def events(self) -> Iterator[EventView]:
        """What has happened so far, oldest first."""
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
        """Events as they happen from the one after ``after`` on, progress in between, and ``end``. Broken lines are taken up again.

        Raises:
            Unauthorized: the API key was revoked meanwhile.
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

    def steps(self) -> list[StepView]:
        """The completed steps."""
        return StepList.model_validate((self._client.request("GET", f"{self._path}/steps")).json()).items

    def recipe(self) -> dict[str, Any]:
        """The fields of the job's request that differ from their defaults: a job created with them makes the same model."""
        found: dict[str, Any] = (self._client.request("GET", f"{self._path}/recipe")).json()
        return found

    def report(self) -> Report:
        """The report of a job with one target.

        Raises:
            ValueError: it has several, see :meth:`reports`.
        """
        found = self.reports()
        if len(found) != 1:
            raise ValueError(f"this job has {len(found)} targets: ask for reports()")
        return found[0]

    def reports(self) -> list[Report]:
        """The report of each target."""
        found = (self._client.request("GET", f"{self._path}/report")).json()
        return [Report(each) for each in found.get("targets", [found])]

    def artifacts(self) -> list[Artifact]:
        """The files of the pruned model; none before the job has succeeded."""
        return ArtifactList.model_validate((self._client.request("GET", f"{self._path}/artifacts")).json()).items

    def download(self, folder: Path | str) -> Path:
        """The files of the pruned model, in ``folder``. What a broken download left there is gone on with.

        Raises:
            Unreachable: the connection broke again and again.
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


class Keys:
    """``/v1/keys``, for keys of scope ``admin``."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> Sequence[KeyView]:
        """All keys, oldest first."""
        return KeyList.model_validate((self._client.request("GET", "/v1/keys")).json()).items

    def create(self, name: str, scopes: Sequence[Scope | str] | None = None) -> KeyWithSecret:
        """Make a key; its secret cannot be had again."""
        body = _given(name=name, scopes=None if scopes is None else [str(scope) for scope in scopes])
        return KeyWithSecret.model_validate((self._client.request("POST", "/v1/keys", json=body, repeat=False)).json())

    def rotate(self, key_id: uuid.UUID | str, grace_seconds: float | None = None) -> KeyWithSecret:
        """Another secret for the same key; the one it had serves for the grace."""
        body = _given(grace_seconds=grace_seconds)
        response = self._client.request("POST", f"/v1/keys/{key_id}/rotate", json=body, repeat=False)
        return KeyWithSecret.model_validate(response.json())

    def hub_token(self, key_id: uuid.UUID | str, hub_token: str | None) -> None:
        """The Hub token of the key's jobs; ``None`` takes it away."""
        self._client.request("PUT", f"/v1/keys/{key_id}/hub-token", json={"hub_token": hub_token})

    def revoke(self, key_id: uuid.UUID | str) -> None:
        """Revoke a key for good."""
        self._client.request("DELETE", f"/v1/keys/{key_id}")


def _given(**fields: Any) -> dict[str, Any]:
    """What is not ``None``: the service has defaults for the rest."""
    return {name: value for name, value in fields.items() if value is not None}
