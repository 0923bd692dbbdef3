"""One pruning round on a model in memory.

A round scores the units, allocates the removal to layers, and then chooses and cuts units and recovers the output,
layer by layer.
"""

from collections.abc import Iterable

import torch
from torch import nn

from secateur.engine.allocation import ALLOCATORS, LayerLimit, UnitCounts, best, equal_units, whole_units
from secateur.engine.allocation.schedule import RoundGoal
from secateur.engine.measure.layer_stream import LayerStream
from secateur.engine.model.cutting import cut, expand
from secateur.engine.model.decoder import STRUCTURES, Layer, Structure
from secateur.engine.model.plan import LayerPlan, Plan
from secateur.engine.recovery import LAYERWISE_RECOVERIES, Cut
from secateur.engine.scoring import LAYERWISE_SCORERS, MODEL_SCORERS, Context, UnitContext


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
        kept = {
            structure: _cut_structure(context, stream, layer, index, structure, counts[index].removed(structure))
            for structure in STRUCTURES
        }
        plans.append(LayerPlan(kept["kv_groups"], kept["channels"]))
        context.progress((index + 1) / len(counts))
    return Plan(tuple(plans))


def unit_counts(context: Context, goal: RoundGoal) -> list[UnitCounts]:
    """Return how many units each layer loses so that ``goal`` of the source is removed."""
    width_multiple = context.resolved.width_multiple
    decoder, cost = context.decoder, context.decoder.shape.cost
    source, widths = decoder.shape.layers, [layer.shape for layer in decoder.layers]
    groups = goal.kv_groups - sum(was.kv_groups - now.kv_groups for was, now in zip(source, widths, strict=True))
    gone = decoder.shape.prunable_parameters - decoder.prunable_parameters
    total = max(goal.kv_groups * cost.kv_group + goal.channel_parameters - gone, 0.0)
    if context.resolved.uniform:
        return equal_units(widths, total, max(groups, 0), cost, width_multiple)
    limits = [
        LayerLimit(kv_groups, channels, kv_groups * cost.kv_group + channels * cost.channel)
        for kv_groups, channels in (decoder.shape.removable(width, width_multiple) for width in widths)
    ]
    share = ALLOCATORS[context.resolved.components.allocator.name](context, limits, total)
    return whole_units(widths, share, max(groups, 0), context.scores, cost, width_multiple)


def _layer_stream(context: Context) -> LayerStream | None:
    """Return the layer stream if scores or the layer-wise recovery need one, else ``None``."""
    if context.scores is not None and not context.resolved.components.recovers_layerwise:
        return None
    return LayerStream(context.decoder, context.tokens, context.batch_windows, context.reference)


def _cut_structure(
    context: Context, stream: LayerStream | None, layer: Layer, index: int, structure: Structure, removed: int
) -> tuple[int, ...]:
    """Choose, cut and recover one structure, ``removed`` units of every expert; return the units that stay.

    A structure that loses no unit may still be recovered, because earlier layers lost units.
    """
    chosen, output = context.resolved.components, layer.output(structure)
    recover = LAYERWISE_RECOVERIES.get(chosen.layerwise.name)
    experts, width = layer.experts(structure), layer.width(structure)
    moments = stream.moments(structure) if stream is not None and (removed or recover is not None) else []
    if context.scores is not None:
        scores = list(context.scores.of(structure)[index].chunk(experts))
    elif removed:
        score = LAYERWISE_SCORERS[chosen.scorer.name]
        scores = [
            score(UnitContext(layer, structure, *own, removed, context.resolved.spec.scoring))
            for own in enumerate(moments)
        ]
    else:
        scores = list(torch.zeros(layer.units(structure)).chunk(experts))
    kept = [best(own, removed) for own in scores]
    units = layer.units(structure) // experts
    all_kept = tuple(expert * units + unit for expert, own in enumerate(kept) for unit in own)
    if recover is None:
        cut(layer, structure, all_kept)
        return all_kept
    weights, bias = output.weight.float().chunk(experts, 1), None if output.bias is None else output.bias.float()
    recovered = []
    for own, weight, moment in zip(kept, weights, moments, strict=True):
        inputs = expand(torch.tensor(own, device=weight.device), width)
        recovered.append(recover(Cut(weight, bias, moment, inputs, chosen.damping)))
    cut(layer, structure, all_kept)
    # A mixture of experts cannot hold a bias; catalog.resolve allows no recovery that would add one.
    new_weight, new_bias = torch.cat([weight for weight, _ in recovered], 1), recovered[0][1]
    output.weight = nn.Parameter(new_weight.to(output.weight.dtype), requires_grad=False)
    output.register_parameter(
        "bias", None if new_bias is None else nn.Parameter(new_bias.to(output.weight.dtype), requires_grad=False)
    )
    return all_kept
