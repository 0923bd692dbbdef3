"""TerminalProgress on a terminal for whoever follows a pruning: one for the whole and one for each stage, with its rate and the time left."""

from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn


class TerminalProgress:
    """A context manager; nothing is drawn where ``console`` is no terminal."""

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

    def show(self, progress: Mapping[str, Any], seconds_left: float | None) -> None:
        """``progress`` as events and jobs have it: stage, round, rounds, share, stage_share, rate, rate_unit."""
        stage = progress["stage"], progress["round"]
        if stage != self._stage:
            if self._task is not None:
                self._progress.update(self._task, completed=1.0, told="")
            self._stage = stage
            self._task = self._progress.add_task(where(progress), total=1.0, told="")
        assert self._task is not None
        self._progress.update(self._task, completed=progress["stage_share"], told=_rate(progress))
        left = "" if seconds_left is None else f"{clock(seconds_left)} left"
        self._progress.update(self._whole, completed=progress["share"], told=left)


def where(progress: Mapping[str, Any]) -> str:
    """The stage, and its round where it has one."""
    return (
        f"{progress['stage']}, round {progress['round']}/{progress['rounds']}"
        if progress["round"]
        else str(progress["stage"])
    )


def clock(seconds: float) -> str:
    """``1:05``, minutes and seconds."""
    whole = max(int(seconds), 0)
    return f"{whole // 60}:{whole % 60:02}"


def _rate(progress: Mapping[str, Any]) -> str:
    rate, unit = progress.get("rate"), progress.get("rate_unit")
    if rate is None or unit is None:
        return ""
    return f"{rate / 1e6:.1f} M{unit}" if unit == "bytes/s" else f"{rate:,.0f} {unit}"
