"""Where a run finds its inputs and keeps its files, and who listens to it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from secateur.contract.events import Event


@dataclass(frozen=True)
class Workspace:
    """Where a run finds models and texts, and where it keeps what it needs between its steps."""

    models_dir: Path | None = None
    """Holds the models that ``local:NAME`` names."""
    texts_dir: Path | None = None
    """Holds the texts that ``local:NAME`` names."""
    tasks_dir: Path | None = None
    """Holds zero-shot tasks as ``NAME.jsonl``."""
    scratch: Path | None = None
    """Keeps the weights that a recovery changed, which resuming needs; unset: a temporary folder that is deleted at the end."""
    statistics_dir: Path | None = None
    """Keeps statistics of unpruned models for later runs; unset: they are kept in memory for this run alone."""
    token: str | None = None
    """Reads models and data sets of the Hub."""
    endpoint: str | None = None
    """URL of the Hub; unset: the public one."""
    allow_paths: bool = True
    """Whether models and texts may be named by a path, as the library and the command line allow and the service does not."""
    max_parameters: int | None = None
    """The most parameters that a model may have."""
    device: str | None = None
    """The device to compute on, as torch names it; unset: CUDA where there is one, else the CPU."""


def _ignore(event: Event) -> None:
    """Nobody listens."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Listener:
    """Who listens to a run, and may stop it."""

    on_event: Callable[[Event], None] = _ignore
    """Receives every event. A step counts as recorded when the call with its :class:`StepEvent` returns."""
    should_stop: Callable[[], bool] = _never
    """Asked between two steps; when it returns true, the run raises :class:`Paused`."""


class Paused(Exception):
    """A run was stopped between two steps. ``state`` is what resuming needs, as JSON-able data."""

    def __init__(self, state: dict[str, object]) -> None:
        super().__init__("The run was stopped between two steps; its state is in 'state'.")
        self.state = state
