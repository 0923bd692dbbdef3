"""The pruning process: ``python -m workers.runner``, started by the supervisor for one attempt at one job."""

import hashlib
import json
from pathlib import Path
from typing import Any

from app.config import get_settings
from app.jobs.naming import repo_ids
from secateur.catalog.spec import PruningSpec
from secateur.files import write_whole
from workers import supervisor_link
from workers.supervisor_link import SupervisorLink


def work(supervisor: SupervisorLink) -> dict[str, Any]:
    """Prune as the job asks into ``attempt-N/``; the message that ends the attempt: its report, or that it paused."""
    import torch

    from secateur.engine import Paused, prune

    settings, job = get_settings(), supervisor.job
    if settings.torch_threads is not None:
        torch.set_num_threads(settings.torch_threads)
    folder, request = Path(job["folder"]), job["request"]
    spec = PruningSpec.of_request(request)
    names = repo_ids(request["publish"]["repo_id"], spec) if request.get("publish") else None

    def manifest_extra(index: int) -> dict[str, Any]:
        return {"job_id": job["job_id"], "repo_id": names and names[index]}

    def on_event(event: dict[str, Any]) -> None:
        if event["type"] == "round":
            saved = save_checkpoint(folder, event["number"], job["attempt"], event["state"])
            event = {"type": "round", "number": event["number"], "data": event["data"], **saved}
        supervisor.tell(event)

    try:
        result = prune(
            request["model_id"],
            spec,
            Path(job["output"]),
            revision=request.get("revision"),
            gguf_file=request.get("gguf_file"),
            models_dir=settings.models_dir,
            texts_dir=settings.texts_dir,
            tasks_dir=settings.tasks_dir,
            token=job["hub_token"],
            endpoint=settings.hf_endpoint,
            allow_paths=False,
            max_parameters=settings.max_model_parameters,
            scratch=folder,
            statistics_dir=settings.data_dir / "statistics",
            on_event=on_event,
            resume=load_checkpoint(folder, job["checkpoints"], supervisor),
            stop=supervisor.wants_pause,
            manifest_extra=manifest_extra,
        )
    except Paused:
        return {"type": "paused"}
    return {"type": "result", "report": result.report}


def save_checkpoint(folder: Path, number: int, attempt: int, state: dict[str, Any]) -> dict[str, str]:
    """Write a round's state so that it is whole or absent; returns its ``path`` in ``folder`` and its ``sha256``."""
    name = f"round-{number}.attempt-{attempt}.json"
    content = json.dumps(state).encode()
    write_whole(folder / name, content)
    return {"path": name, "sha256": hashlib.sha256(content).hexdigest()}


def load_checkpoint(
    folder: Path, checkpoints: list[dict[str, Any]], supervisor: SupervisorLink
) -> dict[str, Any] | None:
    """The state in the first of ``checkpoints`` (newest first) that is as its row says; ``None``: start anew."""
    for checkpoint in checkpoints:
        try:
            content = (folder / checkpoint["path"]).read_bytes()
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() == checkpoint["sha256"]:
            return json.loads(content)
        message = f"The checkpoint of round {checkpoint['number']} is missing or damaged; an earlier one is used."
        supervisor.tell({"type": "warning", "message": message})
    return None


if __name__ == "__main__":
    supervisor_link.run(work)
