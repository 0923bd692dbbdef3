"""The whole service as processes that can be killed, frozen and started again, and a Hub that can misbehave."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from app.auth import service as auth
from app.config import Settings
from app.db.migrate import upgrade
from secateur.contract.keys import KeySettings
from secateur.processes import spawn
from tests import hub as fake_hub
from tests.chaos.proxy import Proxy
from tests.hub import FakeHub
from tests.patience import PATIENCE
from workers.embedded import free_port, start_postgres, start_valkey

WORKERS = 3
PASSWORD = "chaos"
LEASE = 6.0
"""Seconds. Within them, less a third, a process must start: a test that may run on a busy machine asks for more."""
TIMES = {
    "HEARTBEAT_INTERVAL": "0.5",
    "SCHEDULER_INTERVAL": "0.3",
    "RETRY_BACKOFF": "0.05",
    "MAX_FAILURES": "50",
}
"""Short, and patient with jobs that are struck again and again: each must end well."""


@dataclass
class Role:
    """A process of the service. ``wanted``: whether it should be running now."""

    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]
    wanted: bool = True


@dataclass
class World:
    """``data`` is the service's data folder, ``notes`` its witnesses', ``temporary`` where its processes put scratch files."""

    folder: Path
    data: Path
    hub: FakeHub
    lease: float = LEASE
    storage: dict[str, str] = field(default_factory=dict)
    """The environment variables of an object store; without them, all processes share ``data``, else none do."""
    url: str = ""
    database_url: str = ""
    broker_url: str = ""
    secret: str = ""
    roles: dict[str, Role] = field(default_factory=dict)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    """Processes that ended though nobody had killed them."""

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def workers(self) -> list[str]:
        return [name for name in self.roles if name.startswith("worker")]

    @property
    def settings(self) -> Settings:
        options = {name.removeprefix("SECATEUR_").lower(): value for name, value in self.storage.items()}
        return Settings(database_url=self.database_url, data_dir=self.data, **options)  # type: ignore[arg-type]

    def data_of(self, name: str) -> Path:
        """The data folder of a process: with an object store, each has a disk of its own."""
        return self.folder / "disks" / name if self.storage else self.data

    @property
    def data_folders(self) -> set[Path]:
        return {self.data_of(name) for name in self.roles}

    def sessions(self) -> sessionmaker[Session]:
        return sessionmaker(create_engine(self.database_url, pool_pre_ping=True))

    def add(self, name: str, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.roles[name] = Role(start, start())

    def kill(self, name: str) -> None:
        """As the kernel does it: no last words."""
        role = self.roles[name]
        # Frozen children of a database would not notice its death, and the next one would wait for them.
        children = self.family(name)[1:] if name == "postgres" else []
        role.wanted = False
        role.process.kill()
        role.process.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.resume()

    def stop(self, name: str) -> None:
        """As an operator does it, who then waits."""
        role = self.roles[name]
        role.wanted = False
        for process in self.family(name):  # which a frozen one could not heed
            with suppress(psutil.NoSuchProcess):
                process.resume()
        if role.process.poll() is None:
            role.process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
            try:
                role.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.unexpected.append(f"{name} did not stop within {PATIENCE:g} s of SIGTERM")
                self.kill(name)

    def start(self, name: str) -> None:
        role = self.roles[name]
        if not role.wanted:
            role.process, role.wanted = role.start(), True

    def look_after(self) -> None:
        """Start again what ended by itself, and remember that it did."""
        for name, role in self.roles.items():
            if role.wanted and (code := role.process.poll()) is not None:
                self.unexpected.append(f"{name} ended by itself with {code}")
                role.process = role.start()

    def family(self, name: str) -> list[psutil.Process]:
        """The process and all that descend from it."""
        try:
            top = psutil.Process(self.roles[name].process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill_family(self, name: str) -> None:
        """Kill a process and all that descend from it at once, as the end of their machine does."""
        role, family = self.roles[name], self.family(name)
        role.wanted = False
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        role.process.wait()
        psutil.wait_procs(family, timeout=PATIENCE)

    def children(self, name: str, module: str) -> list[psutil.Process]:
        """Of the role's descendants those that run ``module``."""
        found = []
        for process in self.family(name)[1:]:
            with suppress(psutil.NoSuchProcess):
                if any(module in part for part in process.cmdline()):
                    found.append(process)
        return found

    def client(self) -> httpx2.Client:
        return httpx2.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.secret}"}, timeout=10, trust_env=False
        )


@contextmanager
def running(folder: Path, data: Path, lease: float = LEASE, storage: dict[str, str] | None = None) -> Iterator[World]:
    """The service, up; ``data`` may be a file system of its own."""
    with fake_hub.running() as hub:
        world = World(folder, data, hub, lease, storage or {})
        for path in (world.notes, world.temporary, folder / "logs"):
            path.mkdir(parents=True)
        try:
            _start(world)
            yield world
        finally:
            for name in reversed(world.roles):
                for process in world.family(name):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                world.roles[name].process.wait()
            for proxy in world.proxies.values():
                proxy.close()


def _start(world: World) -> None:
    postgres_port, valkey_port, api_port = free_port(), free_port(), free_port()
    postgres = start_postgres(world.folder / "postgres", postgres_port)
    valkey = start_valkey(world.folder / "valkey", valkey_port, PASSWORD)
    world.database_url, world.broker_url = postgres.url, valkey.url
    world.roles["postgres"] = Role(
        lambda: start_postgres(world.folder / "postgres", postgres_port).process, postgres.process
    )
    world.roles["valkey"] = Role(
        lambda: start_valkey(world.folder / "valkey", valkey_port, PASSWORD).process, valkey.process
    )
    upgrade(world.database_url)
    with world.sessions()() as session:
        _, world.secret = auth.create(session, "chaos", settings=KeySettings(namespace="org", lend_hub_token=True))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SECATEUR_", "HF_"))}
    environment |= {f"SECATEUR_{name}": value for name, value in TIMES.items()}
    environment |= {
        "SECATEUR_LEASE_TTL": str(world.lease),
        "SECATEUR_LEASE_MARGIN": str(world.lease / 3),
        "SECATEUR_DATABASE_URL": world.database_url,
        "SECATEUR_BROKER_URL": world.broker_url,
        "SECATEUR_TORCH_THREADS": "1",
        "SECATEUR_CHAOS_NOTES": str(world.notes),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(world.temporary),
        "HF_HOME": str(world.folder / "hf"),
        "HF_TOKEN": fake_hub.TOKEN,
        "HF_ENDPOINT": world.hub.url,
        "HF_HUB_DISABLE_XET": "1",
        **world.storage,
    }

    def process(name: str, arguments: list[str], changes: dict[str, str]) -> None:
        def start() -> subprocess.Popen[bytes]:
            with (world.folder / "logs" / f"{name}.log").open("ab") as log:
                argv = [sys.executable, *arguments]
                env = environment | {"SECATEUR_DATA_DIR": str(world.data_of(name))} | changes
                return spawn(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        world.add(name, start)

    process("api", ["-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(api_port)], {})
    world.url = f"http://127.0.0.1:{api_port}"
    process("scheduler", ["-m", "workers", "scheduler"], {})
    for number in range(WORKERS):
        name = f"worker{number}"
        world.proxies[name] = Proxy(postgres_port)
        url = world.database_url.replace(f":{postgres_port}/", f":{world.proxies[name].port}/")
        celery = ["-m", "celery", "-A", "tests.chaos.worker", "worker", "--loglevel", "INFO", "--hostname", name]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        process(name, [*celery, *quiet], {"SECATEUR_DATABASE_URL": url})
