"""Generate the synchronous client from the asynchronous one with ``unasync``: ``make client``."""

import subprocess
import sys
from pathlib import Path

import unasync

CLIENT = Path(__file__).parents[1] / "secateur" / "client"
REPLACED = {
    "AsyncClient": "Client", "AsyncJob": "Job", "AsyncJobs": "Jobs", "AsyncDatasets": "Datasets", "AsyncKeys": "Keys", "AsyncWorkers": "Workers", "async_sleep": "sleep",
    "aclose": "close", "aread": "read", "aiter_lines": "iter_lines", "aiter_bytes": "iter_bytes", "_async": "_sync",
}  # fmt: skip
HEAD = '"""The synchronous client, made from the asynchronous one: ``make client``. Not to be edited."""'


def generate(folder: Path) -> None:
    """Write the synchronous client's files into ``folder``."""
    rule = unasync.Rule(fromdir="/_async/", todir="/_sync/", additional_replacements=REPLACED)
    source = folder / "_async"
    source.mkdir(parents=True, exist_ok=True)
    for file in (CLIENT / "_async").glob("*.py"):
        (source / file.name).write_text(file.read_text())
    unasync.unasync_files([str(file) for file in source.glob("*.py")], [rule])
    made = folder / "_sync" / "client.py"
    text = made.read_text()
    made.write_text(HEAD + text[text.index('"""', 3) + 3 :].replace('"AsyncJob"', '"Job"'))
    subprocess.run([Path(sys.executable).with_name("ruff"), "format", "--quiet", folder / "_sync"], check=True)


if __name__ == "__main__":
    generate(CLIENT)
