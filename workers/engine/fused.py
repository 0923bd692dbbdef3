"""One module of a stock layer as the projections that it computes side by side, so that each can be cut by itself."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Fused(nn.Module):
    """A linear module taken apart by rows: an ``nn.Linear`` for each of ``rows``, their outputs side by side again.

    In a state dict it is the one module that it was.
    """

    def __init__(self, linear: nn.Linear, rows: Mapping[str, int]) -> None:
        """``rows``: output features by name, in the module's order; together they are all it has."""
        super().__init__()
        sizes = list(rows.values())
        biases = [None] * len(sizes) if linear.bias is None else linear.bias.detach().split(sizes)
        for name, weight, bias in zip(rows, linear.weight.detach().split(sizes), biases, strict=True):
            part = nn.Linear(linear.in_features, len(weight), bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.clone(), requires_grad=linear.weight.requires_grad)
            if bias is not None:
                part.bias = nn.Parameter(bias.clone(), requires_grad=linear.weight.requires_grad)
            self.add_module(name, part)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([part(hidden) for part in self.children()], -1)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As ``nn.Module`` has it, of the module that this one stands for."""
        found = {} if destination is None else destination
        for kind in ("weight", "bias"):
            tensors = [tensor for part in self.children() if (tensor := getattr(part, kind)) is not None]
            if tensors:
                found[prefix + kind] = torch.cat(tensors if keep_vars else [tensor.detach() for tensor in tensors])
        return found
