"""The resolution of a pruning request: the components without a model, and all values that depend on a model.

The engine receives a :class:`Resolved` and no other part of a request.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from secateur.catalog.architectures import ModelShape
from secateur.catalog.budget import block, check_split, check_structures, splits, whole_units, without_whole
from secateur.catalog.gguf import gguf_obstacle
from secateur.catalog.methods import (
    ALLOCATORS,
    LAYERWISE_RECOVERIES,
    METHODS,
    NO_RECOVERY,
    STATIC_METHODS,
    TRAININGS,
    Allocator,
    FitTo,
    LayerwiseRecovery,
    Method,
    Need,
    Scorer,
    Training,
)
from secateur.catalog.spec import DTYPE_BYTES, MAX_RATIO, PruningSpec, _without_bias, scorer_of
from secateur.catalog.structures import DEPTH, STRUCTURES, WHOLE, WIDTHS
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.report import ComponentNames


@dataclass(frozen=True)
class Components:
    """The components that a request prunes with, known without a model.

    A component that the request does not replace is the method's own.
    """

    method: Method
    scorer: Scorer
    allocator: Allocator
    layerwise: LayerwiseRecovery
    training: Training | None
    fit_to: FitTo
    damping: float
    rounds: int
    """The number of pruning rounds for each target ratio."""
    structures: tuple[str, ...]
    """The structures that are cut, in the order in which they are cut."""
    whole_scorers: Mapping[str, Scorer]
    """The scorer of each structure that is removed whole, before the widths are cut."""
    competing: bool
    """Whether structures compete for the ratio: several, of which none has a share. KV groups and channels are one."""
    targets: int
    """The number of pruned models that the request makes."""

    @property
    def dynamic(self) -> bool:
        """Whether the published model chooses its units for each prompt; a dynamic method cuts nothing."""
        return self.method.dynamic

    @property
    def needs(self) -> frozenset[Need]:
        """Everything that the components need of the model."""
        if self.dynamic:
            return self.method.needs
        needs = frozenset[Need]()
        if self.cuts_widths:
            needs |= self.scorer.needs | self.allocator.needs | self.layerwise.needs
        if self.training is not None:
            needs |= self.training.needs
        return needs | {Need.REFERENCE} if self.fits_to_reference else needs

    @property
    def cuts_widths(self) -> bool:
        """Whether KV groups or channels are cut."""
        return any(name in WIDTHS for name in self.structures)

    @property
    def recovers_layerwise(self) -> bool:
        """Whether a layer-wise recovery corrects layers as they are cut."""
        return self.layerwise.name != NO_RECOVERY

    @property
    def fits_to_reference(self) -> bool:
        """Whether layers are fitted to the hidden states of the unpruned model."""
        return self.cuts_widths and self.layerwise.fits and self.fit_to == "model"

    @property
    def steps_per_target(self) -> int:
        """The number of steps for each target ratio: the pruning rounds, and one step if there is a training."""
        return self.rounds + (self.training is not None)

    @property
    def steps(self) -> int:
        """The number of steps of all target ratios, without the baseline (step 0)."""
        return self.targets * self.steps_per_target

    @property
    def names(self) -> ComponentNames:
        """The names of the components, as the report and the model card show them."""
        return ComponentNames(
            scorer=self.scorer.name,
            allocator=self.allocator.name,
            layerwise_recovery=self.layerwise.name,
            training=self.training and self.training.name,
        )


def needs_reference(chosen: Components, removed: Mapping[str, int]) -> bool:
    """Return whether a round needs the unpruned model beside the model that lost the whole units ``removed``.

    In a first round that removes none, the model itself is the unpruned one. Without whole layers, those before a gap
    stand for it, so widths are fitted to the model as the round begins.
    """
    return chosen.fits_to_reference and not removed.keys() & {*DEPTH} and (chosen.rounds > 1 or bool(removed))


def components(spec: PruningSpec) -> Components:
    """Return the components that a request prunes with."""
    method, layerwise = METHODS[spec.method], spec.recovery.layerwise
    allocator = "uniform" if spec.layout == "uniform" else spec.allocation.kind or method.allocator
    asked = [name for name in STRUCTURES if name in (spec.structures or method.structures)]
    scorers = {name: scorer for name in asked if (scorer := scorer_of(name, spec.method, spec.scoring.kind))}
    groups = {"widths" if name in WIDTHS else name for name in asked}
    return Components(
        method=method,
        scorer=scorers[asked[-1]],
        structures=tuple(asked),
        whole_scorers={name: scorer for name, scorer in scorers.items() if name in WHOLE},
        competing=len(groups) > 1 and not spec.shares and not spec.vocabulary_alone,
        allocator=ALLOCATORS[allocator],
        layerwise=LAYERWISE_RECOVERIES[layerwise.kind or method.layerwise_recovery],
        training=None if spec.recovery.training is None else TRAININGS[spec.recovery.training.kind],
        fit_to=layerwise.fit_to or method.fit_to,
        damping=layerwise.damping or method.damping,
        rounds=1 if spec.vocabulary_alone else spec.rounds or method.default_rounds,
        targets=len(spec.requested_ratios),
    )


@dataclass(frozen=True)
class Resolved:
    """A request resolved on a model, which is the engine's input."""

    spec: PruningSpec
    components: Components
    ratios: tuple[float, ...]
    """The ratio of each pruned model, ascending. If it is not ``decided``, the largest that the request may need."""
    decided: bool
    """Whether the ratios are final: that of a goal is not, before the tokens that leave are chosen."""
    splits: tuple[Mapping[tuple[int, ...], Mapping[str, int]], ...]
    """The splits of each ratio among structures, with the numbers of whole units that each split removes, by structure.

    The number of experts is that of each layer. If there are several splits, the structures compete: the measured loss
    chooses among them, see :mod:`secateur.engine.run.competition`.
    """
    width_multiple: int
    """The number that all feed-forward widths are multiples of."""
    dtype: str
    """The dtype of the computation and of the published weights."""

    def nearest_ratio(self, shape: ModelShape, index: int) -> float | None:
        """Return the ratio that whole units reach at the ratio of this index, or ``None`` if it is not known before the run.

        ``shape`` has the sizes of the unpruned model.
        """
        if len(self.splits[index]) > 1 or not self.decided:
            return None
        (removed,) = self.splits[index].values()
        ratio, whole = self.ratios[index], shape.prunable_parameters
        left = without_whole(shape.cutting(self.components.structures), removed)
        now = left.prunable_parameters
        gone = whole - now - left.standing_in(shape)
        if ratio and self.components.cuts_widths:
            gone += round(left.nearest_ratio((ratio * whole - gone) / now, self.width_multiple, self.uniform) * now)
        return gone / whole

    @property
    def uniform(self) -> bool:
        """Whether all layers get the same widths."""
        return self.spec.layout == "uniform"


