"""The folders and limits of a run, and the listener that receives its events."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from secateur.contract.events import Event


@dataclass(frozen=True)
class Workspace:
    """The folders in which a run finds models and texts and keeps its files, and the run's limits."""

    models_dir: Path | None = None
    """Folder of the models that ``local:NAME`` names."""
    texts_dir: Path | None = None
    """Folder of the texts that ``local:NAME`` names."""
    tasks_dir: Path | None = None
    """Folder of the zero-shot tasks, as ``NAME.jsonl``."""
    uploads_dir: Path | None = None
    """Folder of the data sets that ``upload:ID`` names: ``ID.txt`` is a text, and ``ID.jsonl`` has lines of texts or chats.
    Only the service has such a folder."""
    scratch: Path | None = None
    """Folder of the weights that a recovery changed, which resuming needs. If it is unset, a temporary folder is used
    and deleted at the end."""
    statistics_dir: Path | None = None
    """Folder of the statistics of unpruned models for later runs. If it is unset, the statistics are kept in memory for
    this run only."""
    token: str | None = None
    """Hub token that reads models and data sets."""
    endpoint: str | None = None
    """URL of the Hub; if it is unset, the public Hub is used."""
    allow_paths: bool = True
    """Whether a path may name a model or a text. The library and the command line allow paths; the service does not."""
    max_parameters: int | None = None
    """Largest number of parameters that a model may have."""
    device: str | None = None
    """The torch name of the device to compute on; if it is unset, CUDA is used if available, else the CPU."""
    device_memory_bytes: int | None = None
    """Memory of the device that a run may take; if it is unset, what a GPU has free, and on a CPU no limit. The layers of
    a model that needs more are streamed from the host."""


def _ignore(event: Event) -> None:
    """Do nothing with the event."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Listener:
    """The functions by which a caller receives a run's events and stops the run."""

    on_event: Callable[[Event], None] = _ignore
    """Called with every event. A step counts as recorded when the call with its :class:`StepEvent` returns."""
    should_stop: Callable[[], bool] = _never
    """Called between two steps; if it returns true, the run raises :class:`Paused`."""


class Paused(Exception):
    """Raised when a run was stopped between two steps; ``state`` is the JSON-able data that resuming needs."""

    def __init__(self, state: dict[str, object]) -> None:
        super().__init__("The run was stopped between two steps; its state is in 'state'.")
        self.state = state
