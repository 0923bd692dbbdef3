"""Prune a copy of a model by a request for whole units, widths or both; a search for layers is shared between ratios.

The searches remove one layer after the other, so the layers of a small ratio are the first of a larger ratio's.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from secateur.catalog.resolve import resolve
from secateur.catalog.spec import PruningSpec
from secateur.catalog.structures import DEPTH, WHOLE
from secateur.engine.allocation.schedule import round_goals
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import batch_windows
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Plan
from secateur.engine.recovery.depth import compensate
from secateur.engine.run.rounds import prune_round
from secateur.engine.run.whole import remove_whole, without
from secateur.engine.scoring import Context
from secateur.engine.scoring.depth import Unit, greedy
from secateur.engine.structures.layers import publish

Search = Literal["compensated-loss", "sleb"]
SEARCHED_SHARE = 0.3
"""The largest share of the layers that a search orders."""
SEARCH_WINDOWS = 6
"""The calibration windows that a search reads."""
Kept = Callable[[str, str, Callable[[], Any]], Any]


def remove(
    decoder: Decoder, spec: PruningSpec, tokens: Tensor, search: Search | None, kept: Kept, known: Statistics
) -> Decoder:
    """Return a pruned copy of ``decoder``, as it would be published.

    ``tokens`` is ``[windows, length]``; ``kept`` keeps the order of a search; ``known`` are statistics of ``decoder``.
    """
    pruned = Decoder(copy.deepcopy(decoder.model), decoder.tokenizer, decoder.shape)
    dtype = str(decoder.model.dtype).removeprefix("torch.")
    resolved = resolve(spec, decoder.shape, config=decoder.model.config.to_dict(), source_dtype=dtype)
    chosen, (ratio,), (split,) = resolved.components, resolved.ratios, resolved.splits
    (counts,) = split.values()
    context = Context(
        pruned,
        tokens,
        batch_windows(tokens),
        resolved,
        ratio,
        spec.seed + 1,
        _quiet,
        reference=None if not chosen.fits_to_reference else pruned if counts.keys() & {*DEPTH} else decoder,
        statistics=known,
    )
    plan = Plan.full(decoder.shape.layers)
    if counts:
        plan = plan.then(
            remove_whole(context, counts)
            if search is None
            else _first_layers(
                context, kept("order", search, lambda: _order(decoder, tokens, search)), counts["layers"]
            )
        )
        context.statistics = None
    context.begun = replace(decoder.shape, layers=tuple(plan.shapes(decoder.shape, WHOLE)))
    if chosen.cuts_widths:
        whole, begun = decoder.shape.prunable_parameters, context.begun.prunable_parameters
        share = (ratio * whole - whole + begun) / begun
        (goal,) = round_goals(context.begun, share, 1, spec.allocation.schedule, resolved.width_multiple)
        prune_round(context, goal)
    publish(pruned)
    return pruned


def _order(decoder: Decoder, tokens: Tensor, search: Search) -> list[int]:
    """Return the layers in the order in which the search removes them."""
    prices: dict[Unit, int] = {
        ("layers", index): decoder.shape.price("layers", index) for index in range(len(decoder.layers))
    }
    most = round(SEARCHED_SHARE * len(prices))
    windows = tokens[:SEARCH_WINDOWS]
    removals = greedy(
        decoder,
        windows,
        batch_windows(windows),
        prices,
        search == "compensated-loss",
        lambda gone, unit: len(gone) < most,
        _quiet,
    )
    return [removal.index for removal in removals]


def _first_layers(context: Context, order: list[int], count: int) -> Plan:
    """Remove the first ``count`` layers of ``order``; they are compensated for if the request has a fitted recovery."""
    gone = set(order[:count])
    if context.resolved.components.layerwise.fits:
        compensate(context.decoder, context.tokens, context.batch_windows, {"layers": gone}, _quiet)
    plan = without(context.decoder, [("layers", index) for index in gone])
    apply_plan(context.decoder, plan)
    return plan


def _quiet(share: float) -> None:
    """Report nothing: the benchmark reports progress after each point."""
