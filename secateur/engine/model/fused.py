"""A module of a stock layer that computes several projections, split so that each projection can be cut alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Fused(nn.Module):
    """A linear module that is split by rows into one ``nn.Linear`` for each entry of ``rows``.

    The outputs are joined in the original order, and the state dict is that of the original module.
    """

    def __init__(self, module: nn.Linear | Conv1D, rows: Mapping[str, int], block: int | None = None) -> None:
        """Split ``module`` into parts.

        ``rows`` maps the name of each part to its number of output features, in the module's order; together the parts
        have all output features of ``module``. With ``block``, the parts alternate: ``block`` rows of each part, then
        the next ``block`` rows of each.
        """
        super().__init__()
        self._block = block
        self._transposed = isinstance(module, Conv1D)
        weight = module.weight.detach().T if self._transposed else module.weight.detach()
        weights = self._split(weight, list(rows.values()))
        biases = [None] * len(rows) if module.bias is None else self._split(module.bias.detach(), list(rows.values()))
        for name, weight, bias in zip(rows, weights, biases, strict=True):
            part = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
            if bias is not None:
                part.bias = nn.Parameter(bias, requires_grad=module.weight.requires_grad)
            self.add_module(name, part)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._join([part(hidden) for part in self.children()], hidden.dim() - 1)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the state dict of the stock module that this module replaces; arguments as in ``nn.Module``."""
        found = {} if destination is None else destination
        for kind in ("weight", "bias"):
            tensors = [tensor for part in self.children() if (tensor := getattr(part, kind)) is not None]
            if tensors:
                whole = self._join(tensors if keep_vars else [tensor.detach() for tensor in tensors], 0)
                found[prefix + kind] = whole.T.contiguous() if self._transposed and kind == "weight" else whole
        return found

    def _split(self, tensor: Tensor, sizes: list[int]) -> list[Tensor]:
        """Split a weight or bias into the rows of each part."""
        if self._block is None:
            return [part.clone(memory_format=torch.contiguous_format) for part in tensor.split(sizes)]
        turns = tensor.unflatten(0, (-1, len(sizes), self._block))
        return [turns[:, index].flatten(0, 1) for index in range(len(sizes))]

    def _join(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        """Join the rows of the parts along ``dim`` in the order of the original module."""
        if self._block is None:
            return torch.cat(tuple(tensors), dim)
        blocks = [tensor.unflatten(dim, (-1, self._block)) for tensor in tensors]
        return torch.stack(blocks, dim + 1).flatten(dim, dim + 2)
