"""The commands that speak to a service over HTTP: submit, status, watch, cancel."""

import datetime as dt
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.common import FAILED, REFUSED, UNREACHABLE, JobId, Json, stop

if TYPE_CHECKING:
    from secateur.client import Client, Job
    from secateur.contract.jobs import JobView

ENDED = {"succeeded": 0, "failed": FAILED, "cancelled": FAILED}
DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="SECATEUR_URL", help="The service's address.")]
ApiKey = Annotated[str, typer.Option("--api-key", envvar="SECATEUR_API_KEY", help="From 'secateur keys create'.")]
RecoveryKind = Annotated[str | None, typer.Option("--recovery", help="See GET /v1/methods; unset: the method's own.")]


@contextmanager
def _connect(url: str, api_key: str) -> Iterator["Client"]:
    """The service's client; what goes wrong with it ends the command."""
    from secateur.client import ApiError, Client, Unavailable, Unreachable

    if not api_key:
        raise stop("no API key: set SECATEUR_API_KEY or --api-key", REFUSED)
    try:
        with Client(url, api_key) as client:
            yield client
    except Unreachable as error:
        raise stop(str(error), UNREACHABLE) from None
    except ApiError as error:
        reason = str(error)
        for field in error.errors:
            if field.allowed is not None:
                reason += f"\n  {field.field}: allowed: {field.allowed}"
        raise stop(reason, UNREACHABLE if isinstance(error, Unavailable) else REFUSED) from None
    except ValueError as error:
        raise stop(str(error), REFUSED) from None


def submit(
    model: Annotated[str | None, typer.Argument(help="A Hub id or local:NAME.")] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share of the blocks' weights to remove, 0 to 0.9; several make a model each."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="A method of GET /v1/methods.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Pruning rounds.")] = None,
    recovery: RecoveryKind = None,
    repo_id: Annotated[
        str | None, typer.Option(help="Repository to publish to; of several ratios, the start of each one's name.")
    ] = None,
    request: Annotated[
        Path | None, typer.Option(help="A JSON file with more of the request; '-' is standard input.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: Json = False,
) -> None:
    """Post a job and print its id."""
    body = _read_request(request)
    given = {"model_id": model, "target_ratio": one_or_several(ratio), "method": method, "rounds": rounds}
    body |= {name: value for name, value in given.items() if value is not None}
    if recovery is not None:
        body["recovery"] = {**(body.get("recovery") or {}), "kind": recovery}
    if repo_id is not None:
        body["publish"] = {"repo_id": repo_id}
    for name in ("model_id", "method"):
        body.setdefault(name, None)  # which the service refuses, and says why
    with _connect(url, api_key) as client:
        job = client.jobs.create(**body)
    typer.echo(job.view.model_dump_json() if as_json else str(job.id))


def one_or_several(ratios: list[float] | None) -> float | list[float] | None:
    """``target_ratio`` as a request has it, from all the ``--ratio`` options."""
    return ratios[0] if ratios and len(ratios) == 1 else ratios or None


def _read_request(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        body = json.loads(sys.stdin.read() if str(path) == "-" else path.read_text())
    except (OSError, ValueError) as error:
        raise stop(f"{path} cannot be read: {error}", REFUSED) from None
    if not isinstance(body, dict):
        raise stop(f"{path} does not hold a JSON object.", REFUSED)
    return body


def status(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Show a job."""
    with _connect(url, api_key) as client:
        job = client.jobs.get(job_id).view
    typer.echo(job.model_dump_json() if as_json else _line(job))
    raise typer.Exit(ENDED.get(job.state, 0))


def cancel(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Cancel a job."""
    with _connect(url, api_key) as client:
        job = client.jobs.get(job_id).cancel().view
    typer.echo(job.model_dump_json() if as_json else _line(job))


def watch(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Follow a job to its end: a bar on a terminal, else a line (or with --json an object) for each step."""
    with _connect(url, api_key) as client:
        job = client.jobs.get(job_id)
        if sys.stdout.isatty() and not as_json:
            _watch_bar(job)
            typer.echo(_line(job.view))
        else:
            _watch_lines(job, as_json)
    raise typer.Exit(ENDED[job.state])


def _watch_lines(job: "Job", as_json: bool) -> None:
    """A line when state, stage or round changes, and at every tenth of the way."""
    shown: tuple[object, ...] = ()
    for _ in job.changes():
        progress = job.progress
        step = (job.state, *((progress.stage, progress.round, int(progress.share * 10)) if progress else ()))
        if step != shown:
            typer.echo(job.view.model_dump_json() if as_json else _line(job.view))
        shown = step


def _watch_bar(job: "Job") -> None:
    from rich.console import Console

    from secateur.cli.terminal_progress import TerminalProgress

    with TerminalProgress(Console()) as bars:
        for _ in job.changes():
            if job.progress is not None:
                bars.show(job.progress.model_dump(), _seconds_left(job.view))


def _where(job: "JobView") -> str:
    progress = job.progress
    if progress is None or job.state in ENDED:
        return str(job.state)
    return f"{job.state}  {progress.stage}  round {progress.round}/{progress.rounds}"


def _seconds_left(job: "JobView") -> float | None:
    finish = job.progress.estimated_finish_at if job.progress else None
    if finish is None or job.state in ENDED:
        return None
    return (finish - dt.datetime.now(dt.UTC)).total_seconds()


def _time_left(job: "JobView") -> str:
    from secateur.cli.terminal_progress import clock

    seconds = _seconds_left(job)
    return "" if seconds is None else f"{clock(seconds)} left"


def _line(job: "JobView") -> str:
    """A job in one line."""
    parts = [str(job.id), _where(job)]
    if job.progress and job.state not in ENDED:
        parts += [f"{job.progress.share:.0%}", _time_left(job)]
    if job.error:
        parts.append(f"{job.error.message} ({job.error.code})")
    results = (job.result or {}).get("targets") or [job.result or {}]
    if published := [result["repo_id"] for result in results if "repo_id" in result]:
        parts.append(f"published to {', '.join(published)}")
    return "  ".join(part for part in parts if part)
