"""Checks of written checkpoints in processes that have imported torch and transformers already.

Importing both takes seconds, which a test of the engine would spend several times. The product starts a process for each
check, and so do the tests of the service and of the wheel.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Self

import pytest

from secateur.engine.export import check

SERVER = """
import json, os, sys, traceback
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
answers = os.dup(1)
os.dup2(2, 1)
for line in sys.stdin:
    asked = json.loads(line)
    if not (child := os.fork()):
        code = 1
        try:
            os.chdir(asked["folder"])
            os.dup2(os.open(asked["errors"], os.O_WRONLY), 2)
            sys.argv = ["-c", *asked["arguments"]]
            exec(compile(asked["script"], "<string>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.write(answers, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class ForkServer:
    """Runs ``python -I -c SCRIPT ARGUMENTS`` in a process forked from one that has done nothing but imports."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.communicate()

    def run(self, argv: list[str], *, cwd: str) -> subprocess.CompletedProcess[str]:
        """Do what :func:`secateur.processes.run` does for such a command."""
        interpreter, isolated, option, script, *arguments = argv
        assert [interpreter, isolated, option] == [sys.executable, "-I", "-c"], argv
        server = self._started()
        assert server.stdin is not None and server.stdout is not None
        with tempfile.NamedTemporaryFile("r") as errors:
            asked: dict[str, Any] = {"folder": cwd, "errors": errors.name, "script": script, "arguments": arguments}
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            return subprocess.CompletedProcess(argv, code, "", errors.read())

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            command = [sys.executable, "-I", "-c", SERVER]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._server


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def checks_in_forks(fork_server: ForkServer) -> Iterator[None]:
    """Check what the tests export in forks; a module of tests has this fixture if it imports both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "run", fork_server.run)
        yield
