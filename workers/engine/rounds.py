"""One pruning round on a model in memory: score, allocate, cut."""

from app.catalog.architectures import LayerShape, UnitCost
from app.catalog.methods import Method
from workers.engine.allocation import ALLOCATORS, select_units
from workers.engine.plan import Plan
from workers.engine.scoring import SCORERS, Context
from workers.engine.slicing import apply_plan


def prune_round(context: Context, method: Method, ratio: float, width_multiple: int) -> Plan:
    """Cut the model in place until ``ratio`` of the *source's* prunable parameters are gone.

    Units are scored on the model as it is now; what every layer gives is decided; the tensors are cut. Returns the plan
    over the model as it was when the round began.
    """
    decoder, cost = context.decoder, context.decoder.shape.cost
    widths = [layer.shape for layer in decoder.layers]
    gone = decoder.shape.prunable_parameters - decoder.prunable_parameters
    removable = [_removable(width, cost, width_multiple) for width in widths]
    total = min(max(ratio * decoder.shape.prunable_parameters - gone, 0.0), sum(removable))
    scores = SCORERS[method.scoring](context)
    budgets = ALLOCATORS[method.allocation](context, removable, total)
    plan = select_units(widths, scores, budgets, cost, width_multiple)
    apply_plan(decoder, plan)
    return plan


def _removable(width: LayerShape, cost: UnitCost, multiple: int) -> int:
    """Parameters that a layer can give: all but one KV group and one block of channels."""
    channels = width.intermediate_size - min(multiple, width.intermediate_size)
    return (width.kv_groups - 1) * cost.kv_group + channels * cost.channel
