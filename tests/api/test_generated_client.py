"""The document suffices for a client: a generator of clients makes one of it without a warning, and the client works."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2

from scripts.openapi import document

PROGRAM = Path(__file__).parent / "use_generated_client.py"


def test_a_client_generated_from_the_document_works(api: httpx2.Client, body: dict[str, Any], tmp_path: Path) -> None:
    source, config, package = tmp_path / "openapi.json", tmp_path / "config.json", tmp_path / "generated"
    source.write_text(document())
    config.write_text(json.dumps({"post_hooks": []}))
    arguments = ["--path", source, "--config", config, "--output-path", package, "--meta", "none", "--fail-on-warning"]
    generator = [sys.executable, "-m", "openapi_python_client", "generate", *map(str, arguments)]
    generated = subprocess.run(generator, capture_output=True, text=True)
    assert generated.returncode == 0, generated.stdout + generated.stderr

    functions = {path for path in (package / "api").glob("*/*.py") if path.name != "__init__.py"}
    paths = json.loads(source.read_text())["paths"]
    assert len(functions) == sum(len(operations) for operations in paths.values())

    key = api.headers["Authorization"].removeprefix("Bearer ")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    used = subprocess.run(
        [sys.executable, PROGRAM, str(api.base_url), key, body["model_id"]],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert used.returncode == 0, used.stderr
