"""Make one attempt at a claimed job: keep its lease, run its child processes, and record what they report.

The children are a pruning process and a publishing process. This module never imports torch: it runs in Celery's forked
process, and a fork after torch has worked deadlocks. Every write is fenced by the attempt's number. The children are
dead before the lease can end, see :class:`workers.job_process.JobProcess`.
"""

import datetime as dt
import logging
import math
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from app.auth.vault import VaultError
from app.config import Settings
from app.datasets import service as datasets
from app.http import logs
from app.http.problem import Problem
from app.jobs import leases, tokens
from app.jobs.leases import Beat, Claim, LeaseLost, Patience
from app.jobs.transitions import TransitionRefused, Trigger
from app.sanitise import Sanitiser
from secateur.catalog.resolve import components
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.stages import Stage
from secateur.contract.states import State
from secateur.processes import describe_exit
from workers import scratch
from workers.devices import host_memory
from workers.job_log import JobLog
from workers.job_process import JobProcess
from workers.limits import Limits
from workers.supervisor_link import explain
from workers.tracing import Trace

log = logging.getLogger(__name__)

RUNNER = [sys.executable, "-m", "workers.runner"]
PUBLISHER = [sys.executable, "-m", "workers.publisher"]
TICK = 0.2
DATABASE_RETRY = 0.5


class Cancelled(Exception):
    """The owner cancelled the job."""


class Paused(Exception):
    """The runner stopped at the end of a step, as requested."""


class ShuttingDown(Exception):
    """The worker must end."""


class DatabaseLost(Exception):
    """The database did not answer for so long that the lease can no longer be relied upon."""


class Failed(Exception):
    """The attempt failed; ``error`` is what the job records.

    ``outside`` says that the cause was outside the child, so that the same failure at the same place may be chance.
    """

    def __init__(self, code: ErrorCode, message: str, outside: bool = False) -> None:
        super().__init__(message)
        self.outside = outside
        self.error = PruningError(code, message).as_dict()


class Reported(Failed):
    """The attempt failed, and its process reported the reason."""

    def __init__(self, error: dict[str, Any]) -> None:
        Exception.__init__(self, error["message"])
        self.outside = False
        self.error = error


@dataclass(frozen=True)
class Ending:
    """How an attempt ended, for the worker's log: the outcome, the code of an error, and the reason."""

    outcome: Literal["succeeded", "paused", "cancelled", "released", "retried", "failed", "lease_lost"]
    code: str | None = None
    reason: str = ""

    def tell(self) -> None:
        """Write one line; a line of JSON has the outcome and the code as fields of their own."""
        known = [str(part) for part in (self.outcome, self.code, " ".join(self.reason.split())) if part]
        level = logging.WARNING if self.code else logging.INFO
        log.log(
            level, "the attempt has ended: %s", ": ".join(known), extra={"outcome": self.outcome, "code": self.code}
        )


RELEASED: dict[State, Any] = {State.QUEUED: "released", State.PAUSED: "paused", State.CANCELLED: "cancelled"}
"""Outcomes of attempts that did not fail, by the state in which they leave the job."""
FAILED: dict[State, Any] = {**RELEASED, State.QUEUED: "retried", State.FAILED: "failed"}
"""Outcomes of attempts that failed, by the state in which they leave the job."""


def supervise(
    claim: Claim,
    claimed: float,
    settings: Settings,
    sessions: sessionmaker[Session],
    shutting_down: Callable[[], bool],
    runner: list[str] = RUNNER,
    publisher: list[str] = PUBLISHER,
) -> None:
    """Work on the job until this attempt ends; ``claimed`` is when the claim was sent (``time.monotonic()``)."""
    with logs.about(job_id=str(claim.job_id), attempt=claim.attempt, request_id=claim.request_id):
        Attempt(claim, settings, sessions, shutting_down, claimed).run(runner, publisher)


