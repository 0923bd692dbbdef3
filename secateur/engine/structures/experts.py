"""Whole experts of mixtures: each is cut with its row of the router, and shared experts stay.

The router of a stock class is the child ``gate`` or ``router`` of the block that owns the experts. The tensors that go
with the experts are found by their sizes: every parameter and buffer of the router, and of the block itself, that has
one entry for each expert, such as the router's weight and its bias or ``e_score_correction_bias``. Routing among the
kept experts is as the class does it: the result equals that of the whole layer with the router's logits of the removed
experts at minus infinity.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.decoder import Decoder, Layer
from secateur.engine.structures.base import Structure

ROUTERS = ("gate", "router")
"""The names that stock classes give to the router."""
COUNTS = ("num_experts", "n_routed_experts")
"""Attributes of a stock block and of its router that hold the number of experts."""
PER_TOKEN_ATTRIBUTE = "top_k"
"""The attribute of a stock router or block that holds the number of experts to which each token is sent."""
PER_TOKEN = "num_experts_per_tok"
"""The config's key for the number of experts to which each token is sent."""


class WholeExperts(Structure):
    name = "experts"

    def units(self, layer: Layer) -> int:
        return units(layer)

    def cut(self, layer: Layer, kept: Sequence[int]) -> None:
        cut(layer, kept)

    def best(self, layer: Layer, scores: Tensor, count: int) -> tuple[int, ...]:
        """Return the experts with the highest scores, the same number of them in each group of the router."""
        return _highest(scores, count, groups(layer))

    def held(self, layer: Layer, kept: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        width = layer.shape.channels_per_expert
        return {"channels": tuple(expert * width + channel for expert in kept for channel in range(width))}


def units(layer: Layer) -> int:
    """Return the number of whole experts of ``layer``; it is 0 in a layer without a mixture of experts."""
    if layer.mixture is None or layer.family.channel_output not in layer.projections:
        return 0
    return layer.mixture.count


def groups(layer: Layer) -> int:
    """Return the number of equal groups, one after the other, in which the router holds the experts of a mixture.

    Every group must keep the same number of experts.
    """
    return int(getattr(_router(layer), "num_group", None) or 1)


def experts_per_token(layer: Layer) -> int:
    """Return the number of experts to which the router of a mixture sends each token."""
    told = (getattr(module, PER_TOKEN_ATTRIBUTE, None) for module in (_router(layer), _block(layer)))
    return next(number for number in told if isinstance(number, int))


def cut(layer: Layer, kept: Sequence[int]) -> None:
    """Cut a layer in place to the experts ``kept``; their indices are ascending.

    The number of experts to which each token is sent becomes at most the number of experts that are left to choose
    from.

    Raises:
        PruningError: ``unsupported_architecture`` if the layer has no router that can be cut.
        ValueError: If ``kept`` is empty or not ascending, or holds different numbers of experts from the groups of the
            router.
    """
    mixture, count = layer.mixture, units(layer)
    if mixture is None or len(kept) == count:
        return
    block, router, parts = _block(layer), _router(layer), groups(layer)
    by_group = {sum(expert * parts // count == part for expert in kept) for part in range(parts)}
    if not kept or list(kept) != sorted(set(kept)) or len(by_group) > 1:
        raise ValueError(f"Experts {list(kept)} of {count}: one at least must stay, ascending, as many in each group.")
    device = mixture.down.weight.device
    indices = torch.tensor(kept, device=device)
    owners = [block, *router.modules()]
    rows = [(owner, name) for owner in owners for name in _rows(owner, count)]
    if not any(owner is not block for owner, _ in rows):
        raise _unsupported(layer, "has no entry for each expert")
    for owner, name in rows:
        tensor = getattr(owner, name)
        dim = tensor.shape.index(count)
        left = tensor.detach().index_select(dim, indices.to(tensor.device))
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(owner, name, nn.Parameter(left, requires_grad=tensor.requires_grad) if is_parameter else left)
        if isinstance(owner, nn.Linear):
            owner.out_features = len(kept)
    mixture.keep(indices)
    open_to_a_token = len(kept) * int(getattr(router, "topk_group", None) or parts) // parts
    for owner in owners:
        for name in COUNTS:
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, len(kept))
        if isinstance(per_token := getattr(owner, PER_TOKEN_ATTRIBUTE, None), int):
            setattr(owner, PER_TOKEN_ATTRIBUTE, min(per_token, open_to_a_token))


def config_keys(layer: Layer) -> dict[str, int]:
    """Return the config's keys that say how many experts ``layer`` has and to how many each token is sent.

    The dictionary is empty for a layer without a mixture of experts.
    """
    if not units(layer):
        return {}
    return dict.fromkeys(layer.family.experts, units(layer)) | {
        layer.family.name_of(PER_TOKEN): experts_per_token(layer)
    }


def tell_config(decoder: Decoder) -> None:
    """Set the numbers of experts in the model's config and in the model that the config made.

    The model computes its balancing loss with these numbers. Where layers differ, the numbers are those of the layer
    with the most experts.
    """
    layer = max(decoder.layers, key=units)
    for key, value in config_keys(layer).items():
        setattr(decoder.model.config, key, value)
    if units(layer):
        for name, value in ((COUNTS[0], units(layer)), (PER_TOKEN, experts_per_token(layer))):
            if hasattr(decoder.model, name):
                setattr(decoder.model, name, value)


def _block(layer: Layer) -> nn.Module:
    """Return the module that owns the experts and their router."""
    experts = layer.family.channel_output.rpartition(".")[0]
    return layer.module.get_submodule(experts.rpartition(".")[0])


def _router(layer: Layer) -> nn.Module:
    """Return the router of the layer's experts.

    Raises:
        PruningError: ``unsupported_architecture``.
    """
    children = dict(_block(layer).named_children())
    found = next((children[name] for name in ROUTERS if name in children), None)
    if found is None:
        raise _unsupported(layer, f"has none of the names {', '.join(ROUTERS)}")
    return found


def _rows(owner: nn.Module, count: int) -> list[str]:
    """Return the names of the parameters and buffers of ``owner`` itself that have one entry for each of the experts."""
    own = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
    return [name for name, tensor in own if count in tensor.shape]


def _unsupported(layer: Layer, reason: str) -> PruningError:
    return PruningError(
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        f"The experts of {type(_block(layer)).__name__} cannot be removed: its router {reason}.",
        field="model_id",
    )


def _highest(scores: Tensor, count: int, parts: int) -> tuple[int, ...]:
    by_group = scores.unflatten(0, (parts, -1))
    first = torch.arange(parts)[:, None] * by_group.shape[1]
    chosen = by_group.sort(dim=1, descending=True, stable=True).indices[:, : count // parts] + first
    return tuple(sorted(chosen.flatten().tolist()))
