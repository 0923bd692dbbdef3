"""One module of a stock layer as the projections that it computes side by side, so that each can be cut by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Fused(nn.Module):
    """A linear module taken apart by rows: an ``nn.Linear`` for each of ``rows``, their outputs side by side again.

    In a state dict it is the one module that it was.
    """

    def __init__(self, module: nn.Linear | Conv1D, rows: Mapping[str, int], block: int | None = None) -> None:
        """``rows``: output features by name, in the module's order; together they are all it has.

        With ``block`` the parts take turns: so many rows of each, then as many more.
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
        """As ``nn.Module`` has it, of the module that this one stands for."""
        found = {} if destination is None else destination
        for kind in ("weight", "bias"):
            tensors = [tensor for part in self.children() if (tensor := getattr(part, kind)) is not None]
            if tensors:
                whole = self._join(tensors if keep_vars else [tensor.detach() for tensor in tensors], 0)
                found[prefix + kind] = whole.T.contiguous() if self._transposed and kind == "weight" else whole
        return found

    def _split(self, tensor: Tensor, sizes: list[int]) -> list[Tensor]:
        """The parts' own rows of a weight or bias."""
        if self._block is None:
            return [part.clone(memory_format=torch.contiguous_format) for part in tensor.split(sizes)]
        turns = tensor.unflatten(0, (-1, len(sizes), self._block))
        return [turns[:, index].flatten(0, 1) for index in range(len(sizes))]

    def _join(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        """The parts' rows along ``dim`` as the module has them."""
        if self._block is None:
            return torch.cat(tuple(tensors), dim)
        blocks = [tensor.unflatten(dim, (-1, self._block)) for tensor in tensors]
        return torch.stack(blocks, dim + 1).flatten(dim, dim + 2)
