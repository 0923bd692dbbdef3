"""Whether the promise was kept: what the database, the Hub, the witnesses' notes and the disk say at the end."""

import hashlib
import os
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from app.jobs.models import Job, JobEvent, JobStep
from secateur.contract.states import TERMINAL
from tests.chaos.witness import SPAN
from tests.chaos.world import World

LIVE = ("queued", "running", "publishing", "paused")


@dataclass
class Accepted:
    """A job that the API took on: where it is to be published, and the states in which it may end."""

    job_id: uuid.UUID
    repo_id: str
    ends: set[str]


@dataclass
class Verdict:
    """``faults``: in words, one for each thing that should not be."""

    counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def torn_checkpoints(world: World, sessions: sessionmaker[Session]) -> list[str]:
    """Rounds of live jobs whose file is not what their row says. A database that is away tells nothing."""

    def rows() -> dict[tuple[uuid.UUID, int], tuple[str, str]]:
        query = select(JobStep).join(Job, Job.id == JobStep.job_id).where(Job.state.in_(LIVE))
        with sessions() as session:
            return {(row.job_id, row.number): (row.path, row.sha256) for row in session.scalars(query)}

    def odd(known: dict[tuple[uuid.UUID, int], tuple[str, str]]) -> set[tuple[tuple[uuid.UUID, int], tuple[str, str]]]:
        return {
            (key, row) for key, row in known.items() if _sha256(world.data / "jobs" / str(key[0]) / row[0]) != row[1]
        }

    try:
        suspected = odd(rows())
        if suspected:  # a job that has ended since has no checkpoints
            time.sleep(0.3)
            suspected &= odd(rows())
    except DBAPIError:
        return []
    return [f"step {number} of {job_id}: {path}" for (job_id, number), (path, _) in suspected]


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def judge(world: World, accepted: list[Accepted], torn: list[str], leftover: list[str]) -> Verdict:
    """``torn``: checkpoints found damaged on the way; ``leftover``: processes that outlived the service."""
    verdict = Verdict()
    with world.sessions()() as session:
        jobs = {job.id: job for job in session.scalars(select(Job))}
        events = list(session.scalars(select(JobEvent).order_by(JobEvent.id)))
    lost = [job for job in accepted if job.job_id not in jobs or jobs[job.job_id].state not in TERMINAL]
    wrong = [job for job in accepted if job not in lost and jobs[job.job_id].state not in job.ends]
    verdict.faults += [f"lost: {job.job_id} is {state(jobs.get(job.job_id))}" for job in lost]
    verdict.faults += [f"ended as {state(jobs[job.job_id])}, not {job.ends}: {job.job_id}" for job in wrong]
    if strangers := jobs.keys() - {job.job_id for job in accepted}:
        verdict.faults.append(f"jobs that nobody was told of: {sorted(map(str, strangers))}")

    commits = Counter(
        (name, commit.title) for name, repository in world.hub.repositories.items() for commit in repository.commits[1:]
    )
    twice = [key for key, count in commits.items() if count > 1]
    verdict.faults += [f"published twice: {name}: {title}" for name, title in twice]
    for job in accepted:
        if job in lost:
            continue
        count = sum(count for (_, title), count in commits.items() if title == f"Pruned model of job {job.job_id}")
        if count != (jobs[job.job_id].state == "succeeded"):
            verdict.faults.append(f"{count} commits of {job.job_id}, which is {jobs[job.job_id].state}")

    overlaps, repeated, attempts = _attempts(world.notes)
    verdict.faults += overlaps + repeated
    verdict.faults += [f"torn: {name}" for name in torn]
    damaged = [e for e in events if e.type == "warning" and "missing or damaged" in str(e.data)]
    verdict.faults += [f"a checkpoint was passed over: {event.job_id} {event.data}" for event in damaged]
    files = list(_leftover_files(world))
    verdict.faults += [f"left over: {name}" for name in [*leftover, *files]]
    verdict.faults += world.unexpected
    verdict.counts = {
        "jobs": len(accepted),
        **Counter(f"  {job.state}" for job in jobs.values()),
        "attempts": attempts,
        "retries counted as failures": sum(event.type == "retry" for event in events),
        "lost": len(lost),
        "ended otherwise": len(wrong),
        "published twice": len(twice),
        "overlapping attempts": len(overlaps),
        "torn checkpoints": len(torn) + len(damaged),
        "steps repeated more than once": len(repeated),
        "processes left": len(leftover),
        "files left": len(files),
        "unexpected ends of processes": len(world.unexpected),
    }
    return verdict


def state(job: Job | None) -> str:
    return "not there" if job is None else f"{job.state} ({job.error})"


def _attempts(notes: Path) -> tuple[list[str], list[str], int]:
    """Attempts that were at work at the same time; steps that were begun once more than a kill explains; attempts in all."""
    lives: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    begun: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path in notes.glob("*.life"):
        job_id, attempt, *_ = path.name.split(".")
        content = path.read_bytes()
        if len(content) == SPAN.size:
            lives[job_id][int(attempt)].append(SPAN.unpack(content))
    for path in notes.glob("*.steps"):
        job_id, attempt, *_ = path.name.split(".")
        begun[job_id][int(attempt)] += map(int, path.read_text().split())
    overlaps, repeated = [], []
    for job_id, attempts in lives.items():
        ordered = [
            (number, min(f for f, _ in spans), max(t for _, t in spans)) for number, spans in sorted(attempts.items())
        ]
        for (earlier, _, end), (later, start, _) in pairwise(ordered):
            if end > start:
                overlaps.append(f"overlap: attempts {earlier} and {later} of {job_id} for {end - start:.2f} s")
    for job_id, steps in begun.items():
        furthest = 0
        for number, numbers in sorted(steps.items()):
            if min(numbers) < furthest:
                repeated.append(f"attempt {number} of {job_id} went back to step {min(numbers)} from {furthest}")
            furthest = max(furthest, *numbers)
    return overlaps, repeated, sum(map(len, lives.values()))


def _leftover_files(world: World) -> list[str]:
    """Scratch files in the service's folders: nothing is at work any more."""
    found = [str(path.relative_to(world.folder)) for path in world.temporary.iterdir()]
    for folder, folders, files in os.walk(world.data / "jobs"):
        for name in (*folders, *files):
            if name.startswith((".", "attempt-")) or name.endswith(".tmp"):
                found.append(str(Path(folder, name).relative_to(world.data)))
    return found