def resolve(
    spec: PruningSpec,
    shape: ModelShape,
    *,
    config: Mapping[str, Any],
    source_dtype: str,
    vocabulary_cut: bool = False,
) -> Resolved:
    """Resolve ``spec`` on a model of sizes ``shape``.

    ``config`` is the model's ``config.json``; ``source_dtype`` is the dtype that ``auto`` stands for. ``vocabulary_cut``
    says that the tokens have left that the request's ``vocabulary`` removes, so that the ratio of a goal is known: 0 if
    the model is small enough without them.

    Raises:
        PruningError: ``goal_unreachable`` if the goal is not smaller than the model, or is too small; ``ratio_unreachable``
            if whole units do not come near enough to a ratio; ``recovery_unsupported``, ``method_unsupported`` or
            ``gguf_unsupported`` if the model does not allow a component or a format. Each message names what is allowed.
    """
    chosen, uniform = components(spec), spec.layout == "uniform"
    shape = shape.cutting(chosen.structures)
    dtype = source_dtype if spec.dtype == "auto" else spec.dtype
    field = "target_ratio" if spec.goal is None else "goal"
    decided = spec.goal is None or spec.vocabulary is None or vocabulary_cut
    ratios = tuple(
        _ratio_of(spec, chosen, shape, dtype, vocabulary_cut) if ratio is None else ratio
        for ratio in spec.requested_ratios
    )
    if not any(ratios):
        chosen = replace(chosen, rounds=1, competing=False)
    _check_model(spec, chosen, shape, config, may_cut=any(ratios), decided=decided)
    if any(ratios):
        check_structures(shape, config, chosen.structures)
    found: list[Mapping[tuple[int, ...], Mapping[str, int]]] = []
    multiple = spec.allocation.width_multiple
    for ratio in ratios:
        if not ratio or not decided:  # the request removes tokens alone, or it is unknown how many units
            found.append({(): {}})
        elif chosen.competing:
            found.append(
                splits(shape, config, chosen.structures, ratio, shape.width_multiple(multiple), uniform, field)
            )
        else:
            removed = whole_units(shape, config, chosen.structures, spec.shares, ratio, field)
            if chosen.cuts_widths:
                check_split(shape, removed, chosen.structures, ratio, shape.width_multiple(multiple), uniform, field)
            found.append({(): removed})
    return Resolved(spec, chosen, ratios, decided, tuple(found), shape.width_multiple(multiple), dtype)


