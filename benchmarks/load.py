"""``make bench-load``: one API process under many clients, polling against a bare route, and queries over many finished jobs.

The benchmark starts its own Postgres and Valkey; this process acts as the clients and the workers. It writes
``load.json`` and ``load.md``.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import httpx2
import numpy as np
import psutil
import psycopg
from safetensors.numpy import save_file
from sqlalchemy import make_url, select
from sqlalchemy.orm import Session, sessionmaker

from app.auth import service as auth
from app.config import Settings
from app.db.migrate import upgrade
from app.db.session import make_engine
from app.jobs import leases, repository
from app.jobs.models import Job, JobEvent
from app.jobs.transitions import Trigger
from benchmarks.history import fill, queries
from benchmarks.load_client import Client
from benchmarks.table import markdown
from secateur.processes import spawn
from workers.embedded import free_port, start_postgres, start_valkey

PLAIN_POLLERS, LONG_POLLERS, SUBMITTERS, STREAMS = 100, 100, 20, 50
JOBS = 50
PAUSE = 1.0
"""Seconds between an answer and the next request of a client."""
CHANGE_EVERY = 0.1
"""Seconds between two changes, each of one of the jobs."""
CLOSED_LOOP_CLIENTS = 16
TURNS, TURN_SECONDS = 5, 3.0
LEAST_RATIO = 0.6
PASTS = (100, 100_000)
REPEATS = 20
TTL = 3600.0
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the mixed load")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    with Bench(
        SECATEUR_MAX_WAITING="1000", SECATEUR_MAX_OPEN_JOBS="1000000"
    ) as bench:  # one key stands for many tenants
        found = {
            "cores": os.cpu_count(),
            "polling": asyncio.run(compare_polling(bench)),
            "load": asyncio.run(Load(bench).run(arguments.seconds)),
            "past": compare_pasts(bench),
            "versions": {name: version(name) for name in ("secateur", "fastapi", "uvicorn", "sqlalchemy", "psycopg")},
        }
    (arguments.output / "load.json").write_text(json.dumps(found, indent=1) + "\n")
    text = render(found)
    (arguments.output / "load.md").write_text(text)
    print(text)


class Bench:
    """A context manager with the servers, the API, the bare application, and one API key with its jobs."""

    def __init__(self, **settings: str) -> None:
        """Take environment variables of the service, beside those of its addresses and folders."""
        self._settings = settings

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="secateur-load-")))
        folder.chmod(0o711)  # Postgres runs as another user when this one is root
        self.postgres = start_postgres(folder / "postgres", free_port())
        self._stack.callback(self.postgres.stop)
        valkey = start_valkey(folder / "valkey", free_port(), "secret")
        self._stack.callback(valkey.stop)
        self.sessions = self.database("load")
        self.settings = Settings(
            database_url=str(self.url("load")), broker_url=valkey.url, data_dir=folder / "data", hub_dir=folder / "hub"
        )
        with self.sessions() as session:
            key, secret = auth.create(session, "load")
        self.owner_id, self.headers = key.id, {"Authorization": f"Bearer {secret}"}
        self._make_model(self.settings.models_dir / "tiny")
        environment = (
            os.environ
            | {
                "SECATEUR_DATABASE_URL": self.settings.database_url,
                "SECATEUR_BROKER_URL": self.settings.broker_url,
                "SECATEUR_DATA_DIR": str(self.settings.data_dir),
                "SECATEUR_HUB_DIR": str(self.settings.hub_dir),
                "SECATEUR_RATE_LIMIT": "1000000/minute",  # counted, and never reached
            }
            | self._settings
        )
        self.api, self.api_port = self._start("app.main:create_app", "/healthz", environment, folder / "api.log")
        self.bare, self.bare_port = self._start(
            "benchmarks.bare:create_app", "/openapi.json", environment, folder / "bare.log"
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def url(self, database: str) -> str:
        return make_url(self.postgres.url).set(database=database).render_as_string(hide_password=False)

    def database(self, name: str) -> sessionmaker[Session]:
        """Create a database with all tables and return its sessions."""
        with psycopg.connect(self.postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        upgrade(self.url(name))
        engine = make_engine(self.url(name))
        self._stack.callback(engine.dispose)
        return sessionmaker(engine, expire_on_commit=False)

    def make_jobs(self, count: int) -> list[uuid.UUID]:
        with self.sessions() as session:
            jobs = [
                Job(owner_id=self.owner_id, request={"rounds": 3}, model_id="local:tiny", method="flap", labels={})
                for _ in range(count)
            ]
            for job in jobs:
                repository.add(session, job)
            session.commit()
            return [job.id for job in jobs]

    def _start(
        self, factory: str, path: str, environment: dict[str, str], log: Path
    ) -> tuple[subprocess.Popen[bytes], int]:
        port = free_port()
        argv = [sys.executable, "-m", "uvicorn", factory, "--factory", "--port", str(port)]
        with log.open("wb") as output:
            process = spawn(argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx2.get(f"http://127.0.0.1:{port}{path}", trust_env=False).raise_for_status()
                return process, port
            except httpx2.TransportError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit(f"{factory} did not start:\n{log.read_text()}") from None
                time.sleep(0.1)

    @staticmethod
    def _make_model(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "tokenizer.json").write_text("{}")
        save_file({"model.norm.weight": np.zeros(4, dtype=np.float32)}, folder / "model.safetensors")

    def cpu_seconds(self) -> dict[str, float]:
        """Return the processor time that each process has used so far."""
        servers = psutil.Process(self.postgres.process.pid)
        return {
            "API": _cpu_seconds(psutil.Process(self.api.pid)),
            "bare": _cpu_seconds(psutil.Process(self.bare.pid)),
            "Postgres": sum(map(_cpu_seconds, [servers, *servers.children(recursive=True)])),
            "clients": _cpu_seconds(psutil.Process()),
        }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def compare_polling(bench: Bench) -> dict[str, Any]:
    """Measure the requests per second of polling one job by the API and by the bare route, in turns, and the processor cores used."""
    [job_id] = bench.make_jobs(1)
    routes = {
        "API": (bench.api_port, f"/v1/jobs/{job_id}"),
        "bare": (bench.bare_port, f"/jobs/{job_id}"),
    }
    rates: dict[str, list[float]] = {name: [] for name in routes}
    cpu: dict[str, dict[str, float]] = {name: defaultdict(float) for name in routes}
    for turn in range(TURNS + 1):
        for name, (port, path) in routes.items():
            before = bench.cpu_seconds()
            rate = await _closed_loop(port, path, bench.headers)
            if turn:  # the first turn warms up
                rates[name].append(rate)
                for process, seconds in bench.cpu_seconds().items():
                    cpu[name][process] += (seconds - before[process]) / (TURNS * TURN_SECONDS)
    ratios = [ours / bare for ours, bare in zip(rates["API"], rates["bare"], strict=True)]
    return {"rates": rates, "cores": cpu, "ratio": statistics.median(ratios), "ratios": ratios}


async def _closed_loop(port: int, path: str, headers: dict[str, str]) -> float:
    end = time.monotonic() + TURN_SECONDS

    async def poll() -> int:
        count = 0
        async with Client(port, headers) as client:
            while time.monotonic() < end:
                answer = await client.request("GET", path)
                if answer.status != 200:
                    raise SystemExit(f"{path}: {answer}")
                count += 1
        return count

    return sum(await asyncio.gather(*(poll() for _ in range(CLOSED_LOOP_CLIENTS)))) / TURN_SECONDS


class Load:
    """All kinds of clients at the same time, on jobs that a thread changes in place of the workers."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.jobs = bench.make_jobs(JOBS)
        self.changed: dict[uuid.UUID, float] = {}
        """The time just before the newest change of each job was committed."""
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self.ended = threading.Event()

    async def run(self, seconds: float) -> dict[str, Any]:
        before = self.bench.cpu_seconds()
        following = [asyncio.create_task(self._kept("stream", self._follow, job_id)) for job_id in self.jobs[:STREAMS]]
        working = asyncio.create_task(asyncio.to_thread(self._work))
        started = time.monotonic()
        self.end = started + seconds
        kinds: list[tuple[str, Callable[[uuid.UUID], Awaitable[None]], int]] = [
            ("poll", self._poll, PLAIN_POLLERS),
            ("long poll", self._long_poll, LONG_POLLERS),
            ("submit", self._submit, SUBMITTERS),
        ]
        asking = [
            asyncio.create_task(self._kept(kind, ask, self.jobs[number % JOBS]))
            for kind, ask, count in kinds
            for number in range(count)
        ]
        await asyncio.sleep(seconds)
        self.ended.set()  # the jobs end, and with them the long polls and the streams
        took, after = time.monotonic() - started, self.bench.cpu_seconds()
        await asyncio.wait_for(asyncio.gather(working, *asking, *following), 60)
        cores = {name: (after[name] - before[name]) / took for name in after}
        return {"seconds": took, "kinds": self.seconds, "errors": self.errors, "cores": cores}

    async def _kept(self, kind: str, ask: Callable[[uuid.UUID], Awaitable[None]], job_id: uuid.UUID) -> None:
        """Run one client. An exception is recorded as an error and ends this client."""
        try:
            await ask(job_id)
        except (OSError, EOFError, ValueError) as error:
            self.errors.append(f"{kind}: {error!r}")

    async def _poll(self, job_id: uuid.UUID) -> None:
        await asyncio.sleep(random.random() * PAUSE)
        async with Client(self.bench.api_port, self.bench.headers) as client:
            while time.monotonic() < self.end:
                begun = time.monotonic()
                answer = await client.request("GET", f"/v1/jobs/{job_id}")
                self._note("poll", answer.status, 200, time.monotonic() - begun)
                await asyncio.sleep(PAUSE)

    async def _long_poll(self, job_id: uuid.UUID) -> None:
        """Measure the time from a change to the answer that contains it."""
        headers: dict[str, str] = {}
        async with Client(self.bench.api_port, self.bench.headers) as client:
            while time.monotonic() < self.end:
                answer = await client.request("GET", f"/v1/jobs/{job_id}", **headers)
                if answer.status == 304:
                    continue
                if answer.status != 200:
                    raise ValueError(f"status {answer.status}")
                changed = self.changed.get(job_id)
                if headers and changed is not None:
                    self._note("long poll", answer.status, 200, time.monotonic() - changed)
                headers = {"Prefer": "wait=20", "If_None_Match": answer.headers["etag"]}

    async def _submit(self, _: uuid.UUID) -> None:
        await asyncio.sleep(random.random() * PAUSE)
        body = {"model_id": "local:tiny", "target_ratio": 0.2, "method": "piem-lsps", "rounds": 3}
        async with Client(self.bench.api_port, self.bench.headers) as client:
            while time.monotonic() < self.end:
                begun = time.monotonic()
                key = str(uuid.uuid4())
                answer = await client.request("POST", "/v1/jobs", body, Idempotency_Key=key)
                self._note("submit", answer.status, 202, time.monotonic() - begun)
                await asyncio.sleep(PAUSE)

    async def _follow(self, job_id: uuid.UUID) -> None:
        """Follow a stream from its first event to its end, and measure the time from a change to its frame."""
        seen, last = [], ""
        async with Client(self.bench.api_port, self.bench.headers) as client:
            async for frame in client.frames(f"/v1/jobs/{job_id}/events/stream"):
                last = frame["event"]
                if "id" in frame:
                    seen.append(int(frame["id"]))
                if job_id in self.changed and last != "end":
                    self.seconds["stream"].append(time.monotonic() - self.changed[job_id])
        if last != "end":
            self.errors.append(f"stream: ended with '{last}'")
        with self.bench.sessions() as session:
            stored = session.scalars(select(JobEvent.id).where(JobEvent.job_id == job_id).order_by(JobEvent.id)).all()
        if seen != list(stored):
            self.errors.append(f"stream: {len(seen)} events of {len(stored)}")

    def _note(self, kind: str, status: int, expected: int, seconds: float) -> None:
        self.seconds[kind].append(seconds)
        if status != expected:
            self.errors.append(f"{kind}: {status}")

    def _work(self) -> None:
        """Act as the workers: claim the jobs, change one at a time, and let all succeed at the end."""
        with self.bench.sessions() as session:
            for job_id in self.jobs:
                self._change(job_id, lambda: leases.claim(session, job_id, "load", TTL))  # noqa: B023
            step = 0
            while not self.ended.wait(CHANGE_EVERY):
                step += 1
                job_id = random.choice(self.jobs)
                shown = {"stage": "scoring", "step": 1, "steps": 3, "share": step % 100 / 100}
                news = {"type": "warning", "data": {"step": step}} if step % 2 else None
                self._change(job_id, lambda: leases.report_progress(session, job_id, 1, shown, news))  # noqa: B023
            for job_id in self.jobs:
                leases.move(session, job_id, 1, Trigger.PUBLISH)
                self._change(job_id, lambda: leases.move(session, job_id, 1, Trigger.SUCCEED, result={}))  # noqa: B023

    def _change(self, job_id: uuid.UUID, change: Callable[[], object]) -> None:
        self.changed[job_id] = time.monotonic()
        change()


