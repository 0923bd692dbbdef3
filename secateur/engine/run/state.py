"""The state of a run, from which the run can be resumed.

The state is frozen data, which is replaced and written as JSON when a step is complete.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.report import Step, TrainingCurve
from secateur.engine.model.plan import LayerUnits

VERSION: Literal[2] = 2


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorReference(_State):
    """A reference to a file of tensors in the scratch folder."""

    file: str
    sha256: str


class TrainingState(TrainingCurve):
    """The state of a training that is not complete: its curve, its duration so far, and its tensors."""

    seconds: float
    tensors: TensorReference


class TargetState(_State):
    """The state of one target of a run.

    It holds the ratio, the units kept so far, the complete steps, and the tensors that a recovery changed.
    """

    ratio: float
    plan: tuple[LayerUnits, ...] | None = None
    steps: tuple[Step, ...] = ()
    tensors: TensorReference | None = None
    training: TrainingState | None = None


class RunState(_State):
    """The state of a run after a step: everything that resuming needs, except the source."""

    version: Literal[2] = VERSION
    fingerprint: str
    revision: str | None
    spec: dict[str, Any]
    baseline: Step
    targets: tuple[TargetState, ...] = ()
    step: int = 0
    """Number of the last complete step; during a training, number of the last recorded step."""

    @classmethod
    def load(cls, data: dict[str, Any]) -> Self:
        """Read a state from JSON-able data.

        Raises:
            PruningError: ``state_invalid`` when another version wrote the state, or when the state is damaged.
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
        """Return the state as JSON-able data."""
        return self.model_dump(mode="json", exclude_unset=True) | {"version": self.version}

    def references(self) -> list[TensorReference]:
        """Return references to all files of tensors that the state needs."""
        holders = [holder for target in self.targets for holder in (target, target.training) if holder is not None]
        return [holder.tensors for holder in holders if holder.tensors is not None]
