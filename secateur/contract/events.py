"""The events that a run emits while it is in progress."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from secateur.contract.report import Step
from secateur.contract.stages import Stage

RateUnit = Literal["tokens/s", "bytes/s"]


@dataclass(frozen=True)
class ProgressEvent:
    """The progress of a run: the current stage and step, the completed shares, the rate and the remaining time."""

    type: ClassVar[str] = "progress"
    stage: Stage
    step: int
    """The step that the stage belongs to; step 0 is the baseline."""
    steps: int
    """The number of steps of all target ratios."""
    share: float
    """The share of the whole run that is complete, 0 to 1."""
    stage_share: float
    """The share of the stage that is complete, 0 to 1."""
    rate: float | None
    """The amount that the stage processes per second, in ``rate_unit``; ``None`` where the stage counts nothing."""
    rate_unit: RateUnit | None
    remaining_seconds: float | None
    """The time until the run ends, in seconds; ``None`` before an estimate is possible."""

    def as_dict(self) -> dict[str, Any]:
        return {"type": self.type, **asdict(self)}


@dataclass(frozen=True)
class WarningEvent:
    """A warning that something differs from the request; the run continues."""

    type: ClassVar[str] = "warning"
    message: str

    def as_dict(self) -> dict[str, Any]:
        return {"type": self.type, "message": self.message}


@dataclass(frozen=True)
class StepEvent:
    """The completion of a step. ``state`` is the JSON-able data that a resumed run needs to continue after the step."""

    type: ClassVar[str] = "step"
    step: Step
    state: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"type": self.type, "number": self.step.number, "data": self.step.as_dict()}


Event = ProgressEvent | WarningEvent | StepEvent