def _check_model(
    spec: PruningSpec, chosen: Components, shape: ModelShape, config: Mapping[str, Any], *, may_cut: bool, decided: bool
) -> None:
    """Check that the model allows the components, the layout and the formats.

    ``may_cut`` says whether units may leave; unless it is ``decided``, it is possible that none does.
    """
    if shape.family.experts and chosen.layerwise.adds_bias:
        raise PruningError(
            ErrorCode.RECOVERY_UNSUPPORTED,
            f"Experts have no place for the biases that the layer-wise recovery '{chosen.layerwise.name}' adds; allowed: "
            f"recovery.layerwise.kind {_without_bias()}.",
            field="recovery.layerwise.kind",
        )
    _check_layout(spec, shape, config, may_cut=may_cut and chosen.cuts_widths, decided=decided)
    if chosen.dynamic and shape.differs:
        raise PruningError(
            ErrorCode.METHOD_UNSUPPORTED,
            f"Method '{spec.method}' needs a model whose layers are alike, such as one pruned in layout uniform or padded; "
            f"allowed for this model: {', '.join(STATIC_METHODS)}.",
            field="method",
        )
    if chosen.dynamic and (shape.family.experts or shape.family.two_positions):
        raise PruningError(
            ErrorCode.METHOD_UNSUPPORTED,
            f"Method '{spec.method}' does not support mixtures of experts and the first ChatGLM-6B; allowed: "
            f"{', '.join(STATIC_METHODS)}.",
            field="method",
        )
    leaves_alike = not may_cut or all(STRUCTURES[name].alike for name in chosen.structures)
    if "gguf" in spec.formats:
        obstacle = gguf_obstacle(
            shape,
            config,
            spec.gguf_quantization,
            uniform=spec.layout != "per-layer" or (leaves_alike and not shape.differs),
            added_biases=chosen.layerwise.adds_bias,
            width_multiple=spec.allocation.width_multiple,
        )
        if obstacle is not None:
            raise obstacle


def _check_layout(
    spec: PruningSpec, shape: ModelShape, config: Mapping[str, Any], *, may_cut: bool, decided: bool
) -> None:
    """Check that the stock class can hold a source whose layers differ, if the layout is one of the stock class.

    ``may_cut`` says whether widths may be cut; unless it is ``decided``, it is possible that none is.

    Raises:
        PruningError: ``ratio_unreachable`` or ``recovery_unsupported``, for the field ``layout``.
    """
    if spec.layout == "per-layer":
        return
    if config.get("added_biases"):
        raise PruningError(
            ErrorCode.RECOVERY_UNSUPPORTED,
            f"This model was pruned before and got biases, for which layout '{spec.layout}' has no place; allowed: "
            "'per-layer'.",
            field="layout",
        )
    if shape.differs_in_kind:
        raise PruningError(
            ErrorCode.RATIO_UNREACHABLE,
            f"This model's layers differ in more than their numbers of KV groups and channels, and in layout "
            f"'{spec.layout}' all layers are alike; allowed: 'per-layer'.",
            field="layout",
        )
    if spec.layout != "uniform":
        return
    if may_cut and not shape.fits_uniform:
        raise PruningError(
            ErrorCode.RATIO_UNREACHABLE,
            "In layout 'uniform' all layers have the same number of heads, and the stock class of this model takes none that "
            "all its layers can be left with; allowed: 'per-layer', 'padded'.",
            field="layout",
        )
    if not (may_cut and decided) and len(set(shape.layers)) > 1:
        raise PruningError(
            ErrorCode.RATIO_UNREACHABLE,
            f"This model's layers differ in width, and in layout 'uniform' all layers are alike; allowed: 'per-layer', "
            f"'padded', or 'structures' with {' and '.join(WIDTHS)}.",
            field="layout",
        )


def _ratio_of(spec: PruningSpec, chosen: Components, shape: ModelShape, dtype: str, vocabulary_cut: bool) -> float:
    """Return the ratio by which a model of sizes ``shape`` meets the goal; the largest, before its tokens are chosen."""
    goal = spec.goal
    assert goal is not None  # validation refuses a request with neither a ratio nor a goal
    wanted = goal.parameters or (goal.bytes or 0) / DTYPE_BYTES[dtype]
    ratio = (shape.parameters - wanted) / shape.prunable_parameters
    if vocabulary_cut:
        step = block(shape, chosen.structures, shape.width_multiple(spec.allocation.width_multiple), False)
        if shape.parameters - wanted <= step / 2:
            return 0.0  # the tokens alone meet the goal, as nearly as units could
    tokens = shape.vocabulary_parameters if spec.vocabulary is not None and not vocabulary_cut else 0
    smallest = shape.parameters - MAX_RATIO * shape.prunable_parameters - tokens
    if not smallest <= wanted < shape.parameters:
        raise PruningError(
            ErrorCode.GOAL_UNREACHABLE,
            f"The goal is {wanted:,.0f} parameters; this model has {shape.parameters:,} and can be pruned to {smallest:,.0f}.",
            field="goal",
        )
    return min(ratio, MAX_RATIO)
