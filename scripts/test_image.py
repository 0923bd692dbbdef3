"""``make test-image``: the layout of the image, built without Docker, runs the service and two jobs.

The Dockerfile is read for what it copies, installs and sets, so the layout that is tested is that of the image: a wheel built
from the files of the build stage, installed with the extras into a venv, and the folders of the service beside it. Nothing is
installed in editable mode, and the checkout is on no path.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import fresh
from scripts.fresh import ROOT, Failure, Venv, check, run, step

METHODS = ("dsgp", "secateur")
REQUEST = {
    "calibration": {"samples": 8, "sequence_length": 64},
    "evaluation": {"samples": 8, "sequence_length": 64, "latency": False},
}
READY_SECONDS = 240.0


@dataclass(frozen=True)
class Stage:
    """One stage of a Dockerfile: its instructions in order, each with its arguments."""

    instructions: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        """The arguments of every instruction ``name``."""
        return [arguments for instruction, arguments in self.instructions if instruction == name]

    def one(self, name: str) -> str:
        """The arguments of the only instruction ``name``."""
        (arguments,) = self.all(name)
        return arguments

    @property
    def copied(self) -> list[tuple[str, str]]:
        """What ``COPY`` takes from the build context, and where it goes; of several sources each with the folder."""
        pairs = []
        for arguments in self.all("COPY"):
            *sources, target = shlex.split(arguments)
            if not sources[0].startswith("--from"):
                pairs += [(source, target) for source in sources]
        return pairs

    @property
    def variables(self) -> dict[str, str]:
        """What ``ENV`` sets."""
        return dict(setting.split("=", 1) for arguments in self.all("ENV") for setting in shlex.split(arguments))

    @property
    def defaults(self) -> dict[str, str]:
        """What ``ARG`` declares, with the default values."""
        return dict(arguments.split("=", 1) for arguments in self.all("ARG"))


def read_dockerfile(path: Path) -> tuple[Stage, Stage]:
    """The stage that builds, and the stage that runs."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
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


def health_command(stage: Stage) -> list[str]:
    """The argv of the image's own health check."""
    command: list[str] = json.loads(stage.one("HEALTHCHECK").partition(" CMD ")[2])
    return command


