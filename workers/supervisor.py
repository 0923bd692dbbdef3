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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from app.auth.vault import VaultError
from app.config import Settings
from app.http import logs
from app.jobs import leases, repository, tokens
from app.jobs.leases import Beat, Claim, LeaseLost
from app.jobs.transitions import TransitionRefused, Trigger
from secateur.catalog.resolve import components
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.stages import Stage
from secateur.contract.states import State
from secateur.processes import describe_exit
from workers.job_process import JobProcess
from workers.supervisor_link import explain

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
    """The attempt failed; ``error`` is what the job records."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.error = PruningError(code, message).as_dict()


class Reported(Failed):
    """The attempt failed, and its process reported the reason."""

    def __init__(self, error: dict[str, Any]) -> None:
        Exception.__init__(self, error["message"])
        self.error = error


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
        self.folder = settings.job_dir(claim.job_id).resolve()
        self.output = self.folder / f"attempt-{claim.attempt}"
        self.temporary = self.folder / f".{self.output.name}.tmp"

    def run(self, runner: list[str], publisher: list[str]) -> None:
        log.info("the attempt has begun")
        try:
            self._run(runner, publisher)
        except (LeaseLost, DatabaseLost) as reason:
            log.warning("the attempt is given up: %s", reason)
        finally:
            # The output may be complete or half written.
            for leftover in (self.output, *self.folder.glob(f".{self.output.name}.*")):
                shutil.rmtree(leftover, ignore_errors=True)
        log.info("the attempt has ended")

    def _run(self, runner: list[str], publisher: list[str]) -> None:
        """Make the attempt, and record what follows from the way it ended."""
        settings = self.settings
        try:
            self._prune_and_publish(runner, publisher)
        except Cancelled:
            self._write(leases.move, Trigger.STOPPED)
        except (Paused, ShuttingDown):
            self._write(leases.release)
        except DatabaseLost:
            self.deadline += settings.lease_margin  # the children are dead, so the lease may be used to its end
            self._write(leases.release)
        except LeaseLost:
            raise
        except Failed as failure:
            self._write(leases.fail, failure.error, settings.max_failures, settings.retry_backoff)
        except Exception as error:
            reason = explain(error, str(settings.data_dir))
            self._write(leases.fail, reason, settings.max_failures, settings.retry_backoff)

    def _prune_and_publish(self, runner: list[str], publisher: list[str]) -> None:
        self.progress["steps"] = components(PruningSpec.of_request(self.claim.request)).steps
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*self.folder.glob("attempt-*"), *self.folder.glob(".attempt-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        steps = self._write(lambda session, job_id, attempt: repository.steps(session, job_id))
        checkpoints = [{"number": row.number, "path": row.path, "sha256": row.sha256} for row in reversed(steps)]
        token = self._write(lambda session, job_id, attempt: self._hub_token(session))
        job = {
            "hub_token": token and token.get_secret_value(),
            "job_id": str(self.claim.job_id),
            "attempt": self.claim.attempt,
            "request_id": self.claim.request_id,
            "request": self.claim.request,
            "folder": str(self.folder),
            "output": str(self.output),
        }
        report = self._follow(runner, {**job, "checkpoints": checkpoints})["report"]
        self._start_publishing()
        result = self._follow(publisher, {**job, "report": report})["result"]
        done = {**self.progress, "stage": Stage.DONE, "share": 1.0, "stage_share": 1.0, "rate": None, "rate_unit": None}
        self._write(leases.move, Trigger.SUCCEED, result=result, report=report, progress=done)
        for checkpoint in self.folder.glob("step-*"):
            checkpoint.unlink(missing_ok=True)  # the job may have been deleted meanwhile

    def _hub_token(self, session: Session) -> SecretStr | None:
        try:
            return tokens.of_job(session, self.settings, self.claim.job_id)
        except VaultError as error:
            raise Failed(ErrorCode.HUB_TOKEN_UNREADABLE, f"The Hub token cannot be read: {error}.") from None

    def _start_publishing(self) -> None:
        try:
            self._write(leases.move, Trigger.PUBLISH)
        except TransitionRefused as refused:
            if refused.state is State.CANCELLING:
                raise Cancelled from refused
            # Otherwise the job is publishing already: the first try was committed, and only its answer was lost.
        self.time_limit = math.inf  # a commit may exist, so publishing can only be completed

    def _follow(self, argv: list[str], job: dict[str, Any]) -> dict[str, Any]:
        """Run a child to its end and return its last message; whatever happens, the child is dead afterwards."""
        oom_kills = _oom_kills()
        self.temporary.mkdir(exist_ok=True)
        child = JobProcess(argv, job, self.deadline, self.temporary)
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
            match message.pop("type"):
                case "progress":
                    self._heed(child, self._report_progress(message))
                case "warning":
                    event = {"type": "warning", "data": message}
                    self._heed(child, self._write(leases.report_progress, self.progress, event))
                case "step":
                    self._heed(child, self._write(leases.record_step, **message), recorded=True)
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
        return self._write(leases.report_progress, self.progress)

    def _beat(self, child: JobProcess) -> None:
        sent = time.monotonic()
        beat = self._write(leases.renew, self.settings.lease_ttl)
        self.deadline = self._deadline(sent)
        self.next_beat = sent + self.settings.heartbeat_interval
        self._heed(child, beat)

    def _heed(self, child: JobProcess, beat: Beat, recorded: bool = False) -> None:
        """Do what was requested of the job, and pass the end of the lease on to the child."""
        if beat.cancel:
            raise Cancelled
        child.renew(self.deadline, beat.pause, recorded)

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
        message = f"The worker's process {describe_exit(code)}."
        if code == -signal.SIGKILL:
            known = _oom_kills() > oom_kills
            message += f" The machine {'ran' if known else 'probably ran'} out of memory."
        if code == -signal.SIGALRM:
            message += " It was hung: it did not read its renewals."
        log.warning("%s Its last words:\n%s", message, child.stderr_tail)  # the owner must not see the service's paths
        return Failed(ErrorCode.RUNNER_DIED, message)

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
