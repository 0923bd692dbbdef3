"""One pruning round on a model in memory.

A round scores the units, allocates the removal to layers, and then chooses and cuts units and recovers the output,
layer by layer.
"""

from collections.abc import Iterable

import torch
from torch import nn

from secateur.engine.allocation import ALLOCATORS, Layers, UnitCounts, best, equal_units, whole_units
from secateur.engine.allocation.schedule import RoundGoal
from secateur.engine.measure.layer_stream import LayerStream
from secateur.engine.model.decoder import Layer
from secateur.engine.model.plan import Plan
from secateur.engine.recovery import LAYERWISE_RECOVERIES, Cut
from secateur.engine.scoring import LAYERWISE_SCORERS, MODEL_SCORERS, Context, UnitContext
from secateur.engine.structures import WIDTHS, expand


def prune_round(context: Context, goal: RoundGoal) -> Plan:
    """Cut the model in place until ``goal`` of the *source* is removed, and apply the layer-wise recovery.

    The returned plan counts the units of the model at the beginning of the round.
    """
    scorer = context.resolved.components.scorer
    if not scorer.layerwise:
        context.scores = MODEL_SCORERS[scorer.name](context)
    counts = unit_counts(context, goal)
    stream = _layer_stream(context)
    layers: Iterable[Layer] = context.decoder.layers if stream is None else stream.layers()
    plans = []
    for index, layer in enumerate(layers):
        with context.decoder.at_hand(layer):
            plans.append({name: _cut(context, stream, layer, index, name, counts[index][name]) for name in WIDTHS})
            context.decoder.hold(layer)
        context.progress((index + 1) / len(counts))
    return Plan(tuple(plans))


def unit_counts(context: Context, goal: RoundGoal) -> list[UnitCounts]:
    """Return how many units each layer loses so that ``goal`` of the source is removed."""
    decoder, shape = context.decoder, context.begun
    layers = Layers(shape, decoder.widths, context.resolved.width_multiple)
    lost = sum(
        (shape.units("kv_groups", index) - units) * shape.price("kv_groups", index)
        for index, units in enumerate(layers.units("kv_groups"))
    )
    groups = max(goal.parameters["kv_groups"] - lost, 0)
    gone = shape.prunable_parameters - decoder.prunable_parameters
    total = max(sum(goal.parameters.values()) - gone, 0.0)
    if context.resolved.uniform:
        return equal_units(layers, total, groups)
    share = ALLOCATORS[context.resolved.components.allocator.name](context, layers.limits, total)
    return whole_units(layers, share, groups, context.scores)


def _layer_stream(context: Context) -> LayerStream | None:
    """Return the layer stream if scores or the layer-wise recovery need one, else ``None``."""
    if context.scores is not None and not context.resolved.components.recovers_layerwise:
        return None
    return LayerStream(context.decoder, context.tokens, context.batch_windows, context.reference)


def _cut(
    context: Context, stream: LayerStream | None, layer: Layer, index: int, name: str, removed: int
) -> tuple[int, ...]:
    """Choose, cut and recover the structure ``name``, ``removed`` units of every expert; return the units that stay.

    A structure that loses no unit may still be recovered, because earlier layers lost units.
    """
    structure = WIDTHS[name]
    if not structure.units(layer):
        return ()
    chosen, output = context.resolved.components, structure.output(layer)
    recover = LAYERWISE_RECOVERIES.get(chosen.layerwise.name)
    experts, width = structure.experts(layer), structure.width(layer)
    moments = stream.moments(name) if stream is not None and (removed or recover is not None) else []
    if context.scores is not None:
        scores = list(context.scores[name][index].chunk(experts))
    elif removed:
        score = LAYERWISE_SCORERS[chosen.scorer.name]
        scores = [
            score(UnitContext(layer, structure, *own, removed, context.resolved.spec.scoring))
            for own in enumerate(moments)
        ]
    else:
        scores = list(torch.zeros(structure.units(layer)).chunk(experts))
    kept = [best(own, removed) for own in scores]
    units = structure.units(layer) // experts
    all_kept = tuple(expert * units + unit for expert, own in enumerate(kept) for unit in own)
    if recover is None:
        structure.cut(layer, all_kept)
        return all_kept
    weights, bias = output.weight.float().chunk(experts, 1), None if output.bias is None else output.bias.float()
    recovered = []
    for own, weight, moment in zip(kept, weights, moments, strict=True):
        inputs = expand(torch.tensor(own, device=weight.device), width)
        recovered.append(recover(Cut(weight, bias, moment, inputs, chosen.damping)))
    structure.cut(layer, all_kept)
    # A mixture of experts cannot hold a bias; catalog.resolve allows no recovery that would add one.
    new_weight, new_bias = torch.cat([weight for weight, _ in recovered], 1), recovered[0][1]
    output.weight = nn.Parameter(new_weight.to(output.weight.dtype), requires_grad=False)
    output.register_parameter(
        "bias", None if new_bias is None else nn.Parameter(new_bias.to(output.weight.dtype), requires_grad=False)
    )
    return all_kept
