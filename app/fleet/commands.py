"""``secateur workers``: the commands with which an operator of the service shows and drains workers."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from app.auth.commands import database
from secateur.cli.common import REFUSED, Json, stop

if TYPE_CHECKING:
    from secateur.contract.workers import Drain, WorkerView

workers = typer.Typer(no_args_is_help=True, help="Workers; needs the database (SECATEUR_DATABASE_URL).")
Name = Annotated[str, typer.Argument(help="From 'secateur workers list'.")]


@workers.command("list")
def workers_list(as_json: Json = False) -> None:
    """List the workers, what they offer, and the jobs that they work on."""
    from app.config import get_settings
    from app.fleet import service

    with database() as session:
        found = service.every(session, get_settings())
    if as_json:
        typer.echo(json.dumps([worker.model_dump(mode="json") for worker in found]))
    else:
        for worker in found:
            typer.echo(_line(worker))


def _line(worker: "WorkerView") -> str:
    memory = "memory not known" if worker.memory_bytes is None else f"{worker.memory_bytes / 2**30:.1f} GiB"
    labels = ",".join(f"{name}={value}" for name, value in sorted(worker.labels.items())) or "no labels"
    works = f"job {worker.job_id}" if worker.job_id else "idle"
    state = "silent" if not worker.live else f"draining ({worker.drain})" if worker.drain else "live"
    return f"{worker.name}  {state}  {works}  {worker.device or 'device not known'}  {memory}  {labels}"


@workers.command("drain")
def workers_drain(
    name: Name,
    now: Annotated[bool, typer.Option("--now", help="Release its job at the end of the step.")] = False,
) -> None:
    """Let a worker take no new job. It finishes its job, or releases it to another worker with --now."""
    from secateur.contract.workers import Drain

    _set_drain(name, Drain.RELEASE if now else Drain.FINISH)
    typer.echo(f"Worker {name} takes no new job.")


@workers.command("resume")
def workers_resume(name: Name) -> None:
    """Let a drained worker take jobs again."""
    _set_drain(name, None)
    typer.echo(f"Worker {name} takes jobs.")


def _set_drain(name: str, drain: "Drain | None") -> None:
    from app.fleet import service

    with database() as session:
        try:
            service.set_drain(session, name, drain)
        except service.UnknownWorker:
            raise stop(f"There is no worker {name}.", REFUSED) from None
