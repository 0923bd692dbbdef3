"""Prune a job's model: the supervisor starts ``python -m workers.runner`` for one attempt at one job."""

import hashlib
import json
from pathlib import Path
from typing import Any

from app.config import get_settings
from app.jobs.naming import repo_ids
from secateur.catalog.spec import PruningSpec
from secateur.contract.events import Event, StepEvent
from secateur.files import write_whole
from workers import supervisor_link
from workers.supervisor_link import SupervisorLink


def work(supervisor: SupervisorLink) -> dict[str, Any]:
    """Prune as the job requests into ``attempt-N/``.

    Return the message that ends the attempt: the report, or that the attempt paused.
    """
    import torch

    from secateur.engine.run.run import NamedModel, prune_to_folder
    from secateur.engine.run.workspace import Listener, Paused, Workspace

    settings, job = get_settings(), supervisor.job
    if settings.torch_threads is not None:
        torch.set_num_threads(settings.torch_threads)
    folder, request = Path(job["folder"]), job["request"]
    spec = PruningSpec.of_request(request)
    names = repo_ids(request["publish"]["repo_id"], spec) if request.get("publish") else None

    def provenance(index: int) -> dict[str, Any]:
        return {"job_id": job["job_id"], "repo_id": names and names[index]}

    def on_event(event: Event) -> None:
        message = event.as_dict()
        if isinstance(event, StepEvent):
            message |= save_checkpoint(folder, event.step.number, job["attempt"], event.state)
        supervisor.tell(message)

    workspace = Workspace(
        models_dir=settings.models_dir,
        texts_dir=settings.texts_dir,
        tasks_dir=settings.tasks_dir,
        scratch=folder,
        statistics_dir=settings.data_dir / "statistics",
        token=job["hub_token"],
        endpoint=settings.hf_endpoint,
        allow_paths=False,
        max_parameters=settings.max_model_parameters,
    )
    try:
        reports = prune_to_folder(
            NamedModel(request["model_id"], request.get("revision"), request.get("gguf_file")),
            spec,
            Path(job["output"]),
            workspace,
            Listener(on_event, supervisor.wants_pause),
            resume=load_checkpoint(folder, job["checkpoints"], supervisor),
            provenance=provenance,
        )
    except Paused:
        return {"type": "paused"}
    found = [report.as_dict() for report in reports]
    return {"type": "result", "report": {"targets": found} if spec.several else found[0]}


def save_checkpoint(folder: Path, number: int, attempt: int, state: dict[str, Any]) -> dict[str, str]:
    """Write a step's state so that the file is either complete or absent.

    Return the file's ``path`` in ``folder`` and its ``sha256``.
    """
    name = f"step-{number}.attempt-{attempt}.json"
    content = json.dumps(state).encode()
    write_whole(folder / name, content)
    return {"path": name, "sha256": hashlib.sha256(content).hexdigest()}


def load_checkpoint(
    folder: Path, checkpoints: list[dict[str, Any]], supervisor: SupervisorLink
) -> dict[str, Any] | None:
    """Return the state in the first of ``checkpoints`` (newest first) whose file is as its row says.

    ``None`` means that the job starts anew.
    """
    for checkpoint in checkpoints:
        try:
            content = (folder / checkpoint["path"]).read_bytes()
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() == checkpoint["sha256"]:
            state: dict[str, Any] = json.loads(content)
            return state
        message = f"The checkpoint of step {checkpoint['number']} is missing or damaged; an earlier one is used."
        supervisor.tell({"type": "warning", "message": message})
    return None


if __name__ == "__main__":
    supervisor_link.run(work)
