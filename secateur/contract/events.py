"""What a run tells of itself while it goes on."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from secateur.contract.report import Step
from secateur.contract.stages import Stage

RateUnit = Literal["tokens/s", "bytes/s"]


@dataclass(frozen=True)
class ProgressEvent:
    """How far a run is."""

    type: ClassVar[str] = "progress"
    stage: Stage
    step: int
    """The step that the stage belongs to; 0 is the baseline."""
    steps: int
    """Steps of all targets."""
    share: float
    """Share of the whole run that is done."""
    stage_share: float
    """Share of the stage that is done."""
    rate: float | None
    """What the stage processes in a second, in ``rate_unit``; ``None`` where nothing is counted."""
    rate_unit: RateUnit | None
    remaining_seconds: float | None
    """Time until the run ends; ``None`` before it can be told."""

    def as_dict(self) -> dict[str, Any]:
        return {"type": self.type, **asdict(self)}


@dataclass(frozen=True)
class WarningEvent:
    """Something is not as requested, and the run goes on."""

    type: ClassVar[str] = "warning"
    message: str

    def as_dict(self) -> dict[str, Any]:
        return {"type": self.type, "message": self.message}


@dataclass(frozen=True)
class StepEvent:
    """A step is complete. ``state`` is what resuming after the step needs, as JSON-able data."""

    type: ClassVar[str] = "step"
    step: Step
    state: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"type": self.type, "number": self.step.number, "data": self.step.as_dict()}


Event = ProgressEvent | WarningEvent | StepEvent
