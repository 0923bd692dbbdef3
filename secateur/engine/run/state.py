"""The state of a run, from which the run can be resumed.

The state is frozen data, which is replaced and written as JSON when a step is complete.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.report import Step, StepKind, TrainingCurve, Trial
from secateur.engine.model.plan import PlanData, Ranges

VERSION: Literal[3] = 3


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
    trials: tuple[Trial, ...] = ()
    """The splits of the ratio that were tried, and the taken split first once a round is complete; empty if no
    structures compete."""
    plan: PlanData | None = None
    steps: tuple[Step, ...] = ()
    tensors: TensorReference | None = None
    training: TrainingState | None = None


class VocabularyState(_State):
    """The tokens that a run keeps, as ranges ``[first, last]`` of the source's ids, and by how much texts grow."""

    kept: Ranges
    growth: float


class RunState(_State):
    """The state of a run after a step: everything that resuming needs, except the source."""

    version: Literal[3] = VERSION
    fingerprint: str
    revision: str | None
    spec: dict[str, Any]
    baseline: Step
    vocabulary: VocabularyState | None = None
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
        return self.model_dump(mode="json", exclude_unset=True) | {"version": self.version, "step": self.step}

    def ending_here(self, spec: PruningSpec) -> Self:
        """Return the state as that of a run of ``spec`` with one target, which ends with the newest step.

        ``spec`` has the ratio that the step reached and the rounds until then; a training stays if the step completed it.

        Raises:
            PruningError: ``source_changed`` when ``spec`` differs from this run's request in anything else, or when the
                newest step is not the last step of ``spec``.
        """
        asked, target = spec.published(), self.targets[-1]
        recovery = {**self.spec["recovery"], "training": asked["recovery"]["training"]}
        ending = {
            "target_ratio": asked["target_ratio"],
            "goal": None,
            "rounds": asked["rounds"],
            "shares": asked["shares"],
            "recovery": recovery,
        }
        rounds = sum(step.kind == StepKind.ROUND for step in target.steps)
        steps = rounds + (asked["recovery"]["training"] is not None)
        if asked != {**self.spec, **ending} or (rounds, steps) != (spec.rounds, len(target.steps)):
            raise PruningError(
                ErrorCode.SOURCE_CHANGED,
                "The request is not that of the run whose step is to be published.",
                field="model_id",
            )
        target = target.model_copy(update={"ratio": asked["target_ratio"] or 0.0, "training": None})
        return self.model_copy(update={"spec": asked, "targets": (target,)})

    def references(self) -> list[TensorReference]:
        """Return references to all files of tensors that the state needs."""
        holders = [holder for target in self.targets for holder in (target, target.training) if holder is not None]
        return [holder.tensors for holder in holders if holder.tensors is not None]
