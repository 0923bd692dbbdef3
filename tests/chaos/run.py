"""Jobs on one side, faults on the other, and the verdict when all is quiet again."""

import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from app.storage.store import open_store
from tests import s3
from tests.chaos.faults import FAULTS
from tests.chaos.verdict import Accepted, Verdict, judge, torn_checkpoints
from tests.chaos.world import LEASE, World, running
from tests.engine.models import SIZES, english, make_tokenizer, save
from workers.scheduler import delete_leftovers
from workers.scratch import delete_abandoned

ROUNDS = 4
SHARED_REPOSITORY = 0.2
"""Of the jobs, those that publish to one repository, all of them."""
CANCELLED, PAUSED = 0.1, 0.1
DISK = 512 * 2**20
"""Of the data folder, where it can be a file system of its own."""
AUDIT_SECONDS = 0.5
SETTLING = 30.0
"""Seconds beyond a lease in which what was orphaned must be gone, on a machine that may be busy."""


def run(
    seed: int,
    faults: int,
    jobs: int,
    gap: float,
    patience: float,
    say: Callable[[str], None] = print,
    lease: float = LEASE,
    storage: str = "file",
) -> Verdict:
    """Strike ``faults`` times, every ``gap`` seconds on average, while ``jobs`` run; wait at most ``patience`` seconds more.

    With ``storage`` "s3" the processes share no folder, but a server of the S3 protocol.
    """
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        data = stack.enter_context(_data_folder(Path(name)))
        shared = s3.settings(stack.enter_context(s3.running()), "chaos") if storage == "s3" else {}
        torch.manual_seed(0)
        model = save(LlamaForCausalLM(LlamaConfig(**SIZES)), make_tokenizer(), data / "models" / "tiny")
        before = set(psutil.pids())
        with running(Path(name), data, lease, shared) as world:
            if shared:
                for path in model.iterdir():
                    open_store(world.settings).put_file(path, f"models/tiny/{path.name}")
            client = Client(world, seed, jobs)
            audit = Audit(world)
            threads = [threading.Thread(target=work) for work in (client.run, audit.run)]
            for thread in threads:
                thread.start()
            began, struck = time.monotonic(), _strike(world, random.Random(seed + 1), faults, gap, say)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and not client.all_ended():
                world.look_after()
                time.sleep(0.2)
            seconds = time.monotonic() - began
            client.ended.set()
            audit.ended.set()
            for thread in threads:
                thread.join()
            for name_of in ("api", *world.workers, "scheduler"):
                world.stop(name_of)
            left = _left(world, before)
            settled = time.monotonic() + lease + SETTLING
            while left and time.monotonic() < settled:
                time.sleep(0.2)
                left = _left(world, before)
            with world.sessions()() as session:  # as schedulers and workers do once a minute
                delete_leftovers(session, world.settings)
                for folder in world.data_folders:
                    delete_abandoned(session, world.settings.model_copy(update={"data_dir": folder}))
            verdict = judge(world, client.accepted, audit.torn, left)
            verdict.counts = {"seconds": round(seconds), "faults": sum(struck.values()), **verdict.counts}
            if not os.path.ismount(data):
                say("the disk was never filled: that takes a file system of its own, which only root may mount")
            say("struck: " + ", ".join(f"{kind} {count}" for kind, count in sorted(struck.items())))
            if verdict.faults:
                kept = Path(tempfile.mkdtemp(prefix="chaos-logs-"))
                shutil.copytree(world.folder / "logs", kept, dirs_exist_ok=True)
                say(f"logs are kept in {kept}")
            return verdict


@contextmanager
def _data_folder(folder: Path) -> Iterator[Path]:
    """A file system of its own where this process may mount one, so that it can be filled."""
    data = folder / "data"
    data.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(data)]
    mounted = shutil.which("mount") is not None and subprocess.run(argv, capture_output=True).returncode == 0
    try:
        yield data
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(data)], check=True)


