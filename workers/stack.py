"""Run the whole service on one machine, for ``secateur up`` and the demo.

No process of the service outlives this process.
"""

import errno
import fcntl
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx2
from cryptography.fernet import Fernet
from sqlalchemy.orm import Session

from app import data_folder
from app.auth import service as auth
from app.config import API_URL_FILE, STACK_FILES
from app.db.migrate import upgrade
from app.db.session import make_engine
from secateur.contract.keys import KeySettings
from secateur.processes import describe_exit, spawn
from workers.devices import gpus
from workers.embedded import START_TIMEOUT, Server, free_port, start_postgres, start_valkey

log = logging.getLogger(__name__)

API_KEY_FILE = "api-key"
"""Name of the file in the data folder that holds the API key that the first start made."""
DEFAULT_PORT = 8000
STOP_SECONDS = 20.0
LONGEST_BACKOFF = 30.0
STABLE_SECONDS = 60.0


class StackError(Exception):
    """The service cannot start; the message says why and what to do."""


@dataclass
class _Role:
    """A process of the service that is started again when it dies."""

    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]
    started: float
    quick_deaths: int = 0
    not_before: float = 0.0


class Stack:
    """The whole service on one data folder.

    The service consists of Postgres, Valkey, migrations, the API, the scheduler, and a worker for each GPU (or one
    worker). The stack is used as a context manager, from the main thread. ``url`` is the address of the API,
    ``api_key`` is a key for the API, and ``key_is_new`` says that this start made the key.
    """

    url: str
    api_key: str
    key_is_new: bool

    def __init__(self, folder: Path, hub_dir: Path | None, host: str = "127.0.0.1", port: int | None = None) -> None:
        """Choose folders and address; without ``port``, the API uses port 8000, or a free port when 8000 is taken.

        Models are published to ``hub_dir``, or to a Hugging Face Hub if it is ``None``.
        """
        self.folder = folder.resolve()
        self.hub_dir = None if hub_dir is None else hub_dir.resolve()
        self.host = host
        self.port = port
        self._ended = threading.Event()
        self._roles: dict[str, _Role] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        """Start everything, and return when the service is ready.

        Raises:
            StackError, EmbeddedError: something does not start; everything that was started is stopped.
        DataFolderError, SchemaError: the data folder or the database's schema is of another version; also then.
        """
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def run(self) -> None:
        """Keep every process alive until :meth:`end` is called."""
        while not self._ended.wait(0.5):
            self._revive()

    def end(self) -> None:
        """Make :meth:`run` return; a signal handler may call this method."""
        self._ended.set()

    def _start(self) -> None:
        self._take_folder()
        port = _choose_port(self.host, self.port)
        self._start_servers()
        upgrade(self._database_url)
        self.api_key, self.key_is_new = self._keep_api_key()
        self.url = f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{port}"
        environment = os.environ | self._tell_settings()
        uvicorn = ["-m", "uvicorn", "app.main:create_app", "--factory", "--timeout-graceful-shutdown", "3"]
        self._add("api", [*uvicorn, "--host", self.host, "--port", str(port)], environment)
        self._add("scheduler", ["-m", "workers", "scheduler"], environment)
        for gpu in gpus() or [""]:  # without a GPU, one worker runs on the CPU
            self._add(f"worker{gpu}", ["-m", "workers", "worker"], environment | {"CUDA_VISIBLE_DEVICES": gpu})
        self._wait_until_ready()

    def _tell_settings(self) -> dict[str, str]:
        """Return the variables of the service's processes, and write them to the files that other commands read.

        :meth:`app.config.Settings.nearest` reads the files.
        """
        settings = {
            "database_url": self._database_url,
            "broker_url": self._broker_url,
            "secret_keys": os.environ.get("SECATEUR_SECRET_KEYS") or self._keep_secret_key(),
            "hub_dir": "" if self.hub_dir is None else str(self.hub_dir),
        }
        for name, value in settings.items():
            if value:
                _write_private(self.folder / STACK_FILES[name], value)
            else:
                (self.folder / STACK_FILES[name]).unlink(missing_ok=True)
        _write_private(self.folder / API_URL_FILE, self.url)
        variables = {f"SECATEUR_{name.upper()}": value for name, value in settings.items() if value}
        return {**variables, "SECATEUR_DATA_DIR": str(self.folder)}

    def _start_servers(self) -> None:
        """Start Postgres and Valkey.

        Ports and password stay the same, so that the other processes find a server again that died and was restarted.
        """
        postgres_port, valkey_port, password = free_port(), free_port(), secrets.token_urlsafe(24)

        def postgres() -> Server:
            return start_postgres(self.folder / "postgres", postgres_port)

        def valkey() -> Server:
            return start_valkey(self.folder / "valkey", valkey_port, password)

        server = postgres()
        self._database_url = server.url
        self._roles["postgres"] = _Role(lambda: postgres().process, server.process, time.monotonic())
        server = valkey()
        self._broker_url = server.url
        self._roles["valkey"] = _Role(lambda: valkey().process, server.process, time.monotonic())

    def _add(self, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)

        def start() -> subprocess.Popen[bytes]:
            with (logs / f"{name}.log").open("ab") as output:
                argv = [sys.executable, *arguments]
                return spawn(argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

        self._roles[name] = _Role(start, start(), time.monotonic())

    def _revive(self) -> None:
        for name, role in self._roles.items():
            code, now = role.process.poll(), time.monotonic()
            if code is None:
                continue
            if role.not_before == 0.0:
                role.quick_deaths = role.quick_deaths + 1 if now - role.started < STABLE_SECONDS else 0
                wait = min(LONGEST_BACKOFF, 2.0**role.quick_deaths - 1)
                role.not_before = now + wait
                log.warning("%s %s; starting it again in %.0f s", name, describe_exit(code), wait)
            if now >= role.not_before:
                role.process, role.started, role.not_before = role.start(), time.monotonic(), 0.0

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        state = "no answer"
        while time.monotonic() < deadline and not self._ended.wait(0.2):
            for name, role in self._roles.items():
                if (code := role.process.poll()) is not None:
                    raise StackError(f"{name} {describe_exit(code)}; see {self.folder / 'logs' / name}.log")
            try:
                answer = httpx2.get(f"{self.url}/readyz", timeout=5, trust_env=False)
            except httpx2.TransportError:
                continue
            if answer.status_code == 200:
                return
            state = answer.text
        if not self._ended.is_set():
            raise StackError(f"not ready after {START_TIMEOUT:.0f} s ({state}); see {self.folder / 'logs'}")

    def _stop(self) -> None:
        """Stop the processes in the reverse of the starting order, so that a worker can still release its job."""
        for role in reversed(self._roles.values()):
            if role.process.poll() is None:
                # For Postgres SIGINT is "fast shutdown"; after SIGTERM Postgres would wait for its clients.
                role.process.send_signal(signal.SIGINT if role is self._roles["postgres"] else signal.SIGTERM)
            try:
                role.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                role.process.kill()
                role.process.wait()
        self._roles.clear()
        if self._lock is not None:
            self._lock.close()

    def _take_folder(self) -> None:
        """Lock the data folder, on which only one service may run.

        The kernel releases the lock however this process ends.
        """
        data_folder.claim(self.folder)
        self._lock = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            pid = self._lock.read().strip()
            raise StackError(f"another service already runs on {self.folder} (process {pid})") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def _keep_secret_key(self) -> str:
        path = self.folder / STACK_FILES["secret_keys"]
        if not path.exists():
            _write_private(path, Fernet.generate_key().decode())
        return path.read_text().strip()

    def _keep_api_key(self) -> tuple[str, bool]:
        """Return the key in the data folder if the database knows it, else a new key; and whether it is new."""
        path = self.folder / API_KEY_FILE
        engine = make_engine(self._database_url)
        with Session(engine, expire_on_commit=False) as session:
            secret = path.read_text().strip() if path.exists() else ""
            is_new = not secret or auth.authenticate(session, secret) is None
            if is_new:
                own = KeySettings(namespace="secateur", lend_hub_token=True)
                secret = auth.create(session, "secateur up", [*auth.Scope], own)[1]
                _write_private(path, secret)
            session.commit()
        engine.dispose()
        return secret, is_new


def _write_private(path: Path, line: str) -> None:
    """Write ``line`` to a file that no other user can read."""
    path.touch(mode=0o600)
    path.write_text(line + "\n")


def _choose_port(host: str, port: int | None) -> int:
    """Return ``port`` or, if it is unset, the default port, or a free port when the default port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or DEFAULT_PORT))
        except OSError as error:
            if port is not None or error.errno != errno.EADDRINUSE:
                chosen = f"{host} port {port or DEFAULT_PORT}"
                raise StackError(f"cannot listen on {chosen}: {error.strerror}; choose --host and --port") from None
            return free_port()
    return port or DEFAULT_PORT
