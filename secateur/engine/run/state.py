"""The state of a run: frozen data that is replaced when a step is complete, written as JSON, and read again to resume."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.report import Step, TrainingCurve
from secateur.engine.model.plan import LayerUnits

VERSION: Literal[2] = 2


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorReference(_State):
    """A file of tensors in the scratch folder."""

    file: str
    sha256: str


class TrainingState(TrainingCurve):
    """A training that is not complete: its curve, its duration so far, and its tensors."""

    seconds: float
    tensors: TensorReference


class TargetState(_State):
    """One target of a run: the ratio, the units kept so far, the complete steps, and the tensors that a recovery changed."""

    ratio: float
    plan: tuple[LayerUnits, ...] | None = None
    steps: tuple[Step, ...] = ()
    tensors: TensorReference | None = None
    training: TrainingState | None = None


class RunState(_State):
    """What is known after a step: all that resuming needs beside the source."""

    version: Literal[2] = VERSION
    fingerprint: str
    revision: str | None
    spec: dict[str, Any]
    baseline: Step
    targets: tuple[TargetState, ...] = ()
    step: int = 0
    """Number of the last step that is complete or, in mid-training, recorded."""

    @classmethod
    def load(cls, data: dict[str, Any]) -> Self:
        """Read a state from JSON-able data.

        Raises:
            PruningError: ``state_invalid``: it was written by another version, or is damaged.
        """
        if data.get("version") != VERSION:
            raise PruningError(
                ErrorCode.STATE_INVALID,
                f"The saved state has version {data.get('version', 1)}; this release reads version {VERSION}. Start the run anew.",
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PruningError(
                ErrorCode.STATE_INVALID, f"The saved state is damaged: {error.errors()[0]['msg']}."
            ) from None

    def as_dict(self) -> dict[str, Any]:
        """The state as JSON-able data."""
        return self.model_dump(mode="json", exclude_unset=True) | {"version": self.version}

    def references(self) -> list[TensorReference]:
        """All files of tensors that the state needs."""
        holders = [holder for target in self.targets for holder in (target, target.training) if holder is not None]
        return [holder.tensors for holder in holders if holder.tensors is not None]