def main() -> None:
    """Build the layout, run the service in it, and run both jobs."""
    build, final = read_dockerfile(ROOT / "Dockerfile")
    with tempfile.TemporaryDirectory(prefix="secateur-image-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # Postgres runs as another user when this is root
        with step("install what the first stage installs"):
            context = fresh.copy_checkout(folder / "context", [source for source, _ in build.copied])
            venv = Venv(folder / "venv")
            pip = [str(venv.python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
            run([*pip, "wheel", "--no-deps", "--wheel-dir", "dist", "."], context, changes=fresh.CONSTRAINED)
            (wheel,) = (context / "dist").glob("secateur-*.whl")
            venv.install(f"{wheel}[{build.defaults['EXTRAS']}]")
        home = fresh.copy_checkout(folder / "srv", [source for source, _ in final.copied])
        data = folder / "data"
        variables = {"SECATEUR_HOME": str(home), "SECATEUR_DATA_DIR": str(data), "HF_HOME": str(data / "huggingface")}
        check(variables.keys() <= final.variables.keys(), f"the image sets {sorted(final.variables)}")
        variables |= {"PATH": f"{venv.bin}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with step("make a model"):
            data.mkdir()
            run([venv.python, ROOT / "scripts" / "tiny_model.py", data], data, changes=variables)
            (data / "models").mkdir()
            (data / "model").rename(data / "models" / "tiny")
        with service(venv, home, data, variables) as (url, key):
            variables |= {"SECATEUR_URL": url, "SECATEUR_API_KEY": key}
            with step("two jobs"):
                for method in METHODS:
                    run_job(venv, method, data, variables)
            with step("health checks"):
                check_health(final, home, url, variables)
            with step("the image's own command"):
                check_command(final, home, data, variables)
        with step("health checks without the service"):
            for role in ("api", "worker", "scheduler"):
                argv: list[str | Path] = [venv.python, "-m", "workers", "health", role, "--url", url]
                run(argv, home, code=1, changes=variables)


@contextmanager
def service(venv: Venv, home: Path, data: Path, variables: dict[str, str]) -> Iterator[tuple[str, str]]:
    """``secateur up`` in the layout; its address and API key."""
    log = data / "up.log"
    with log.open("wb") as output:
        argv = [str(venv.bin / "secateur"), "up"]
        up = subprocess.Popen(argv, cwd=data, env=fresh.environment(variables), stdout=output, stderr=output)
    try:
        with step("start the service"):
            address = announced(up, log)
        yield address
    finally:
        up.send_signal(signal.SIGINT)
        code = up.wait()
    check(code == 0, f"'secateur up' ended with exit code {code}:\n{log.read_text()}")


def announced(up: "subprocess.Popen[bytes]", log: Path) -> tuple[str, str]:
    """What ``secateur up`` prints when it is ready."""
    deadline = time.monotonic() + READY_SECONDS
    while "Ctrl-C" not in log.read_text():
        check(up.poll() is None, f"'secateur up' ended:\n{log.read_text()}")
        check(time.monotonic() < deadline, f"the service was not ready in {READY_SECONDS:.0f} s:\n{log.read_text()}")
        time.sleep(0.2)
    url = re.search(r"running at (\S+)", log.read_text())
    key = re.search(r"API key +(\S+)", log.read_text())
    assert url and key
    return url[1], key[1]


def run_job(venv: Venv, method: str, data: Path, variables: dict[str, str]) -> None:
    """Submit a job by the command line, wait for its success, and load what it published."""
    recipe = data / f"{method}.json"
    texts = {name: [(data / f"{name}.txt").read_text()] for name in ("calibration", "evaluation")}
    request: dict[str, Any] = {name: {**REQUEST[name], "texts": texts[name]} for name in REQUEST}
    recipe.write_text(json.dumps({**request, "publish": {"repo_id": f"test/{method}"}}))
    options = ["--recipe", str(recipe), "--ratio", "0.3", "--method", method]
    secateur = venv.bin / "secateur"
    job = run([secateur, "submit", "local:tiny", *options], data, changes=variables).stdout.strip()
    followed = run([secateur, "watch", job], data, changes=variables).stdout
    check("succeeded" in followed, f"the job with method {method} ended so:\n{followed}")
    published = data / "hub" / "test" / method
    check((published / "widths.png").is_file(), f"the repository of method {method} lacks the picture of the widths")
    generate = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('the river', return_tensors='pt').input_ids\n"
        "assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4\n"
    )
    run([venv.python, "-c", generate, published], data, changes=variables)


def check_health(stage: Stage, home: Path, url: str, variables: dict[str, str]) -> None:
    """Every role's health command, as the image and docker-compose.yml name it, succeeds beside the service."""
    compose = (ROOT / "docker-compose.yml").read_text()
    commands = [health_command(stage)]
    commands += [listed.split(", ") for listed in re.findall(r"test: \[CMD, (python, .*)\]", compose)]
    roles = {command[-1] for command in commands}
    check(roles == {"api", "worker", "scheduler"}, f"there are health checks of {sorted(roles)}")
    for command in commands:
        address = ["--url", url] if command[-1] == "api" else []
        print(f"  {run([*command, *address], home, changes=variables).stdout.strip()}")


def check_command(stage: Stage, home: Path, data: Path, variables: dict[str, str]) -> None:
    """The image's command, on another port, starts an API that its health check finds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [port if argument == "8000" else argument for argument in json.loads(stage.one("CMD"))]
    check(port in command, f"the image's command names no port: {command}")
    changes = variables | {"SECATEUR_DATABASE_URL": (data / "database-url").read_text().strip()}
    log = data / "api.log"
    with log.open("wb") as output:
        api = subprocess.Popen(command, cwd=home, env=fresh.environment(changes), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            check(api.poll() is None and time.monotonic() < deadline, f"{command} does not run:\n{log.read_text()}")
            try:
                run([*health_command(stage), "--url", f"http://127.0.0.1:{port}"], home, changes=changes)
                return
            except Failure:
                time.sleep(0.5)
    finally:
        api.send_signal(signal.SIGTERM)
        api.wait()


if __name__ == "__main__":
    fresh.main(main)
