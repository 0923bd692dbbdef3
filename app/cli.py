"""The service's command line: the schema, API keys, and jobs over HTTP.

Exit codes: 0 done, 1 the job failed or was cancelled, 2 refused or misused, 3 service or database out of reach.
"""

import datetime as dt
import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.auth.models import ApiKey as KeyRow
    from app.client import Client, Job
    from app.jobs.schemas import JobView

FAILED, REFUSED, UNREACHABLE = 1, 2, 3
ENDED = {"succeeded": 0, "failed": FAILED, "cancelled": FAILED}

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
keys = typer.Typer(no_args_is_help=True, help="API keys; needs the database (SECATEUR_DATABASE_URL).")
cli.add_typer(keys, name="keys")

Url = Annotated[str, typer.Option("--url", envvar="SECATEUR_URL", help="The service's address.")]
ApiKey = Annotated[str, typer.Option("--api-key", envvar="SECATEUR_API_KEY", help="From 'secateur keys create'.")]
RecoveryKind = Annotated[str | None, typer.Option("--recovery", help="See GET /v1/methods; unset: the method's own.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[uuid.UUID, typer.Argument(help="The job's id.")]
DEFAULT_URL = "http://127.0.0.1:8000"


def main() -> None:
    """Run the command line. What is wrong with its surroundings is said in a line, without a traceback."""
    try:
        cli()
    except Exception as error:
        explained = _explain(error)
        if explained is None:
            raise
        message, code = explained
        typer.echo(message, err=True)
        sys.exit(code)


def _explain(error: Exception) -> tuple[str, int] | None:
    """What to tell the operator, and the exit code; ``None`` for a defect of ours."""
    from psycopg.errors import UndefinedColumn, UndefinedTable
    from pydantic import ValidationError
    from sqlalchemy.exc import OperationalError, ProgrammingError

    from app.config import Settings

    if isinstance(error, ValidationError) and error.title == Settings.__name__:
        reasons = [f"{_variable(str(item['loc'][0]))}: {item['msg']}" for item in error.errors()]
        return "\n".join(reasons), REFUSED
    if isinstance(error, OperationalError):
        return f"The database cannot be reached: {error.orig}", UNREACHABLE
    if isinstance(error, ProgrammingError) and isinstance(error.orig, UndefinedTable | UndefinedColumn):
        return "The database's schema is not up to date: run 'secateur migrate'.", REFUSED
    return None


def _variable(field: str) -> str:
    """The environment variable of a setting; one that has an alias is named by it already."""
    return field if field.isupper() else f"SECATEUR_{field.upper()}"


def stop(message: str, code: int) -> typer.Exit:
    """What to raise to end with a message on stderr and this exit code."""
    typer.echo(message, err=True)
    return typer.Exit(code)


@contextmanager
def _connect(url: str, api_key: str) -> Iterator["Client"]:
    """The service's client; what goes wrong with it ends the command."""
    from app.client import ApiError, Client, Unavailable, Unreachable

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


@contextmanager
def _database() -> Iterator["Session"]:
    from sqlalchemy.orm import Session

    from app.config import get_settings
    from app.db.session import make_engine

    with Session(make_engine(get_settings().nearest_database_url()), expire_on_commit=False) as session:
        yield session


@cli.command()
def migrate() -> None:
    """Bring the database's schema up to date."""
    from app.config import get_settings
    from app.db.migrate import upgrade

    upgrade(get_settings().nearest_database_url())
    typer.echo("The schema is up to date.")


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Whom or what it is for.")],
    scope: Annotated[list[str] | None, typer.Option(help="read, submit, admin; several may be given.")] = None,
    as_json: Json = False,
) -> None:
    """Make an API key; its secret is shown this once. Without --scope it may read and submit."""
    from app.auth import service

    try:
        scopes = [service.Scope(each) for each in scope or service.USER]
    except ValueError as error:
        raise stop(f"--scope: {error}; allowed: {', '.join(service.Scope)}", REFUSED) from None
    with _database() as session:
        try:
            key, secret = service.create(session, name, scopes)
        except ValueError as error:
            raise stop(f"NAME: {error}", REFUSED) from None
    _show_secret(key, secret, as_json)


def _show_secret(key: "KeyRow", secret: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"id": str(key.id), "name": key.name, "scopes": key.scopes, "secret": secret}))
    else:
        typer.echo(f"Key {key.id} for {key.name}. Keep the secret, it is not shown again:", err=True)
        typer.echo(secret)


@keys.command("rotate")
def keys_rotate(
    key_id: Annotated[uuid.UUID, typer.Argument(help="From 'secateur keys list'.")],
    grace: Annotated[float, typer.Option(min=0, help="Seconds for which the secret it has serves on.")] = 86_400,
    as_json: Json = False,
) -> None:
    """Give an API key another secret, shown this once; its jobs stay its own."""
    from app.auth import service

    with _database() as session:
        made = service.rotate(session, key_id, grace)
    if made is None:
        raise stop(f"There is no key {key_id} that is not revoked.", REFUSED)
    _show_secret(*made, as_json)


@keys.command("hub-token")
def keys_hub_token(key_id: Annotated[uuid.UUID, typer.Argument(help="From 'secateur keys list'.")]) -> None:
    """Keep a Hub token, read from standard input, for the jobs of an API key; an empty one takes it away."""
    from pydantic import SecretStr

    from app.auth import service, vault
    from app.config import get_settings

    token = sys.stdin.readline().strip()
    with _database() as session:
        try:
            key = service.keep_hub_token(session, get_settings(), key_id, SecretStr(token) if token else None)
        except vault.VaultError as error:
            raise stop(f"{error}.", REFUSED) from None
    if key is None:
        raise stop(f"There is no key {key_id}.", REFUSED)
    typer.echo(f"Key {key_id} has {'a' if token else 'no'} Hub token.")


@keys.command("list")
def keys_list(as_json: Json = False) -> None:
    """All API keys, without their secrets."""
    from app.auth import service

    with _database() as session:
        rows = [
            {
                "id": str(key.id),
                "name": key.name,
                "scopes": ",".join(key.scopes),
                "created_at": key.created_at.isoformat(),
                "last_used_at": key.last_used_at and key.last_used_at.isoformat(),
                "revoked_at": key.revoked_at and key.revoked_at.isoformat(),
            }
            for key in service.every(session)
        ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        state = f"revoked {row['revoked_at']}" if row["revoked_at"] else f"last used {row['last_used_at'] or 'never'}"
        typer.echo(f"{row['id']}  {row['name']}  {row['scopes']}  created {row['created_at']}  {state}")


@keys.command("revoke")
def keys_revoke(key_id: Annotated[uuid.UUID, typer.Argument(help="From 'secateur keys list'.")]) -> None:
    """Revoke an API key for good; its jobs go on."""
    from app.auth import service

    with _database() as session:
        if service.revoke(session, key_id) is None:
            raise stop(f"There is no key {key_id}.", REFUSED)
    typer.echo(f"Key {key_id} is revoked.")


@cli.command()
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


@cli.command()
def status(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Show a job."""
    with _connect(url, api_key) as client:
        job = client.jobs.get(job_id).view
    typer.echo(job.model_dump_json() if as_json else _line(job))
    raise typer.Exit(ENDED.get(job.state, 0))


@cli.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "", as_json: Json = False) -> None:
    """Cancel a job."""
    with _connect(url, api_key) as client:
        job = client.jobs.get(job_id).cancel().view
    typer.echo(job.model_dump_json() if as_json else _line(job))


@cli.command()
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

    from app.bars import Bars

    with Bars(Console()) as bars:
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
    from app.bars import clock

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
