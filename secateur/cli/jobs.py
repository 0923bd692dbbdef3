"""The commands that call a service over HTTP: for jobs, data sets and usage, and for the names that a request may use."""

import datetime as dt
import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.catalog.recipe import Recipe
from secateur.catalog.sources import UPLOAD_PREFIX
from secateur.cli.common import FAILED, REFUSED, UNREACHABLE, JobId, Json, stop
from secateur.cli.options import takes_recipe, with_method

if TYPE_CHECKING:
    from secateur.client import Client, Job
    from secateur.contract.datasets import DatasetView
    from secateur.contract.jobs import JobSummary, JobView

ENDED = {"succeeded": 0, "failed": FAILED, "cancelled": FAILED}
DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="SECATEUR_URL", help="The service's address.")]
LARGEST_PAGE = 100
COLUMNS = {
    "step": "step", "kind": "kind", "target": "target_ratio", "reached": "reached_ratio", "loss": "loss",
    "perplexity": "perplexity", "training loss": "training_loss", "parameters": "parameters",
    "tokens/s": "tokens_per_second", "peak bytes": "peak_memory_bytes", "seconds": "seconds",
}  # fmt: skip
"""The columns of the table of steps, and the field of each."""
KeyId = Annotated[str | None, typer.Option(help="Of another API key, or 'all'; needs a key with the scope 'admin'.")]
ApiKey = Annotated[str, typer.Option("--api-key", envvar="SECATEUR_API_KEY", help="From 'secateur keys create'.")]


@contextmanager
def _connect(url: str, api_key: str) -> Iterator["Client"]:
    """Open a client of the service; an error of the client ends the command."""
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


