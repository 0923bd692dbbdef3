"""Store and publish a job's model: the supervisor starts ``python -m workers.publisher`` when the pruned files exist.

A job is published once, whichever process is killed and whenever. The commit is a compare-and-swap on HEAD. If a commit
in the history names this job, an earlier attempt has made that commit, and it is adopted, whoever has committed since.
"""

import threading
import time
from pathlib import Path
from typing import Any

from app.config import get_settings
from app.jobs.naming import repo_ids
from app.storage.service import artifacts_folder
from app.storage.store import Store, open_store
from secateur.catalog.spec import PruningSpec, target_folder
from secateur.contract.stages import Stage
from secateur.hubs import FolderHub, Hub, HuggingFaceHub, publish
from workers import supervisor_link
from workers.supervisor_link import SupervisorLink

LIFE_SIGN_SECONDS = 5.0
RATE_AFTER = 4.0
"""Number of seconds after which a rate, and with it the time left, is told: at first, only code is read."""
LIFE_SIGN_BYTES = 2**16
SUMMARY = ("parameters", "ratio", "perplexity", "benchmarks", "retained_accuracy", "latency", "weights_bytes", "widths")
"""Fields of the report that the job's result contains."""


def work(supervisor: SupervisorLink) -> dict[str, Any]:
    """Store the files of ``output`` as the job's artifacts, and publish them if the job requests it.

    If an earlier attempt has stored the artifacts, they are published instead of ``output``. Return the message with the
    result.
    """
    job, store = supervisor.job, open_store(get_settings())
    output, request, report = Path(job["output"]), job["request"], job["report"]
    wanted, spec = request.get("publish"), PruningSpec.of_request(request)
    files = job["files"]
    if files is None:
        paths = [path for path in sorted(output.rglob("*")) if path.is_file()]
        show(supervisor, sum(path.stat().st_size for path in paths) * (3 if wanted else 1))
        files = store_files(store, output, paths, artifacts_folder(job["job_id"], job["attempt"]))
    elif wanted is not None:
        show(supervisor, sum(file["size"] for file in files) * 3)
        for file in files:
            store.get_file(file["key"], output / file["name"], file["sha256"])
    supervisor.tell({"type": "exported", "report": report, "files": files})
    reports = report["targets"] if spec.several else [report]
    folders = [output / target_folder(each["ratio"]["target"]) if spec.several else output for each in reports]
    results = [{name: report[name] for name in SUMMARY} for report in reports]
    if wanted is not None:
        hub = configured_hub(job["hub_token"])
        for result, folder, repo_id in zip(results, folders, repo_ids(wanted["repo_id"], spec), strict=True):
            message = f"Pruned model of job {job['job_id']}"
            commit = publish(hub, repo_id, wanted["private"], folder, message)
            url = hub.url(repo_id, commit)
            result |= {"repo_id": repo_id, "commit_sha": commit} | ({} if url is None else {"url": url})
    if not spec.several:
        return {"type": "result", "result": results[0]}
    targets = [{"target_ratio": result["ratio"]["target"], **result} for result in results]
    return {"type": "result", "result": {"targets": targets}}


def store_files(store: Store, folder: Path, paths: list[Path], prefix: str) -> list[dict[str, Any]]:
    """Store files of ``folder`` and return what the database records of them: {name, key, size, sha256}."""
    found = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        digest = store.put_file(path, prefix + name)
        found.append({"name": name, "key": prefix + name, "size": digest.size, "sha256": digest.sha256})
    return found


def show(supervisor: SupervisorLink, size: int) -> None:
    """Report progress from now on; the attempt reads about ``size`` bytes until it ends."""
    threading.Thread(target=show_life, args=(supervisor, size), daemon=True).start()


def configured_hub(token: str | None) -> Hub:
    """Return the hub in a folder if the settings name one, else the Hugging Face Hub."""
    settings = get_settings()
    if settings.hub_dir is not None:
        return FolderHub(settings.hub_dir)
    return HuggingFaceHub(token, settings.hf_endpoint)


def show_life(supervisor: SupervisorLink, size: int) -> None:
    """Report progress while files are read.

    An upload may take hours, and an upload that hangs reads nothing. ``size`` is the number of bytes to be read in all:
    each file is read once to be stored, once to be hashed for the Hub and once to be sent.
    """

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # "rchar: N", see proc(5)

    began, first = time.monotonic(), read()
    seen = first - LIFE_SIGN_BYTES
    while True:
        now = read()
        if now - seen >= LIFE_SIGN_BYTES:
            seen = now
            share = min((now - first) / max(size, 1), 1.0)
            elapsed = time.monotonic() - began
            rate = size * share / elapsed if elapsed > RATE_AFTER else 0.0
            supervisor.tell(
                {
                    "type": "progress",
                    "stage": Stage.PUBLISHING,
                    "share": 1.0,
                    "stage_share": share,
                    "rate": rate or None,
                    "rate_unit": "bytes/s" if rate else None,
                    "remaining_seconds": size * (1 - share) / rate if rate else None,
                }
            )
        time.sleep(LIFE_SIGN_SECONDS)


if __name__ == "__main__":
    supervisor_link.run(work)