def _strike(world: World, dice: random.Random, faults: int, gap: float, say: Callable[[str], None]) -> Counter[str]:
    """Strike, and make each fault good in its time; returns how often each kind struck."""
    struck: Counter[str] = Counter()
    healings: list[tuple[float, str, Callable[[], object]]] = []
    due = time.monotonic() + gap
    while struck.total() < faults or healings:
        now = time.monotonic()
        for healing in sorted(healing for healing in healings if healing[0] <= now):
            healings.remove(healing)
            healing[2]()
        if now >= due and struck.total() < faults:
            fault = dice.choices(list(FAULTS), list(FAULTS.values()))[0]
            healed = fault(world, dice)
            if healed is not None:
                struck[fault.__name__] += 1
                seconds, heal = healed
                healings.append((time.monotonic() + seconds, f"{fault.__name__} {struck.total()}", heal))
                due = time.monotonic() + dice.expovariate(1 / gap)
                if struck.total() % 20 == 0:
                    say(f"{struck.total()} faults")
        world.look_after()
        time.sleep(0.05)
    return struck


class Client:
    """Submits jobs until each is accepted, asks some to stop or to pause, and watches them end."""

    def __init__(self, world: World, seed: int, jobs: int) -> None:
        self.accepted: list[Accepted] = []
        self.ended = threading.Event()
        self._world, self._seed, self._jobs = world, seed, jobs
        self._open: dict[uuid.UUID, str | None] = {}
        """Jobs that have not ended, with what is still to be asked of them."""

    def all_ended(self) -> bool:
        return len(self.accepted) == self._jobs and not self._open

    def run(self) -> None:
        with self._world.client() as http:
            while not self.ended.wait(0.3):
                with suppress(httpx2.HTTPError, KeyError, ValueError):
                    if len(self.accepted) < self._jobs and len(self._open) < 12:
                        self._submit(http)
                    for job_id, wish in list(self._open.items()):
                        self._look(http, job_id, wish)

    def _submit(self, http: httpx2.Client) -> None:
        """With one idempotency key until it is accepted, however often the answer is lost."""
        number = len(self.accepted)
        dice = random.Random(f"{self._seed} {number}")
        repo_id = "org/shared" if dice.random() < SHARED_REPOSITORY else f"org/model-{number}"
        request = {
            "model_id": "local:tiny",
            "target_ratio": 0.3,
            "method": dice.choice(["magnitude", "piem-lsps", "secateur"]),
            "rounds": ROUNDS,
            "calibration": {"texts": english("calibration")[:2], "samples": 4, "sequence_length": 32},
            "evaluation": {
                "texts": english("evaluation")[:1],
                "samples": 2,
                "sequence_length": 32,
                "latency": False,
                "prompts": [],
            },
            "publish": {"repo_id": repo_id},
        }
        answer = http.post("/v1/jobs", json=request, headers={"Idempotency-Key": f"chaos-{number}"})
        if answer.status_code != 202:
            return
        job_id, chance = uuid.UUID(answer.json()["id"]), dice.random()
        wish = "cancel" if chance < CANCELLED else "pause" if chance < CANCELLED + PAUSED else None
        # A cancellation that comes when publishing has begun is refused.
        ends = {"succeeded", "cancelled"} if wish == "cancel" else {"succeeded"}
        self.accepted.append(Accepted(job_id, repo_id, ends))
        self._open[job_id] = wish

    def _look(self, http: httpx2.Client, job_id: uuid.UUID, wish: str | None) -> None:
        job: dict[str, Any] = http.get(f"/v1/jobs/{job_id}").json()
        if job["state"] in ("succeeded", "failed", "cancelled"):
            del self._open[job_id]
        elif wish is not None and job["state"] == "running":
            if http.post(f"/v1/jobs/{job_id}/{wish}").status_code in (200, 409):
                self._open[job_id] = "resume" if wish == "pause" else None
        elif wish == "resume" and job["state"] == "paused" and http.post(f"/v1/jobs/{job_id}/resume").is_success:
            self._open[job_id] = None


class Audit:
    """Holds the checkpoints of live jobs against their rows, again and again."""

    def __init__(self, world: World) -> None:
        self.torn: list[str] = []
        self.ended = threading.Event()
        self._world = world

    def run(self) -> None:
        sessions = self._world.sessions()
        while not self.ended.wait(AUDIT_SECONDS):
            self.torn += torn_checkpoints(sessions)


def _family(world: World, before: set[int]) -> list[psutil.Process]:
    """Processes of this machine that this run has started, and that run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = any(str(world.folder) in value for value in process.environ().values())
            if process.pid not in before and ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _left(world: World, before: set[int]) -> list[str]:
    """What this run has started and what still runs beside the servers, in words."""
    servers = {process.pid for server in ("postgres", "valkey") for process in world.family(server)}
    return [describe(process) for process in _family(world, before) if process.pid not in servers]


def describe(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.NoSuchProcess:
        return "a process that has ended since"