@takes_recipe
def submit(
    recipe: Recipe,
    repo_id: Annotated[
        str | None, typer.Option(help="Repository to publish to; of several ratios, the start of each one's name.")
    ] = None,
    from_job: Annotated[
        uuid.UUID | None,
        typer.Option("--from", help="A job; the new job has its request, changed by the recipe and the options."),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: Json = False,
) -> None:
    """Create a job on the service and print the job's id."""
    recipe = recipe.override({"publish": None if repo_id is None else {"repo_id": repo_id}})
    with _connect(url, api_key) as client:
        if from_job is not None:
            job = client.jobs.get(from_job).derive(**recipe.fields)
        else:
            # The service refuses a request without a model and says why.
            job = client.jobs.create(**{"model_id": None, **with_method(recipe).fields})
    typer.echo(job.view.model_dump_json() if as_json else str(job.id))


def recipe(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Print a job's recipe. The commands 'submit --recipe' and 'prune --recipe' make the same model from the recipe."""
    with _connect(url, api_key) as client:
        found = client.jobs.get(job_id).recipe()
    typer.echo(json.dumps(found) if as_json else Recipe(found).dump(), nl=as_json)


def metrics(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Show the figures of a job's completed steps as a table. With --json, each step is an object with all figures."""
    with _connect(url, api_key) as client:
        found = client.jobs.get(job_id).metrics()
    if as_json:
        for step in found:
            typer.echo(step.model_dump_json())
        return
    rows = [list(COLUMNS), *([_cell(getattr(step, field)) for field in COLUMNS.values()] for step in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: float | str | None) -> str:
    """Return a figure of the table; floating-point numbers have five significant digits."""
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def status(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Show the state and the progress of a job. The exit code is 1 if the job failed or was cancelled."""
    with _connect(url, api_key) as client:
        job = client.jobs.get(job_id).view
    typer.echo(job.model_dump_json() if as_json else _line(job))
    raise typer.Exit(ENDED.get(job.state, 0))


def cancel(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Cancel a job."""
    with _connect(url, api_key) as client:
        job = client.jobs.get(job_id).cancel().view
    typer.echo(job.model_dump_json() if as_json else _line(job))


def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: Json = False,
) -> None:
    """Print the newest log lines of a job's processes. With --json, each line is an object."""
    with _connect(url, api_key) as client:
        for line in client.jobs.get(job_id).logs(follow=follow):
            written_at = line.written_at.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
            typer.echo(line.model_dump_json() if as_json else f"{written_at}  [{line.attempt}]  {line.text}")


def delete(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Delete a job that has ended, with its files. A published model stays in its repository."""
    with _connect(url, api_key) as client:
        client.jobs.get(job_id).delete()
    typer.echo(f"{job_id} is deleted.")


def label(
    job_id: JobId,
    labels: Annotated[list[str] | None, typer.Argument(help="NAME=VALUE; all labels that the job has then.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: Json = False,
) -> None:
    """Replace the labels of a job; without labels, remove them."""
    with _connect(url, api_key) as client:
        job = client.jobs.get(job_id).label(_labels(labels)).view
    typer.echo(job.model_dump_json() if as_json else _summary(job))


def jobs(
    state: Annotated[list[str] | None, typer.Option(help="A state; several may be given.")] = None,
    method: Annotated[str | None, typer.Option(help="A method.")] = None,
    model: Annotated[str | None, typer.Option(help="A Hub id or 'local:NAME'.")] = None,
    labels: Annotated[list[str] | None, typer.Option("--label", help="NAME=VALUE; several may be given.")] = None,
    key_id: KeyId = None,
    limit: Annotated[int, typer.Option(min=1, help="Largest number of jobs.")] = 50,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    with _connect(url, api_key) as client:
        found = client.jobs.list(
            state=state or (),
            method=method,
            model_id=model,
            labels=_labels(labels),
            key_id=key_id,
            page_size=min(limit, LARGEST_PAGE),
        )
        for job in islice(found, limit):
            typer.echo(job.model_dump_json() if as_json else _summary(job))


def usage(
    key_id: KeyId = None,
    since: Annotated[
        dt.datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day. Unset: 29 days ago.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: Json = False,
) -> None:
    """Show what an API key used, by day (UTC)."""
    with _connect(url, api_key) as client:
        for day in client.usage(key_id=key_id, since=since and since.date()):
            counts = f"{day.jobs_created} created, {day.jobs_succeeded} succeeded, {day.jobs_failed} failed"
            line = (
                f"{day.day}  {day.key_id}  {counts}  {day.worker_seconds:.0f} worker seconds  {day.bytes_stored} bytes"
            )
            typer.echo(day.model_dump_json() if as_json else line)


def models(url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """List the models in the service's models folder."""
    with _connect(url, api_key) as client:
        typer.echo("".join(f"{name}\n" for name in client.models()), nl=False)


def texts(url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """List the texts in the service's texts folder."""
    with _connect(url, api_key) as client:
        typer.echo("".join(f"{name}\n" for name in client.texts()), nl=False)


def tasks(url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """List the zero-shot tasks that the service knows."""
    with _connect(url, api_key) as client:
        typer.echo("".join(f"{name}\n" for name in client.tasks()), nl=False)


datasets = typer.Typer(no_args_is_help=True, help="Upload, list and delete data sets for calibration and evaluation.")


@datasets.command("upload")
def upload_dataset(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A UTF-8 text; .jsonl and .ndjson: texts or chats.")
    ],
    name: Annotated[str | None, typer.Option(help="Unset: the file's name.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: Json = False,
) -> None:
    """Upload a file and print the name by which a job uses it."""
    with _connect(url, api_key) as client:
        dataset = client.datasets.upload(file, name=name)
    typer.echo(dataset.model_dump_json() if as_json else f"{UPLOAD_PREFIX}{dataset.id}")


@datasets.command("list")
def list_datasets(
    key_id: KeyId = None,
    limit: Annotated[int, typer.Option(min=1, help="Largest number of data sets.")] = 50,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: Json = False,
) -> None:
    """List data sets, newest first."""
    with _connect(url, api_key) as client:
        for dataset in islice(client.datasets.list(key_id=key_id, page_size=min(limit, LARGEST_PAGE)), limit):
            typer.echo(dataset.model_dump_json() if as_json else _dataset_line(dataset))


@datasets.command("delete")
def delete_dataset(
    dataset: Annotated[str, typer.Argument(help="'upload:ID' or the id.")], url: Url = DEFAULT_URL, api_key: ApiKey = ""
) -> None:
    """Delete a data set that no job names that has not ended."""
    try:
        dataset_id = uuid.UUID(dataset.removeprefix(UPLOAD_PREFIX))
    except ValueError:
        raise stop(f"'{dataset}' is no data set: write upload:ID", REFUSED) from None
    with _connect(url, api_key) as client:
        client.datasets.delete(dataset_id)
    typer.echo(f"{UPLOAD_PREFIX}{dataset_id} is deleted.")


def _dataset_line(dataset: "DatasetView") -> str:
    """Return the description of a data set in one line."""
    return f"{UPLOAD_PREFIX}{dataset.id}  {dataset.kind}  {dataset.lines} lines  {dataset.size} bytes  {dataset.name}"


def _labels(given: list[str] | None) -> dict[str, str]:
    """Return the labels that arguments of the form NAME=VALUE give."""
    parts = [each.partition("=") for each in given or ()]
    if wrong := [name for name, equals, _ in parts if not equals]:
        raise stop(f"'{wrong[0]}' is no label: write NAME=VALUE", REFUSED)
    return {name: value for name, _, value in parts}


def _summary(job: "JobSummary") -> str:
    """Return the description of a job of a list in one line."""
    labels = " ".join(f"{name}={value}" for name, value in job.labels.items())
    parts = [
        str(job.id),
        str(job.state),
        job.model_id,
        job.method,
        labels,
        "" if job.key_id is None else f"key {job.key_id}",
    ]
    return "  ".join(part for part in parts if part)


def watch(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Follow a job until it ends.

    A terminal shows progress bars. Other output has a line (with --json, an object) for each change.
    """
    with _connect(url, api_key) as client:
        job = client.jobs.get(job_id)
        if sys.stdout.isatty() and not as_json:
            _watch_bar(job)
            typer.echo(_line(job.view))
        else:
            _watch_lines(job, as_json)
    raise typer.Exit(ENDED[job.state])


def _watch_lines(job: "Job", as_json: bool) -> None:
    """Print a line when the state, the stage or the step changes, and at every tenth of the job."""
    shown: tuple[object, ...] = ()
    for _ in job.changes():
        progress = job.progress
        step = (job.state, *((progress.stage, progress.step, int(progress.share * 10)) if progress else ()))
        if step != shown:
            typer.echo(job.view.model_dump_json() if as_json else _line(job.view))
        shown = step


def _watch_bar(job: "Job") -> None:
    from rich.console import Console

    from secateur.terminal_progress import TerminalProgress

    with TerminalProgress(Console()) as bars:
        for _ in job.changes():
            if job.progress is not None:
                bars.show(job.progress, _seconds_left(job.view))


def _where(job: "JobView") -> str:
    progress = job.progress
    if progress is None or job.state in ENDED:
        return str(job.state)
    return f"{job.state}  {progress.stage}  step {progress.step}/{progress.steps}"


def _seconds_left(job: "JobView") -> float | None:
    finish = job.progress.estimated_finish_at if job.progress else None
    if finish is None or job.state in ENDED:
        return None
    return (finish - dt.datetime.now(dt.UTC)).total_seconds()


def _time_left(job: "JobView") -> str:
    from secateur.terminal_progress import clock

    seconds = _seconds_left(job)
    return "" if seconds is None else f"{clock(seconds)} left"


def _line(job: "JobView") -> str:
    """Return the description of a job in one line."""
    parts = [str(job.id), _where(job)]
    if job.progress and job.state not in ENDED:
        parts += [f"{job.progress.share:.0%}", _time_left(job)]
    if job.error:
        parts.append(f"{job.error.message} ({job.error.code})")
    results = (job.result or {}).get("targets") or [job.result or {}]
    if published := [result["repo_id"] for result in results if "repo_id" in result]:
        parts.append(f"published to {', '.join(published)}")
    return "  ".join(part for part in parts if part)
