"""Build the layout of the image without Docker, and run the service and two jobs in it: ``make test-image``.

The script reads in the Dockerfile what the image copies, installs and sets, so the layout that is tested is that of the
image: a wheel built from the files of the build stage, installed with the extras into a virtual environment, and the
folders of the service beside it. Nothing is installed in editable mode, and the checkout is on no path.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from scripts import fresh
from scripts.fresh import ROOT, Failure, Venv, check, run, step

METHODS = ("dsgp", "secateur")
PORT = "8000"
"""Port of the API in a container."""
READY_SECONDS = 240.0


@dataclass(frozen=True)
class Stage:
    """One stage of a Dockerfile: its instructions in order, each with its arguments."""

    instructions: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        """Return the arguments of every instruction ``name``."""
        return [arguments for instruction, arguments in self.instructions if instruction == name]

    def one(self, name: str) -> str:
        """Return the arguments of the last instruction ``name``, which is the one that holds."""
        return self.all(name)[-1]

    @property
    def copied(self) -> list[tuple[str, str]]:
        """Pairs of what ``COPY`` takes from the build context and where ``COPY`` puts it."""
        pairs = []
        for arguments in self.all("COPY"):
            *sources, target = shlex.split(arguments)
            if not sources[0].startswith("--from"):
                pairs += [(source, target) for source in sources]
        return pairs

    @property
    def variables(self) -> dict[str, str]:
        """Variables that ``ENV`` sets."""
        return dict(setting.split("=", 1) for arguments in self.all("ENV") for setting in shlex.split(arguments))

    @property
    def defaults(self) -> dict[str, str]:
        """Build arguments that ``ARG`` declares, with their default values."""
        return dict(arguments.split("=", 1) for arguments in self.all("ARG"))

    @property
    def command(self) -> list[str]:
        """Arguments of ``CMD``."""
        argv: list[str] = json.loads(self.one("CMD"))
        return argv

    @property
    def health_command(self) -> list[str]:
        """Arguments of the image's own ``HEALTHCHECK``."""
        argv: list[str] = json.loads(self.one("HEALTHCHECK").partition(" CMD ")[2])
        return argv


def read_dockerfile() -> tuple[Stage, Stage]:
    """Return the stage that builds, and the stage that runs."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stages: list[list[tuple[str, str]]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            stages.append([])
        elif stages:
            stages[-1].append((instruction, arguments))
    build, final = map(Stage, stages)
    return build, final


def main() -> None:
    """Build the layout, run the service and the jobs in it, and start the image's own command."""
    build, final = read_dockerfile()
    with tempfile.TemporaryDirectory(prefix="secateur-image-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # if this process is root, Postgres runs as another user
        with step("install what the first stage installs"):
            context = fresh.copy_checkout(folder / "context", [source for source, _ in build.copied])
            venv = Venv(folder / "venv")
            pip = [str(venv.python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
            run([*pip, "wheel", "--no-deps", "--wheel-dir", "dist", "."], context, changes=fresh.CONSTRAINED)
            (wheel,) = (context / "dist").glob("secateur-*.whl")
            venv.install(f"{wheel}[{build.defaults['EXTRAS']}]")
        home = fresh.copy_checkout(folder / "srv", [source for source, _ in final.copied])
        data = folder / "data"
        data.mkdir()
        variables = {"SECATEUR_HOME": str(home), "SECATEUR_DATA_DIR": str(data), "HF_HOME": str(data / "huggingface")}
        check(variables.keys() <= final.variables.keys(), f"the image sets {sorted(final.variables)}")
        variables |= {"PATH": f"{venv.bin}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with step("run the service and two jobs"):
            done = run([venv.python, ROOT / "scripts" / "in_image.py", *METHODS], data, changes=variables)
            print(done.stdout, end="")
        with step("run the image's own command"):
            check_command(final, home, data, variables)


def check_command(stage: Stage, home: Path, data: Path, variables: dict[str, str]) -> None:
    """Check that the image's command, on a free port, starts an API that the image's health check finds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    check(PORT in stage.command, f"the image's command names no port {PORT}: {stage.command}")
    command = [port if argument == PORT else argument for argument in stage.command]
    health_command = [*stage.health_command, "--url", f"http://127.0.0.1:{port}"]
    log = data / "api.log"
    with log.open("wb") as output:
        api = subprocess.Popen(command, cwd=home, env=fresh.environment(variables), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            check(api.poll() is None and time.monotonic() < deadline, f"{command} does not run:\n{log.read_text()}")
            try:
                print(run(health_command, home, changes=variables).stdout, end="")
                return
            except Failure:
                time.sleep(0.5)
    finally:
        api.send_signal(signal.SIGTERM)
        api.wait()


if __name__ == "__main__":
    fresh.main(main)
