"""Removal of whole units: layers, sub-layers and experts, before the widths of what stays are cut.

Units of depth are chosen for the whole model and compensated for together. Every layer loses the same number of experts.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import mean

from torch import Tensor

from secateur.catalog.structures import DEPTH
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Kept, Plan
from secateur.engine.recovery.depth import compensate
from secateur.engine.scoring import Context
from secateur.engine.scoring.depth import Unit, by_structure, can_leave, greedy, influences
from secateur.engine.scoring.experts import EXPERT_SCORERS
from secateur.engine.structures import STRUCTURES

EQUAL_SCORERS: dict[str, dict[str, Callable[[Context], list[Tensor]]]] = {
    "experts": EXPERT_SCORERS,
}
"""The scorers of the structures of which every layer loses the same number of units.

A scorer returns the scores ``[units]`` of each layer, which are empty for a layer without such units.
"""


def remove_whole(context: Context, counts: Mapping[str, int]) -> Plan:
    """Remove ``counts`` units of each structure from the model in place; of experts, this number in every layer.

    The returned plan counts the units of the model before. With a layer-wise least-squares recovery, the removed units
    of depth are compensated for, in families whose outputs are added to the hidden states without a norm.
    """
    plan = _remove_depth(context, {name: counts[name] for name in DEPTH if name in counts})
    for name, scorers in EQUAL_SCORERS.items():
        if name in counts:
            scores = scorers[context.resolved.components.whole_scorers[name].name](context)
            plan = plan.then(_apply(context, _best(context.decoder, name, scores, counts[name])))
    return plan


def _best(decoder: Decoder, name: str, scores: Sequence[Tensor], count: int) -> Plan:
    """Return the plan by which every layer loses its ``count`` units of the structure ``name`` with the lowest scores."""
    structure, layers = STRUCTURES[name], list[Kept]()
    for layer, own in zip(decoder.layers, scores, strict=True):
        kept = structure.best(layer, own, len(own) - count) if len(own) else ()
        layers.append({name: kept, **structure.held(layer, kept)} if kept else {})
    return Plan(tuple(layers))


def _remove_depth(context: Context, counts: Mapping[str, int]) -> Plan:
    decoder, chosen = context.decoder, context.resolved.components
    if not counts:
        return without(decoder, ())
    gone = _choose_depth(context, counts)
    if chosen.layerwise.fits and decoder.shape.family.additive:
        compensate(decoder, context.tokens, context.batch_windows, by_structure(gone), context.progress)
        for layer in decoder.layers:
            decoder.hold(layer)
    return _apply(context, without(decoder, gone))


def without(decoder: Decoder, gone: Iterable[Unit]) -> Plan:
    """Return the plan that removes the units of depth ``gone``, with the units of the widths that they hold."""
    layers: list[Kept] = [{} for _ in decoder.layers]
    for name, index in gone:
        layers[index] = {name: (), **STRUCTURES[name].held(decoder.layers[index], ())}
    return Plan(tuple(layers))


def _choose_depth(context: Context, counts: Mapping[str, int]) -> list[Unit]:
    """Return the units to remove, in the order of their removal."""
    decoder, chosen = context.decoder, context.resolved.components
    units: list[Unit] = [
        (name, index)
        for name in DEPTH
        if name in counts
        for index, layer in enumerate(decoder.layers)
        if STRUCTURES[name].units(layer)
    ]

    prices = {(name, index): decoder.shape.price(name, index, decoder.layers[index].shape) for name, index in units}
    wanted = {name: counts[name] * mean(prices[unit] for unit in units if unit[0] == name) for name in counts}

    def fits(gone: Collection[Unit], unit: Unit) -> bool:
        """Return whether the model is nearer to the number of parameters that its layers are to lose without ``unit``."""
        before = sum(prices[each] for each in gone if each[0] == unit[0])
        return before + prices[unit] / 2 < wanted[unit[0]]

    (scorer,) = {chosen.whole_scorers[name].name for name in counts}
    gone: list[Unit] = []
    if scorer == "shortgpt":
        found = influences(decoder, context.tokens, context.batch_windows, units, context.progress)
        for unit in sorted(units, key=lambda unit: found[unit]):
            if fits(gone, unit) and can_leave(decoder, gone, unit):
                gone.append(unit)
        return gone
    compensated = scorer == "compensated-loss" and chosen.layerwise.fits and decoder.shape.family.additive
    removals = greedy(
        decoder, context.tokens, context.batch_windows, prices, compensated, fits, _share(context, counts)
    )
    return [(removal.structure, removal.index) for removal in removals]


def _share(context: Context, counts: Mapping[str, int]) -> Callable[[float], None]:
    """Return a function that reports the share of the removals; ``greedy`` counts removals among all units."""
    total = sum(counts.values())
    done = 0

    def report(_: float) -> None:
        nonlocal done
        done += 1
        context.progress(min(done / total, 1.0))

    return report


def _apply(context: Context, plan: Plan) -> Plan:
    """Cut the model of ``context`` by ``plan``; what is known of the unpruned model is of no more use."""
    apply_plan(context.decoder, plan)
    context.statistics = None
    return plan
