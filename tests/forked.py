"""Commands in processes that have imported their packages already.

Importing torch and transformers takes seconds, and importing the service one; tests of the engine and of the command line
would spend them hundreds of times. The product starts a process for each check and for each command, and so do the tests
of the service, of the wheel and of the image.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest

from secateur.engine.export import check
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]
ENGINE = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
"""
COMMAND_LINE = """
import app.db.migrate, secateur.cli.main, workers.__main__
"""
RUN_COMMAND = """
import os, sys
from secateur.cli.main import main

def execute(program, arguments, environment):  # the command line replaces its process by the service's program
    from workers.__main__ import main
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments[2:]
    main()
    os._exit(0)

os.execve = execute
sys.argv[0] = "secateur"
main()
"""
SERVER = """
import json, os, signal, sys, traceback
answers = os.dup(1)
os.dup2(2, 1)
for line in sys.stdin:
    asked = json.loads(line)
    if not (child := os.fork()):
        code = 1
        try:
            signal.alarm(asked["seconds"])
            os.chdir(asked["folder"])
            for number, (file, flags) in enumerate(zip(asked["files"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
                os.dup2(os.open(file, flags), number)
            if asked["environment"] is not None:
                os.environ.clear()
                os.environ.update(asked["environment"])
            sys.stdin = open(0)
            sys.argv = ["-c", *asked["arguments"]]
            exec(compile(asked["script"], "<string>", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.write(answers, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class ForkServer:
    """Runs scripts in processes forked from one that has done nothing but imports."""

    def __init__(self, imports: str) -> None:
        self._imports = imports
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.communicate()

    def run(
        self,
        script: str,
        arguments: list[str],
        cwd: str,
        environment: Mapping[str, str] | None = None,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Do what ``subprocess.run`` does with ``[python, "-c", script, *arguments]``."""
        server = self._started()
        assert server.stdin is not None and server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("in", "out", "err")]
            for file, content in zip(files, (input or "", "", ""), strict=True):
                file.write_text(content)
            asked: dict[str, Any] = {
                "folder": cwd,
                "files": [*map(str, files)],
                "script": script,
                "arguments": arguments,
                "environment": None if environment is None else dict(environment),
                "seconds": round(PATIENCE),
            }
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files[1:]))

    def check(self, argv: list[str], *, cwd: str) -> subprocess.CompletedProcess[str]:
        """Do what :func:`secateur.processes.run` does with the command of a check."""
        interpreter, isolated, option, script, *arguments = argv
        assert [interpreter, isolated, option] == [sys.executable, "-I", "-c"], argv
        return self.run(script, arguments, cwd)

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            command = [sys.executable, "-c", self._imports + SERVER]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        return self._server


_commands = ForkServer(COMMAND_LINE)


def secateur(
    *arguments: str, environment: Mapping[str, str] | None = None, input: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line with ``arguments``, and with ``environment`` on top of the environment of now."""
    return _commands.run(RUN_COMMAND, [*arguments], str(ROOT), {**os.environ, **(environment or {})}, input)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer(ENGINE) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def checks_in_forks(fork_server: ForkServer) -> Iterator[None]:
    """Check what the tests export in forks; a module of tests has this fixture if it imports both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "run", fork_server.check)
        yield
