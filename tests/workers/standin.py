"""A runner without an engine: its rounds are as long, and it ends as badly, as the job's ``script`` says."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from app.config import get_settings
from secateur.catalog.spec import PruningSpec, target_folder
from secateur.contract.errors import ErrorCode, PruningError
from workers import supervisor_link
from workers.supervisor_link import SupervisorLink

SHORT_LEASE = {"lease_ttl": 60.0, "lease_margin": 55.0}
"""A child dies 5 seconds after the last renewal. The lease lasts a minute, so that a slow observer sees that it died in time."""
REPORT: dict[str, Any] = {
    "parameters": {"before": 10, "after": 8},
    "ratio": {"target": 0.2, "reached": 0.2},
    "perplexity": {"before": 10.0, "after": float("nan")},
    "benchmarks": {"perplexity": {}, "zero_shot": {}, "zero_shot_mean": None},
    "retained_accuracy": None,
    "latency": {"before": {}, "after": {}},
    "weights_bytes": {"before": 40, "after": 32},
    "widths": [],
}


def work(supervisor: SupervisorLink) -> dict[str, Any]:
    job = supervisor.job
    script, rounds = job["request"]["script"], job["request"]["rounds"]
    folder = get_settings().data_dir / "notes" / job["job_id"]
    folder.mkdir(parents=True, exist_ok=True)
    first_attempt = job["attempt"] == 1
    print("a library prints to stdout")
    os.system("echo and so does its child")
    done = -1 if job["state"] is None else job["state"]["step"]
    for number in range(done + 1, rounds + 1):
        with (folder / "notes").open("a") as notes:
            notes.write(f"{job['attempt']} {number} {os.getpid()}\n")
        share = number / (rounds + 1)
        supervisor.tell(
            {
                "type": "progress",
                "stage": "scoring",
                "step": number,
                "steps": rounds,
                "share": share,
                "remaining_seconds": 1.0,
            }
        )
        if number == script.get("kill_in_round") and (first_attempt or script.get("always")):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == script.get("hang_in_round") and first_attempt:
            time.sleep(3600)
        if number == script.get("crash_in_round"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == script.get("grow_in_round") and first_attempt:
            grow(script.get("in_a_child", False))
        if number == script.get("fill_in_round"):
            fill(Path(job["folder"]), script["fill_in_round_with"])
        if number == script.get("stall_in_round"):
            time.sleep(3600)
        if number == script.get("error_in_round"):
            raise PruningError(ErrorCode.WEIGHTS_NOT_FINITE, "The model has NaN weights.", field="model_id")
        if number == script.get("bug_in_round"):
            raise ZeroDivisionError("a bug")
        while number == script.get("wait_in_round") and not (folder / "go").exists():
            time.sleep(0.01)
        if number == script.get("hold_gil_in_round") and first_attempt:
            while signal.getitimer(signal.ITIMER_REAL)[0] > SHORT_LEASE["lease_ttl"]:
                time.sleep(0.01)  # it will hear of no renewal: its last one must be of a short lease
            ctypes.PyDLL(None).sleep(3600)  # unlike CDLL it keeps the lock
        (folder / f"told-{number}").touch()
        if number == script.get("kill_worker_after_checkpoint") and first_attempt:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3600)
        figures = {"kind": "round" if number else "baseline"}
        supervisor.tell(
            {
                "type": "step",
                "number": number,
                "data": {**figures, "perplexity": 10.0 + number},
                "state": {"step": number},
            }
        )
        if supervisor.wants_pause():
            return {"type": "paused"}
    spec, output = PruningSpec.of_request(job["request"]), Path(job["output"])
    reports = [
        write_model(output / target_folder(ratio) if spec.several else output, ratio, job["job_id"])
        for ratio in spec.requested_ratios
        if ratio is not None
    ]
    return {"type": "result", "report": {"targets": reports} if spec.several else reports[0]}


def grow(in_a_child: bool) -> None:
    """Take memory until the process is killed, itself or, as the check of an export does, in a session of its own."""
    code = "taken = []\nwhile True:\n    taken.append(bytearray(b'x' * 2**22))"
    if in_a_child:
        subprocess.run([sys.executable, "-c", code], start_new_session=True)
    exec(code)


def fill(folder: Path, how: str) -> None:
    """Write up to 2 GiB into the folder, in one file or in files of a mebibyte; the process is killed before that."""
    for number in range(2048):
        with (folder / ("one" if how == "one file" else f"file-{number}")).open("ab") as file:
            file.write(bytes(2**20))


def write_model(folder: Path, ratio: float, job_id: str) -> dict[str, Any]:
    folder.mkdir(parents=True)
    (folder / "secateur.json").write_text(json.dumps({"job_id": job_id, "ratio": ratio}))
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    return {**REPORT, "ratio": {"target": ratio, "reached": ratio}}


if __name__ == "__main__":
    supervisor_link.run(work)
