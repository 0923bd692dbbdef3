"""How many units of the structures that are removed whole a ratio asks for, from the sizes of a model alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.catalog.architectures import ModelShape
from secateur.catalog.structures import DEPTH, STRUCTURES, WHOLE, WIDTHS
from secateur.contract.errors import ErrorCode, PruningError


def obstacle(shape: ModelShape, config: Mapping[str, Any], name: str) -> str | None:
    """Return the reason why no unit of the structure ``name`` can leave a model with this ``config.json``, or ``None``."""
    if name not in shape.family.structures or not any(map(STRUCTURES[name].units, shape.layers)):
        return f"This model has no '{name}'"
    if name in WHOLE and _most(shape, name) < 1:
        return f"This model has too few '{name}': one of them stays"
    if reason := STRUCTURES[name].obstacle(config):
        return f"No '{name}' of this model can be removed: {reason}"
    return None


def whole_units(
    shape: ModelShape, config: Mapping[str, Any], structures: Sequence[str], shares: Mapping[str, float], ratio: float
) -> dict[str, int]:
    """Return the number of units of each structure in ``structures`` that is removed whole; of experts, in each layer.

    A structure gives its share of the prunable parameters, or ``ratio`` if it has no share, as near as whole units come
    to it.

    Raises:
        PruningError: ``structure_unsupported`` if no unit of the structure can leave the model; ``ratio_unreachable`` if
            the share is less than half a unit, or more than the model can lose. The messages name what is allowed.
    """
    counts = {}
    for name in (name for name in structures if name in WHOLE):
        if reason := obstacle(shape, config, name):
            allowed = ", ".join(each for each in STRUCTURES if obstacle(shape, config, each) is None)
            raise PruningError(ErrorCode.STRUCTURE_UNSUPPORTED, f"{reason}; allowed: {allowed}.", field="structures")
        prices = [shape.price(name, index) for index in range(len(shape.layers)) if shape.units(name, index)]
        share = shares.get(name, ratio)
        unit = sum(prices) / (1 if name == "experts" else len(prices))
        most = _most(shape, name)
        count = round(share * shape.prunable_parameters / unit)
        if not 1 <= count <= most:
            nearest = min(max(count, 1), most) * unit / shape.prunable_parameters
            raise PruningError(
                ErrorCode.RATIO_UNREACHABLE,
                f"Of '{name}' a share of {share:g} cannot be removed: from 1 to {most} units can, and the nearest share is "
                f"{nearest:.6f}.",
                field=f"shares.{name}" if name in shares else "target_ratio",
            )
        counts[name] = count
    of_depth = sum(counts.get(name, 0) for name in DEPTH)
    if of_depth >= len(shape.layers):
        raise PruningError(
            ErrorCode.RATIO_UNREACHABLE,
            f"A layer loses at most one of {', '.join(DEPTH)}, and one of the {len(shape.layers)} layers stays whole; "
            f"{of_depth} units were requested.",
            field="shares",
        )
    return counts


def without_whole(shape: ModelShape, removed: Mapping[str, int]) -> ModelShape:
    """Return the sizes of a model without ``removed`` units, see :func:`whole_units`; the last layers lose theirs.

    Which layers lose a unit is decided later; the sizes serve to check a ratio before that.
    """
    layers = list(shape.layers)
    end = len(layers)
    for name in DEPTH:
        for index in range(end - removed.get(name, 0), end):
            layers[index] = STRUCTURES[name].left(layers[index], 0)
        end -= removed.get(name, 0)
    experts = removed.get("experts", 0)
    return replace(shape, layers=tuple(replace(layer, experts=layer.experts - experts) for layer in layers))


def largest_ratio(shape: ModelShape, name: str) -> float:
    """Return the largest ratio that the structure ``name`` reaches alone, with the default multiple of widths."""
    multiple, every = shape.width_multiple(None), range(len(shape.layers))
    amounts = [shape.removable(name, index, multiple) * shape.price(name, index) for index in every]
    if name in DEPTH:  # one layer keeps the unit
        amounts.remove(max(amounts))
    if name == "experts":  # every layer loses the same number
        amounts = [_most(shape, name) * shape.price(name, index) for index in every if shape.units(name, index)]
    return sum(amounts) / shape.prunable_parameters


def block(shape: ModelShape, structures: Sequence[str], width_multiple: int, uniform: bool) -> float:
    """Return the largest number of parameters by which whole units of ``structures`` may miss a ratio."""
    if any(name in WIDTHS for name in structures):
        return shape.block(width_multiple, uniform)
    together = [sum if name == "experts" else max for name in structures]
    prices = [[shape.price(name, index) for index in range(len(shape.layers))] for name in structures]
    return float(max(of_all(own) for of_all, own in zip(together, prices, strict=True)))


def _most(shape: ModelShape, name: str) -> int:
    """Return the largest number of units that can be removed; of experts, in each layer."""
    most = [shape.removable(name, index, 1) for index in range(len(shape.layers)) if shape.units(name, index)]
    return min(most) if name == "experts" else sum(most) - 1
