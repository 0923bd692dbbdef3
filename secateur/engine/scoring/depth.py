"""Scores of blocks and sub-layers: by their influence on the hidden states, and by the measured loss without them.

A unit is a structure (``layers``, ``attention``, ``feed_forward``) and the number of a block.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.catalog.structures import Depth
from secateur.engine.model.decoder import Captured, Decoder, Entered
from secateur.engine.recovery.depth import DAMPING, LastProjection, absent

Unit = tuple[Depth, int]
MEASURED = 4
"""If removed units are compensated for, one window in so many measures the loss, and the other windows fit the compensation."""


@dataclass(frozen=True)
class Removal:
    """A removed unit, and the loss afterwards, in nats over the loss of the model with all units."""

    structure: Depth
    index: int
    loss: float


@torch.no_grad()
def influences(
    decoder: Decoder, tokens: Tensor, batch_windows: int, units: Iterable[Unit], progress: Callable[[float], None]
) -> dict[Unit, float]:
    """Return the influence of each unit on ``tokens`` ``[windows, length]``; the lowest are removed first.

    The influence is 1 less the mean over tokens of the cosine between a block's output and its output without the unit.
    For a whole block this is ShortGPT's block influence (Men et al. 2024, arXiv 2403.03853, equation 1).
    """
    wanted = list(units)
    cosines = dict.fromkeys(wanted, 0.0)
    for start in range(0, len(tokens), batch_windows):
        batch = tokens[start : start + batch_windows]
        captured = decoder.capture(batch)
        for index, hidden in enumerate(captured.inputs):
            own = [unit for unit in wanted if unit[1] == index]
            output = decoder.run_layer(captured, index, hidden) if own else hidden
            for unit in own:
                less = _run(decoder, captured, index, index + 1, hidden, {unit})
                similarity = nn.functional.cosine_similarity(output.float(), less.float(), dim=-1)
                cosines[unit] += float(similarity.double().sum())
        progress(min(start + batch_windows, len(tokens)) / len(tokens))
    return {unit: 1 - cosine / tokens.numel() for unit, cosine in cosines.items()}


@torch.no_grad()
def greedy(
    decoder: Decoder,
    tokens: Tensor,
    batch_windows: int,
    prices: Mapping[Unit, int],
    compensated: bool,
    fits: Callable[[Collection[Unit], Unit], bool],
    progress: Callable[[float], None],
) -> Generator[Removal]:
    """Yield units in the order of removal: in each step the unit whose removal costs the least loss per parameter.

    The loss is measured on ``tokens`` ``[windows, length]``. ``prices`` maps the units to the parameters that leave with
    them; ``fits`` says whether a unit may leave after the units that are gone, and :func:`can_leave` must allow it too.
    A unit costs one pass from its block on. Without ``compensated``, and with equal prices, this is SLEB (Song et al.
    2024, arXiv 2402.09025). With ``compensated``, the last projection before the gap is fitted to what the unit did (see
    :mod:`secateur.engine.recovery.depth`), on other windows than those that measure the loss. The model is as before
    when the iteration ends or is closed.
    """
    measured, fitted = tokens, tokens[:0]
    if compensated and len(tokens) > 1:
        others = [index for index in range(len(tokens)) if index % MEASURED]
        measured, fitted = tokens[::MEASURED], tokens[others]
    weights: list[tuple[nn.Parameter, Tensor]] = []
    gone: list[Unit] = []
    count = decoder.predicted(measured)
    base = before = sum(float(losses.double().sum()) for losses in decoder.batch_losses(measured, batch_windows))
    try:
        while candidates := [unit for unit in prices if can_leave(decoder, gone, unit) and fits(gone, unit)]:
            maps = _maps(decoder, fitted, batch_windows, candidates, gone) if len(fitted) else {}
            losses = dict.fromkeys(candidates, 0.0)
            for batch in measured.split(batch_windows):
                for unit, loss in _losses(decoder, batch, candidates, gone, maps):
                    losses[unit] += loss
            best = min(candidates, key=lambda unit: (losses[unit] - before) / prices[unit])
            if best in maps:
                last, change = maps[best]
                weights += [(parameter, parameter.clone()) for parameter in last.linear.parameters()]
                last.fold(change)
            gone.append(best)
            before = losses[best]
            progress(len(gone) / len(prices))
            yield Removal(*best, (before - base) / count)
    finally:
        for parameter, value in reversed(weights):
            parameter.copy_(value)


def can_leave(decoder: Decoder, gone: Collection[Unit], unit: Unit) -> bool:
    """Return whether the model runs without ``unit`` after the units ``gone``.

    A block loses at most one unit. One block stays, and of each kind of attention (the config's ``layer_types``) that is
    left, one block keeps its attention, because a KV cache counts its tokens there.
    """
    if any(index == unit[1] for _, index in gone):
        return False
    after = {unit, *gone}
    kinds = getattr(decoder.model.config, "layer_types", None) or [""] * len(decoder.layers)
    blocks = [index for index in range(len(decoder.layers)) if ("layers", index) not in after]
    attending = {kinds[index] for index in blocks if ("attention", index) not in after}
    return bool(blocks) and attending == {kinds[index] for index in blocks}


Maps = dict[Unit, tuple[LastProjection, Tensor]]
"""By unit: the last projection before the gap that the unit leaves, and the map of the projection's features to what the unit added."""


def by_structure(units: Iterable[Unit]) -> dict[str, set[int]]:
    """Return the numbers of the blocks by structure."""
    found: dict[str, set[int]] = {}
    for structure, index in units:
        found.setdefault(structure, set()).add(index)
    return found


def _maps(
    decoder: Decoder, tokens: Tensor, batch_windows: int, candidates: Collection[Unit], gone: Collection[Unit]
) -> Maps:
    """Fit, for each candidate, the last projection before the gap to what the candidate adds in the present model.

    A candidate before which there is no block has no map.
    """
    maps: Maps = {}
    entered = [decoder.enter(batch) for batch in tokens.split(batch_windows)]
    hidden, place, entering = [each.hidden for each in entered], -1, [torch.empty(0)]

    def fit(unit: Unit, index: int, inputs: list[Tensor], targets: list[Tensor]) -> None:
        with absent(decoder.layers[index], index, by_structure([*gone, unit])):
            last = LastProjection(decoder, index, entered[0], inputs[0])
            moments = last.moments()
            for each, entering, target in zip(entered, inputs, targets, strict=True):
                run = last.run(each, entering)
                moments.add(run.features, target, target - run.output)
            maps[unit] = last, moments.fit(DAMPING)

    for index in range(len(decoder.layers)):
        if ("layers", index) in gone:
            continue
        leaving = [_run(decoder, e, index, index + 1, h, gone) for e, h in zip(entered, hidden, strict=True)]
        if ("layers", index) in candidates and place >= 0:
            fit(("layers", index), place, entering, leaving)
        for unit in candidates:
            if unit[1] == index and unit[0] != "layers":
                fit(unit, index, hidden, leaving)
        place, entering, hidden = index, hidden, leaving
    return maps


def _losses(
    decoder: Decoder, batch: Tensor, candidates: Collection[Unit], gone: Collection[Unit], maps: Maps
) -> Iterator[tuple[Unit, float]]:
    """Yield each candidate with the summed loss of ``batch`` ``[windows, length]`` without the candidate."""
    entered = decoder.enter(batch)
    inputs, hidden = [], entered.hidden
    for index in range(len(decoder.layers)):
        inputs.append(hidden)
        hidden = _run(decoder, entered, index, index + 1, hidden, gone)
    for unit in candidates:
        without, start = {unit, *gone}, unit[1]
        if unit in maps:
            last, change = maps[unit]
            with absent(decoder.layers[last.index], last.index, by_structure(without)):
                run = last.run(entered, inputs[last.index])
            start, hidden = (
                last.index + 1,
                run.output + (run.features @ change.to(run.features.dtype)).view_as(run.output),
            )
        else:
            hidden = inputs[start]
        hidden = _run(decoder, entered, start, len(decoder.layers), hidden, without)
        yield unit, float(decoder.losses(decoder.head(hidden), batch).double().sum())


def _run(
    decoder: Decoder, entered: Entered | Captured, start: int, stop: int, hidden: Tensor, gone: Collection[Unit]
) -> Tensor:
    """Return what leaves block ``stop - 1`` when ``hidden`` enters block ``start`` and the units ``gone`` are absent."""
    removed = by_structure(gone)
    for index in range(start, stop):
        if index not in removed.get("layers", ()):
            with absent(decoder.layers[index], index, removed):
                hidden = decoder.run_layer(entered, index, hidden)
    return hidden
