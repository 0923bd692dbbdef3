"""Progress bars on a terminal: one bar for the whole run, with the time left, and one for each stage, with its rate."""

from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn


class ShownProgress(Protocol):
    """The attributes that :class:`secateur.contract.events.ProgressEvent` and a job's progress have."""

    @property
    def stage(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def stage_share(self) -> float: ...
    @property
    def rate(self) -> float | None: ...
    @property
    def rate_unit(self) -> str | None: ...


class TerminalProgress:
    """A context manager that draws the progress bars; it draws nothing if ``console`` is not a terminal."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[told]}")
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._whole = self._progress.add_task("whole job", total=1.0, told="")
        self._stage: tuple[str, int] | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, progress: ShownProgress, seconds_left: float | None) -> None:
        """Draw the current progress and the time left."""
        stage = progress.stage, progress.step
        if stage != self._stage:
            if self._task is not None:
                self._progress.update(self._task, completed=1.0, told="")
            self._stage = stage
            self._task = self._progress.add_task(where(progress), total=1.0, told="")
        assert self._task is not None
        self._progress.update(self._task, completed=progress.stage_share, told=_rate(progress))
        left = "" if seconds_left is None else f"{clock(seconds_left)} left"
        self._progress.update(self._whole, completed=progress.share, told=left)


def where(progress: ShownProgress) -> str:
    """Return the name of the stage, and the step if the stage belongs to a step."""
    return f"{progress.stage}, step {progress.step}/{progress.steps}" if progress.step else str(progress.stage)


def clock(seconds: float) -> str:
    """Return a time in minutes and seconds, as in ``1:05``."""
    whole = max(int(seconds), 0)
    return f"{whole // 60}:{whole % 60:02}"


def _rate(progress: ShownProgress) -> str:
    rate, unit = progress.rate, progress.rate_unit
    if rate is None or unit is None:
        return ""
    return f"{rate / 1e6:.1f} M{unit}" if unit == "bytes/s" else f"{rate:,.0f} {unit}"