def compare_pasts(bench: Bench) -> dict[str, dict[str, float]]:
    """Return the milliseconds (medians) of each query with few and with many finished jobs, measured in turns."""
    measured: dict[str, dict[int, list[float]]] = defaultdict(lambda: {past: [] for past in PASTS})
    opened = []
    for past in PASTS:
        sessions = bench.database(f"past_{past}")
        with sessions() as session:
            owner, _ = auth.create(session, "owner")
            fill(session, owner.id, past)
        opened.append((past, sessions, queries(bench.settings, owner.id)))
    for turn in range(REPEATS + 5):
        for past, sessions, asked in opened:
            for name, query in asked.items():
                with sessions() as session:
                    session.connection()
                    begun = time.perf_counter()
                    query(session)
                    seconds = time.perf_counter() - begun
                if turn >= 5:  # the first turns warm up
                    measured[name][past].append(1000 * seconds)
    return {
        name: {str(past): statistics.median(times) for past, times in by_past.items()}
        for name, by_past in measured.items()
    }


def render(found: dict[str, Any]) -> str:
    polling, load = found["polling"], found["load"]
    rates = [
        [
            name,
            f"{statistics.median(polling['rates'][name]):.0f}",
            *(f"{polling['cores'][name][process]:.2f}" for process in ("API", "bare", "Postgres", "clients")),
        ]
        for name in ("API", "bare")
    ]
    kinds = []
    for kind, clients in (
        ("poll", PLAIN_POLLERS), ("long poll", LONG_POLLERS), ("submit", SUBMITTERS), ("stream", STREAMS)
    ):  # fmt: skip
        seconds = load["kinds"][kind]
        cuts = statistics.quantiles(seconds, n=100)
        errors = sum(error.startswith(f"{kind}:") for error in load["errors"])
        kinds.append(
            [kind, str(clients), f"{len(seconds) / load['seconds']:.1f}"]
            + [f"{1000 * cuts[percent - 1]:.0f}" for percent in (50, 95, 99)]
            + [str(errors)]
        )
    pasts = []
    for name, times in found["past"].items():
        short, long = (times[str(past)] for past in PASTS)
        pasts.append([name, f"{short:.2f}", f"{long:.2f}", f"{long / short:.2f}"])
    cores = ", ".join(f"{name} {share:.2f}" for name, share in load["cores"].items() if name != "bare")
    verdict = "" if polling["ratio"] >= LEAST_RATIO else f" This is less than the goal of {LEAST_RATIO:g}."
    return f"""# Load

One API process, one Postgres and one Valkey run on {
        found["cores"]
    } cores, which the clients share. The figures compare parts of \
the service. They do not show what a server with its own cores can do.

## Polling against a bare route

{
        CLOSED_LOOP_CLIENTS
    } clients send `GET /v1/jobs/{{id}}` without a pause. The bare route is FastAPI and psycopg alone: it reads one \
row by its id. The two take turns, {TURNS} turns of {
        TURN_SECONDS:g} s each. The columns after the rate are processor cores in use. \
Ratio of the rates (median of the turns): **{polling["ratio"]:.2f}**, {min(polling["ratios"]):.2f} to {
        max(polling["ratios"]):.2f}.{verdict}

{markdown(["", "requests per second", "API", "bare", "Postgres", "clients"], rates)}

## All kinds of clients at once

The load lasts {load["seconds"]:.0f} s. Of {JOBS} jobs, one changes every {CHANGE_EVERY:g} s. Processor cores in use: {
        cores
    }.

| clients | time that is measured |
| --- | --- |
| poll, submit | from the request to the answer; each client pauses for {PAUSE:g} s before its next request |
| long poll (`Prefer: wait=20`), stream | from just before a change is committed until the client receives it |

Errors are unexpected statuses, timeouts, dropped streams, and events that a stream missed.

{markdown(["clients", "number", "per second", "p50 ms", "p95 ms", "p99 ms", "errors"], kinds)}

## {PASTS[1]:,} finished jobs against {PASTS[0]}

Milliseconds of each query: medians of {REPEATS} repeats, measured in turns in one run.

{markdown(["query", f"{PASTS[0]}", f"{PASTS[1]:,}", "ratio"], pasts)}

Versions: {", ".join(f"{name} {number}" for name, number in found["versions"].items())}.
"""


if __name__ == "__main__":
    main()