class Attempt:
    """An attempt at a job.

    No child may live past ``deadline`` (``time.monotonic()``), which moves with every renewal of the lease.
    """

    def __init__(
        self,
        claim: Claim,
        settings: Settings,
        sessions: sessionmaker[Session],
        shutting_down: Callable[[], bool],
        claimed: float,
    ) -> None:
        self.claim = claim
        self.settings = settings
        self.sessions = sessions
        self.shutting_down = shutting_down
        self.deadline = self._deadline(claimed)
        self.next_beat = claimed + settings.heartbeat_interval
        limits = (claim.request.get("max_runtime_seconds"), settings.max_runtime_seconds)
        self.longest_run = min((limit for limit in limits if limit is not None), default=math.inf)
        self.time_limit = claimed + self.longest_run
        self.progress: dict[str, Any] = {"stage": Stage.STARTING, "step": 0, "share": 0.0, "stage_share": 0.0}
        self.folder = scratch.folder_of(settings, claim.job_id, claim.attempt)
        self.output = self.folder / "output"
        self.temporary = self.folder / "tmp"
        self.log = JobLog(Sanitiser(settings))
        self.trace = Trace(claim)

    def run(self, runner: list[str], publisher: list[str]) -> None:
        log.info("the attempt has begun")
        self.log.add("the attempt has begun")
        try:
            ending = self._run(runner, publisher)
        except (LeaseLost, DatabaseLost) as reason:
            ending = Ending("lease_lost", ErrorCode.WORKER_LOST, str(reason))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        ending.tell()
        self.trace.end(ending.outcome, ending.code)

    def _run(self, runner: list[str], publisher: list[str]) -> Ending:
        """Make the attempt, record what follows from the way it ended, and return the ending."""
        try:
            self._prune_and_publish(runner, publisher)
            return Ending("succeeded")
        except Cancelled:
            return self._release("its owner cancelled the job", leases.move, Trigger.STOPPED)
        except Paused:
            return self._release("its owner paused the job", leases.release)
        except ShuttingDown:
            return self._release("the worker is shut down", leases.release)
        except DatabaseLost as reason:
            self.deadline += self.settings.lease_margin  # the children are dead, so the lease may be used to its end
            return self._release(str(reason), leases.release)
        except LeaseLost:
            raise
        except Failed as failure:
            return self._fail(failure.error, failure.outside)
        except Exception as error:
            return self._fail(self.log.sanitiser(explain(error, str(self.settings.data_dir))))

    def _release(self, reason: str, operation: Callable[..., State], *values: Any) -> Ending:
        self._store_log(f"the attempt ends: {reason}")
        return Ending(RELEASED[self._write(operation, *values)], None, reason)

    def _fail(self, error: dict[str, Any], outside: bool = False) -> Ending:
        self._store_log(f"the attempt ends: {error['code']}: {error['message']}")
        place = None if outside else {name: self.progress[name] for name in ("stage", "step")}
        state = self._write(leases.fail, error, Patience.of(self.settings), place)
        return Ending(FAILED[state], error["code"], error["message"])

    def _store_log(self, last: str) -> None:
        self.log.add(last)
        self._write(leases.renew, self.settings.lease_ttl, self.log.take())
        self.log.stored()

    def _prune_and_publish(self, runner: list[str], publisher: list[str]) -> None:
        self.progress["steps"] = components(PruningSpec.of_request(self.claim.request)).steps
        self.folder.mkdir(parents=True, exist_ok=True)
        token = self._write(lambda session, job_id, attempt: self._hub_token(session))
        self.log.sanitiser = Sanitiser(self.settings, [token])
        job = {
            "hub_token": token and token.get_secret_value(),
            "job_id": str(self.claim.job_id),
            "attempt": self.claim.attempt,
            "request_id": self.claim.request_id,
            "request": self.claim.request,
            "folder": str(self.folder),
            "output": str(self.output),
        }
        files = None
        if self.claim.exported:
            report, files = self._write(leases.exported)
        else:
            inputs = {"state": self._write(leases.newest_state), "datasets": self._write(self._datasets)}
            report = self._follow(runner, {**job, **inputs})["report"]
        result = self._follow(publisher, {**job, "report": report, "files": files})["result"]
        self._store_log("the attempt ends: succeeded")
        done = {**self.progress, "stage": Stage.DONE, "share": 1.0, "stage_share": 1.0, "rate": None, "rate_unit": None}
        self._write(leases.succeed, result, done)

    def _hub_token(self, session: Session) -> SecretStr | None:
        try:
            return tokens.of_job(session, self.settings, self.claim.job_id)
        except VaultError as error:
            raise Failed(ErrorCode.HUB_TOKEN_UNREADABLE, f"The Hub token cannot be read: {error}.") from None

    def _datasets(self, session: Session, job_id: uuid.UUID, attempt: int) -> list[dict[str, Any]]:
        """Return the uploaded data sets that the job names, as the runner fetches them."""
        uploads = PruningSpec.of_request(self.claim.request).uploads()
        try:
            found = datasets.find(session, leases.owned(session, job_id, attempt).owner_id, uploads)
        except Problem as problem:  # it was deleted after the job had ended, and the job is tried again
            raise Failed(problem.code, problem.detail) from None
        return [datasets.describe(dataset) for dataset in found]

    def _start_publishing(self, report: dict[str, Any], files: list[dict[str, Any]]) -> Beat:
        try:
            beat: Beat = self._write(leases.record_export, report, files)
        except TransitionRefused as refused:
            raise Cancelled from refused
        self.time_limit = math.inf  # a commit may exist, so publishing can only be completed
        return beat

    def _follow(self, argv: list[str], job: dict[str, Any]) -> dict[str, Any]:
        """Run a child to its end and return its last message; whatever happens, the child is dead afterwards."""
        oom_kills = _oom_kills()
        self.temporary.mkdir(exist_ok=True)
        limits = Limits.of(self.settings, self.folder)
        child = JobProcess(argv, job, self.deadline, self.temporary, self.log.add, limits)
        try:
            return self._listen(child)
        except EOFError:
            raise self._death(child, oom_kills) from None
        finally:
            child.kill()

    def _listen(self, child: JobProcess) -> dict[str, Any]:
        heard = time.monotonic()
        while True:
            now = time.monotonic()
            if self.shutting_down():
                raise ShuttingDown
            if now >= self.deadline:
                raise DatabaseLost("the database did not answer in time")
            if now >= self.next_beat:
                self._beat(child)
            if now >= self.time_limit:
                limit = f"The job ran longer than its limit of {self.longest_run:g} seconds."
                raise Failed(ErrorCode.MAX_RUNTIME_EXCEEDED, limit)
            if now - heard >= self.settings.stall_timeout:
                silence = f"The worker's process reported nothing for {self.settings.stall_timeout:.0f} seconds."
                raise Failed(ErrorCode.RUNNER_STALLED, silence)
            message = child.receive(timeout=TICK)
            if message is None:
                continue
            heard = time.monotonic()
            # The state is for the next attempt alone, which compares it with the request.
            message = {name: part if name == "state" else self.log.sanitiser(part) for name, part in message.items()}
            match message.pop("type"):
                case "progress":
                    self._heed(child, self._report_progress(message))
                case "warning":
                    event = {"type": "warning", "data": message}
                    self._heed(child, self._write(leases.report_progress, self.progress, event))
                case "step":
                    beat = self._write(leases.record_step, **message, quota=self.settings.max_stored_bytes)
                    self._heed(child, beat, recorded=True)
                case "exported":
                    self._heed(child, self._start_publishing(**message), recorded=True)
                case "paused":
                    raise Paused
                case "error":
                    raise Reported(message["error"])
                case "result":
                    return message

    def _report_progress(self, progress: dict[str, Any]) -> Beat:
        remaining = progress.pop("remaining_seconds")
        finish = None if remaining is None else dt.datetime.now(dt.UTC) + dt.timedelta(seconds=remaining)
        self.progress = {**self.progress, **progress, "estimated_finish_at": finish and finish.isoformat()}
        self.trace.enter(self.progress["stage"], self.progress["step"])
        return self._write(leases.report_progress, self.progress)

    def _beat(self, child: JobProcess) -> None:
        sent = time.monotonic()
        beat = self._write(leases.renew, self.settings.lease_ttl, self.log.take())
        self.log.stored()
        self.deadline = self._deadline(sent)
        self.next_beat = sent + self.settings.heartbeat_interval
        self._heed(child, beat)

    def _heed(self, child: JobProcess, beat: Beat, recorded: bool = False) -> None:
        """Do what was requested of the job, and pass the end of the lease on to the child."""
        if beat.cancel:
            raise Cancelled
        child.renew(self.deadline, beat.pause, recorded, beat.keep)

    def _deadline(self, sent: float) -> float:
        """Return the deadline for a lease taken by a query that was sent at ``sent``.

        The deadline counts from the sending of the query, because only the database knows when the lease began.
        """
        return sent + self.settings.lease_ttl - self.settings.lease_margin

    def _death(self, child: JobProcess, oom_kills: int) -> Exception:
        """Return why a child that sent no last message is dead."""
        code = child.kill()
        if code == -signal.SIGALRM and time.monotonic() >= child.deadline:
            return DatabaseLost("the lease could not be renewed in time")
        if child.excess is not None:
            return Reported(child.excess.as_dict())
        message = f"The worker's process {describe_exit(code)}."
        failed = Failed(ErrorCode.RUNNER_DIED, message)
        if code == -signal.SIGKILL and _oom_kills() > oom_kills:
            message += f" The machine ran out of memory; it has {host_memory():,} bytes."
            failed = Failed(ErrorCode.OUT_OF_MEMORY, message)
        elif code == -signal.SIGKILL:  # no process sends itself this signal
            message += " The machine probably ran out of memory."
            failed = Failed(ErrorCode.RUNNER_DIED, message, outside=True)
        elif code == -signal.SIGALRM:
            message += " It was hung: it did not read its renewals."
            failed = Failed(ErrorCode.RUNNER_DIED, message)
        log.warning("%s Its last words:\n%s", message, child.stderr_tail)  # the owner must not see the service's paths
        return failed

    def _write(self, operation: Callable[..., Any], *values: Any, **named: Any) -> Any:
        """Run a fenced operation of :mod:`app.jobs.leases`.

        The operation is tried again while the database is away and the lease lasts.

        Raises:
            LeaseLost: another attempt owns the job.
            DatabaseLost: the database did not answer until ``deadline``, or there is no time to wait for an answer.
        """
        while True:
            try:
                with self.sessions() as session:
                    return operation(session, self.claim.job_id, self.claim.attempt, *values, **named)
            except (OperationalError, InterfaceError) as error:
                log.warning("the database does not answer: %s", str(error.orig).strip())
                if self.shutting_down() or time.monotonic() >= self.deadline:
                    raise DatabaseLost(str(error.orig)) from error
                time.sleep(DATABASE_RETRY)


def _oom_kills() -> int:
    """Return the number of processes that the kernel has killed for lack of memory since boot.

    The number comes from ``/proc/vmstat`` (Linux 4.13).
    """
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0
