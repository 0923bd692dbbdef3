"""Prune a job's model: the supervisor starts ``python -m workers.runner`` for one attempt at one job."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from app.config import get_settings
from app.jobs.naming import repo_ids
from app.storage.library import library_names, open_library
from app.storage.service import tensors_folder
from app.storage.store import ObjectDamaged, ObjectMissing, Store, open_store
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.events import Event, StepEvent
from workers import supervisor_link
from workers.supervisor_link import SupervisorLink


def work(supervisor: SupervisorLink) -> dict[str, Any]:
    """Prune as the job requests into ``attempt-N/``.

    Return the message that ends the attempt: the report, or that the attempt paused.
    """
    from secateur.engine.run.run import NamedModel, prune_to_folder
    from secateur.engine.run.state import RunState
    from secateur.engine.run.workspace import Listener, Paused, Workspace

    import torch  # isort: skip  # the engine comes first, because it sets how torch's threads wait

    settings, job = get_settings(), supervisor.job
    if settings.torch_threads is not None:
        torch.set_num_threads(settings.torch_threads)
    folder, request = Path(job["folder"]), job["request"]
    spec = PruningSpec.of_request(request)
    names = repo_ids(request["publish"]["repo_id"], spec) if request.get("publish") else None

    def provenance(index: int) -> dict[str, Any]:
        return {"job_id": job["job_id"], "repo_id": names and names[index]}

    store, uploads = open_store(settings), folder / "uploads"
    origin = request.get("resume_from")
    tensors = Tensors(store, tensors_folder(job["job_id"]), origin and tensors_folder(origin["job"]), folder)
    newest: set[str] = set()
    kept: set[str] = set()

    def on_event(event: Event) -> None:
        nonlocal newest
        if not isinstance(event, StepEvent):
            supervisor.tell(event.as_dict())
            return
        needed = {reference.file for reference in RunState.load(event.state).references()}
        size = tensors.store(needed)
        supervisor.tell({**event.as_dict(), "state": event.state, "stored_bytes": size})
        if supervisor.keeps_before:
            kept.update(newest)
        newest = needed
        tensors.delete_all_but(kept | newest)

    for dataset in job["datasets"]:
        fetch_dataset(store, dataset, uploads)
    library = open_library(settings, *library_names(request))
    workspace = Workspace(
        models_dir=library.models_dir,
        texts_dir=library.texts_dir,
        tasks_dir=library.tasks_dir,
        uploads_dir=uploads,
        scratch=folder,
        statistics_dir=settings.data_dir / "statistics",
        token=job["hub_token"],
        endpoint=settings.hf_endpoint,
        allow_paths=False,
        max_parameters=settings.max_model_parameters,
    )
    resume = job["state"]
    if resume is not None:
        state = RunState.load(resume)
        if origin is not None:
            state = state.ending_here(spec)
            resume = state.as_dict()
        try:
            for reference in state.references():
                tensors.fetch(reference.file, reference.sha256)
                newest.add(reference.file)
        except (ObjectMissing, ObjectDamaged):
            message = "The tensors of the last checkpoint are missing or damaged in the storage; the job begins anew."
            supervisor.tell({"type": "warning", "message": message})
            resume, newest = None, set()
    if origin is not None and resume is None:
        message = (
            f"The checkpoint of step {origin['step']} of job {origin['job']} is missing or damaged in the storage."
        )
        raise PruningError(ErrorCode.CHECKPOINT_DAMAGED, message)
    try:
        reports = prune_to_folder(
            NamedModel(request["model_id"], request.get("revision"), request.get("gguf_file")),
            spec,
            Path(job["output"]),
            workspace,
            Listener(on_event, supervisor.wants_pause),
            resume=resume,
            provenance=provenance,
        )
    except Paused:
        return {"type": "paused"}
    found = [report.as_dict() for report in reports]
    return {"type": "result", "report": {"targets": found} if spec.several else found[0]}


def fetch_dataset(store: Store, dataset: Mapping[str, str], folder: Path) -> None:
    """Write an uploaded data set, which :func:`app.datasets.service.describe` describes, to a file in ``folder``.

    Raises:
        PruningError: ``text_not_found`` or ``text_invalid`` if the storage has lost or damaged the content.
    """
    try:
        store.get_file(dataset["key"], folder / dataset["file"], dataset["sha256"])
    except ObjectMissing:
        message = f"The content of the data set {Path(dataset['file']).stem} is missing in the storage."
        raise PruningError(ErrorCode.TEXT_NOT_FOUND, message) from None
    except ObjectDamaged:
        message = (
            f"The content of the data set {Path(dataset['file']).stem} is damaged in the storage; upload it again."
        )
        raise PruningError(ErrorCode.TEXT_INVALID, message) from None


class Tensors:
    """The tensors of a job's checkpoints: files in ``folder``, and objects in the folder ``prefix`` of the store.

    A job that publishes a step of another job finds the step's tensors in that job's folder ``origin`` of the store.
    """

    def __init__(self, store: Store, prefix: str, origin: str | None, folder: Path) -> None:
        self._store, self._prefix, self._origin, self._folder = store, prefix, origin, folder
        self._stored: set[str] = set()

    def store(self, names: Iterable[str]) -> int:
        """Store the files that this attempt has neither stored nor fetched yet, and return their size in bytes."""
        size = 0
        for name in names:
            if name not in self._stored:
                size += self._store.put_file(self._folder / name, self._prefix + name).size
                self._stored.add(name)
        return size

    def fetch(self, name: str, sha256: str) -> None:
        """Write the object of a file to the folder.

        Raises:
            ObjectMissing, ObjectDamaged: the store does not have the content that was stored.
        """
        try:
            self._store.get_file(self._prefix + name, self._folder / name, sha256)
        except ObjectMissing:
            if self._origin is None:
                raise
            self._store.get_file(self._origin + name, self._folder / name, sha256)
        else:
            self._stored.add(name)

    def delete_all_but(self, names: set[str]) -> None:
        """Delete the objects that no checkpoint needs any more."""
        unused = [name for name in self._stored if name not in names]
        if unused:
            self._store.delete([self._prefix + name for name in unused])
            self._stored -= set(unused)


if __name__ == "__main__":
    supervisor_link.run(work)
