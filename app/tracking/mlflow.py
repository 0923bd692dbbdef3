"""The REST API of an MLflow tracking server (mlflow.org/docs/latest/rest-api.html), as far as runs need it."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx2

TIMEOUT = 5.0
"""Seconds that one request may wait for the server."""
LONGEST_VALUE = 5000
"""Largest number of bytes of a tag's value; a parameter's value may have 6000."""
PARAMS, TAGS, METRICS = 100, 100, 1000
"""Largest numbers of parameters, tags and metrics in one request."""
PASSING = (401, 403, 408, 429)
"""Statuses below 500 whose cause is not in the request: it passes, or the operator removes it."""


class MlflowUnavailable(Exception):
    """No MLflow server answers at this address, or it cannot take the request at this moment."""


class MlflowRefused(Exception):
    """MLflow refuses the request, and would refuse it again; ``code`` is MLflow's error code."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Mlflow:
    """A client of the tracking server at ``uri``. User and password of the URI are sent with HTTP Basic authentication.

    Each method raises :class:`MlflowUnavailable` or :class:`MlflowRefused` if the server does not do what it asks.
    """

    def __init__(self, uri: str) -> None:
        url = httpx2.URL(f"{uri}/api/2.0/mlflow")
        auth = (url.username, url.password) if url.userinfo else None
        self._client = httpx2.Client(base_url=url.copy_with(userinfo=b""), auth=auth, timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def experiment(self, name: str) -> str:
        """Return the id of the experiment, which is created if it does not exist."""
        try:
            found = self._ask("GET", "experiments/get-by-name", params={"experiment_name": name})
        except MlflowRefused as refused:
            if refused.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return str(self._ask("POST", "experiments/create", json={"name": name})["experiment_id"])
        return str(found["experiment"]["experiment_id"])

    def find_run(self, experiment: str, tag: str, value: str) -> str | None:
        """Return the id of a run of the experiment whose ``tag`` has ``value``, or ``None``."""
        wanted = {"experiment_ids": [experiment], "filter": f"tags.`{tag}` = '{value}'", "max_results": 1}
        runs = self._ask("POST", "runs/search", json=wanted).get("runs", [])
        return str(runs[0]["info"]["run_id"]) if runs else None

    def create_run(self, experiment: str, name: str, start_time: int, tags: Mapping[str, str]) -> str:
        """Create a run that began at ``start_time`` (milliseconds since 1970), and return its id."""
        run = {"experiment_id": experiment, "run_name": name, "start_time": start_time, "tags": _pairs(tags)}
        return str(self._ask("POST", "runs/create", json=run)["run"]["info"]["run_id"])

    def update_run(self, run_id: str, status: str, end_time: int | None) -> None:
        """Set the status of a run, and the time at which it ended (milliseconds since 1970)."""
        ended = {} if end_time is None else {"end_time": end_time}
        self._ask("POST", "runs/update", json={"run_id": run_id, "status": status, **ended})

    def log(
        self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str], metrics: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add parameters, tags and metrics {key, value, timestamp, step} to a run; adding the same again changes nothing.

        Values that are longer than MLflow accepts are cut.
        """
        for part, items, most in (
            ("params", _pairs(params), PARAMS),
            ("tags", _pairs(tags), TAGS),
            ("metrics", metrics, METRICS),
        ):
            for start in range(0, len(items), most):
                self._ask("POST", "runs/log-batch", json={"run_id": run_id, part: items[start : start + most]})

    def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, **request)
        except httpx2.HTTPError as error:
            raise MlflowUnavailable(f"{path}: {type(error).__name__}: {error}") from None
        try:
            content: dict[str, Any] = answer.json()
            code = content.get("error_code")
        except (ValueError, AttributeError):
            raise MlflowUnavailable(f"{path}: status {answer.status_code}, and the answer is not MLflow's") from None
        if answer.is_success:
            return content
        message = f"{path}: status {answer.status_code}: {answer.text[:300]}"
        if code is None or answer.is_server_error or answer.status_code in PASSING:
            raise MlflowUnavailable(message)
        raise MlflowRefused(message, code)


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the values as MLflow's lists of {key, value}."""
    return [{"key": key, "value": _cut(value)} for key, value in values.items()]


def _cut(value: str) -> str:
    encoded = value.encode()
    if len(encoded) <= LONGEST_VALUE:
        return value
    return encoded[: LONGEST_VALUE - 3].decode(errors="ignore") + "…"
