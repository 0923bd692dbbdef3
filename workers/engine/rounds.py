"""One pruning round on a model in memory: score, allocate, cut."""

from app.catalog.methods import Method
from workers.engine.allocation import ALLOCATORS, select_units
from workers.engine.plan import Plan
from workers.engine.schedule import RoundTarget
from workers.engine.scoring import SCORERS, Context
from workers.engine.slicing import apply_plan


def prune_round(context: Context, method: Method, target: RoundTarget, width_multiple: int) -> Plan:
    """Cut the model in place until ``target`` of the *source* is gone.

    Units are scored on the model as it is now; what every layer gives is decided; the tensors are cut. Returns the plan
    over the model as it was when the round began.
    """
    decoder, cost = context.decoder, context.decoder.shape.cost
    source, widths = decoder.shape.layers, [layer.shape for layer in decoder.layers]
    groups = target.kv_groups - sum(was.kv_groups - now.kv_groups for was, now in zip(source, widths, strict=True))
    channels = target.channel_parameters - cost.channel * sum(
        was.intermediate_size - now.intermediate_size for was, now in zip(source, widths, strict=True)
    )
    limits = [decoder.shape.removable(width, width_multiple) for width in widths]
    removable = [count * cost.kv_group + width * cost.channel for count, width in limits]
    scores = SCORERS[method.scoring](context)
    budgets = ALLOCATORS[method.allocation](context, removable, groups * cost.kv_group + max(channels, 0.0))
    plan = select_units(widths, scores, budgets, groups, cost, width_multiple)
    apply_plan(decoder, plan)
    return plan
