"""Whether the promise was kept: what the database, the Hub, the witnesses' notes and the disk say at the end."""

import hashlib
import json
import uuid
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from app.jobs.models import Job, JobEvent, JobStep
from app.storage.models import StoredFile
from app.storage.store import ObjectMissing, open_store
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


def torn_checkpoints(sessions: sessionmaker[Session]) -> list[str]:
    """Live jobs whose newest checkpoint is not that of their newest step. A database that is away tells nothing."""
    query = (
        select(JobStep.job_id, JobStep.number, JobStep.state)
        .join(Job, Job.id == JobStep.job_id)
        .where(Job.state.in_(LIVE), Job.exported_at.is_(None))
        .order_by(JobStep.number)
    )
    try:
        with sessions() as session:
            newest = {row.job_id: row for row in session.execute(query)}
    except DBAPIError:
        return []
    torn = []
    for job_id, row in newest.items():
        try:
            found = json.loads(zlib.decompress(row.state or b""))["step"]
        except (ValueError, zlib.error):
            found = None
        if found != row.number:
            torn.append(f"step {row.number} of {job_id}: {found}")
    return torn


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
    stored = _stored(world, jobs)
    verdict.faults += [f"storage: {name}" for name in stored]
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
        "artifacts lost or left": len(stored),
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
    return found + [str(path) for data in world.data_folders for path in data.glob("work/*")]


def _stored(world: World, jobs: Mapping[uuid.UUID, Job]) -> list[str]:
    """Artifacts that are not as they were recorded, and objects that nothing refers to."""
    store = open_store(world.settings)
    with world.sessions()() as session:
        files = list(session.scalars(select(StoredFile)))
    faults = []
    for file in files:
        try:
            digest = hashlib.sha256(b"".join(store.stream(file.key))).hexdigest()
        except ObjectMissing:
            digest = "nothing"
        if digest != file.sha256:
            faults.append(f"artifact {file.name} of {file.job_id} is {digest}")
    complete = {file.job_id for file in files}
    faults += [
        f"no artifacts of {job.id}" for job in jobs.values() if job.state == "succeeded" and job.id not in complete
    ]
    known = {file.key for file in files}
    succeeded = {str(job.id) for job in jobs.values() if job.state == "succeeded"}
    objects = [found.key for found in store.listing("jobs")]
    return faults + [f"object {key}" for key in objects if key not in known and key.split("/")[1] in succeeded]
