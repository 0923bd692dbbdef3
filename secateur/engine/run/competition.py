"""Competition of structures for a ratio: the split with the lowest measured loss is taken.

A split gives each structure some quarters of the ratio. Every trial prunes the whole model by a split and measures the
loss on calibration tokens on which it was not calibrated. The splits that give all to one structure are tried first;
from the best of them, quarters move from structure to structure as long as the loss falls.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from secateur.catalog.budget import QUARTERS
from secateur.engine.scoring.depth import MEASURED

Split = tuple[int, ...]


def lowest(splits: Mapping[Split, Mapping[str, int]], loss: Callable[[Mapping[str, int]], float]) -> dict[Split, float]:
    """Return the measured losses by split, the lowest first; ``loss`` measures the model without such whole units."""
    tried: dict[Split, float] = {}

    def best_of(some: list[Split]) -> Split:
        for split in some:
            if split not in tried:
                tried[split] = loss(splits[split])
        return min(some, key=tried.__getitem__)

    best = best_of([split for split in splits if sum(part > 0 for part in split) == 1] or [next(iter(splits))])
    while (better := best_of([best, *_beside(best, splits)])) != best:
        best = better
    return dict(sorted(tried.items(), key=lambda item: item[1]))


def halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows of ``tokens`` ``[windows, length]`` that calibrate trials, and those that measure them.

    One window in :data:`MEASURED` measures; a single window does both.
    """
    if len(tokens) == 1:
        return tokens, tokens
    calibrating = [index for index in range(len(tokens)) if index % MEASURED]
    return tokens[calibrating], tokens[::MEASURED]


def _beside(split: Split, splits: Iterable[Split]) -> list[Split]:
    """Return those of ``splits`` that are ``split`` after the fewest quarters moved from one structure to another."""
    nearest: dict[tuple[int, int], tuple[int, Split]] = {}
    for other in splits:
        moved = [its - own for own, its in zip(split, other, strict=True)]
        changed = [place for place, quarters in enumerate(moved) if quarters]
        if len(changed) == 2:
            giver, taker = sorted(changed, key=moved.__getitem__)
            nearest[giver, taker] = min(nearest.get((giver, taker), (QUARTERS + 1, other)), (moved[taker], other))
    return [other for _, other in nearest.values()]
