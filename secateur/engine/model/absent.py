"""The stand-in for a sub-layer that was removed: it adds nothing to the hidden states."""

from typing import Any

import torch
from torch import Tensor, nn


class Absent(nn.Module):
    """A module that returns zeros in the place of ``stock``, and has no parameters.

    ``stock`` stays reachable: attributes and submodules that this module lacks are those of ``stock``. With ``pair``,
    the module returns a pair whose second part is ``None``, as attention modules do.
    """

    def __init__(self, stock: nn.Module, pair: bool) -> None:
        super().__init__()
        self._stock, self._pair = (stock,), pair  # in a tuple, the module is no submodule

    @property
    def stock(self) -> nn.Module:
        return self._stock[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_stock" not in self.__dict__:  # asked for by copy and pickle, before there is a state
                raise
            return getattr(self.__dict__["_stock"][0], name)

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor | tuple[Tensor, None]:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self._pair else nothing
