"""How many units of the structures that are removed whole a ratio asks for, from the sizes of a model alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.catalog.architectures import ModelShape
from secateur.catalog.structures import DEPTH, EQUAL, STRUCTURES, WHOLE, WIDTHS, LayerShape
from secateur.contract.errors import ErrorCode, PruningError

QUARTERS = 4
"""Structures that compete are tried with so many equal parts of the ratio."""


def obstacle(shape: ModelShape, config: Mapping[str, Any], name: str) -> str | None:
    """Return the reason why no unit of the structure ``name`` can leave a model with this ``config.json``, or ``None``."""
    if name not in shape.family.structures or not any(map(STRUCTURES[name].units, shape.layers)):
        return f"This model has no '{name}'"
    every = range(len(shape.layers))
    most = (
        _most(shape, name) if name in WHOLE else sum(shape.cutting([name]).removable(name, index, 1) for index in every)
    )
    if most < 1:
        return f"This model has too few '{name}': one of them stays"
    if reason := STRUCTURES[name].obstacle(config):
        return f"No '{name}' of this model can be removed: {reason}"
    return None


def whole_units(
    shape: ModelShape,
    config: Mapping[str, Any],
    structures: Sequence[str],
    shares: Mapping[str, float],
    ratio: float,
    field: str = "target_ratio",
) -> dict[str, int]:
    """Return the number of units of each structure in ``structures`` that is removed whole; of experts, in each layer.

    A structure gives its share of the prunable parameters, or ``ratio`` if it has no share, as near as whole units come
    to it.

    Raises:
        PruningError: ``structure_unsupported`` if no unit of the structure can leave the model; ``ratio_unreachable`` if
            the share is less than half a unit, or more than the model can lose. The messages name what is allowed.
    """
    counts = {}
    check_structures(shape, config, structures)
    for name in (name for name in structures if name in WHOLE):
        share, unit, most = shares.get(name, ratio), _unit(shape, name), _most(shape, name)
        count = round(share / unit)
        if not 1 <= count <= most:
            nearest = min(max(count, 1), most) * unit
            raise PruningError(
                ErrorCode.RATIO_UNREACHABLE,
                f"Of '{name}' a share of {share:g} cannot be removed: from 1 to {most} units can, and the nearest share is "
                f"{nearest:.6f}.",
                field=f"shares.{name}" if name in shares else field,
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


def check_structures(shape: ModelShape, config: Mapping[str, Any], structures: Sequence[str]) -> None:
    """Check that units of each of ``structures`` can leave a model with this ``config.json``.

    Raises:
        PruningError: ``structure_unsupported``.
    """
    for name in structures:
        if name in WIDTHS and len(shape.widths) > 1:  # the other one may give what this one cannot
            continue
        if reason := obstacle(shape, config, name):
            allowed = ", ".join(each for each in STRUCTURES if obstacle(shape, config, each) is None)
            raise PruningError(ErrorCode.STRUCTURE_UNSUPPORTED, f"{reason}; allowed: {allowed}.", field="structures")


def splits(
    shape: ModelShape,
    config: Mapping[str, Any],
    structures: Sequence[str],
    ratio: float,
    multiple: int,
    uniform: bool,
    field: str = "target_ratio",
) -> dict[tuple[int, ...], Mapping[str, int]]:
    """Return the splits of ``ratio`` among competing structures, each with its :func:`whole_units`.

    A split is the number of quarters of the ratio that each whole structure in ``structures`` gives, in their order, and
    the quarters of the widths, if the widths are among them. A split is left out where whole units do not come near it.

    Raises:
        PruningError: ``structure_unsupported``; ``ratio_unreachable``, for ``field``, if no split can be reached.
    """
    check_structures(shape, config, structures)
    names = [name for name in structures if name in WHOLE]
    widths = len(names) < len(structures)
    found: dict[tuple[int, ...], Mapping[str, int]] = {}
    refused = None
    for parts in _compositions(QUARTERS, len(names) + widths):
        shares = {name: ratio * part / QUARTERS for name, part in zip(names, parts, strict=False) if part}
        if widths and not parts[-1]:  # whole units stay below the ratio, and the widths make up the rest
            rest = shape.block(multiple, uniform) / shape.prunable_parameters
            shares = {name: share - _unit(shape, name) / 2 - rest for name, share in shares.items()}
        try:
            counts = whole_units(shape, config, list(shares), shares, ratio)
            check_split(shape, counts, structures, ratio, multiple, uniform, field)
        except PruningError as error:
            if error.code != ErrorCode.RATIO_UNREACHABLE:
                raise
            refused = refused or error
        else:
            if counts not in found.values():
                found[parts] = counts
    if not found:
        assert refused is not None
        raise PruningError(refused.code, refused.message, field=field)
    return found


def check_split(
    shape: ModelShape,
    removed: Mapping[str, int],
    structures: Sequence[str],
    ratio: float,
    multiple: int,
    uniform: bool,
    field: str = "target_ratio",
) -> None:
    """Check that the model is near ``ratio`` after ``removed`` whole units left, and widths if ``structures`` has them.

    Raises:
        PruningError: ``ratio_unreachable``, for ``field``.
    """
    left, whole = without_whole(shape, removed), shape.prunable_parameters
    missing = ratio * whole - whole + left.prunable_parameters + left.standing_in(shape)
    if any(name in WIDTHS for name in structures):
        left.check_ratio(missing / left.prunable_parameters, multiple, uniform, field=field)
    elif len(removed) > 1 and abs(missing) > block(shape, structures, multiple, uniform) / 2:
        raise PruningError(
            ErrorCode.RATIO_UNREACHABLE,
            f"Whole units of {', '.join(removed)} do not come near the ratio {ratio:g}: the nearest is "
            f"{ratio - missing / whole:.6f}.",
            field=field,
        )


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
    for equal in EQUAL:
        layers = [_left(equal, layer, removed.get(equal, 0)) for layer in layers]
    return replace(shape, layers=tuple(layers))


def largest_ratio(shape: ModelShape, name: str) -> float:
    """Return the largest ratio that the structure ``name`` reaches alone, with the default multiple of widths."""
    multiple, every = shape.width_multiple(None), range(len(shape.layers))
    amounts = [shape.removable(name, index, multiple) * shape.price(name, index) for index in every]
    if name in DEPTH:  # one layer keeps the unit
        amounts.remove(max(amounts))
    if name in EQUAL:
        amounts = [_most(shape, name) * shape.price(name, index) for index in every if shape.units(name, index)]
    return sum(amounts) / shape.prunable_parameters


def block(shape: ModelShape, structures: Sequence[str], width_multiple: int, uniform: bool) -> float:
    """Return the largest number of parameters by which whole units of ``structures`` may miss a ratio."""
    if any(name in WIDTHS for name in structures):
        return shape.block(width_multiple, uniform)
    together = [sum if name in EQUAL else max for name in structures]
    prices = [[shape.price(name, index) for index in range(len(shape.layers))] for name in structures]
    return float(max(of_all(own) for of_all, own in zip(together, prices, strict=True)))


def _most(shape: ModelShape, name: str) -> int:
    """Return the largest number of units that can be removed; of experts, in each layer."""
    most = [shape.removable(name, index, 1) for index in range(len(shape.layers)) if shape.units(name, index)]
    return min(most) if name in EQUAL else sum(most) - 1


def _left(name: str, layer: LayerShape, gone: int) -> LayerShape:
    structure = STRUCTURES[name]
    units = structure.units(layer)
    return structure.left(layer, units - gone) if units and gone else layer


def _unit(shape: ModelShape, name: str) -> float:
    """Return the mean share of the prunable parameters that one unit is; of experts, one unit of every layer."""
    prices = [shape.price(name, index) for index in range(len(shape.layers)) if shape.units(name, index)]
    return sum(prices) / (1 if name in EQUAL else len(prices)) / shape.prunable_parameters


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write ``total`` as an ordered sum of ``parts`` numbers from 0 on; the last is largest first."""
    if parts == 1:
        yield (total,)
        return
    for last in range(total, -1, -1):
        for rest in _compositions(total - last, parts - 1):
            yield (*rest, last)
