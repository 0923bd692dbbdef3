"""A mixture of experts as three linear projections, scored and recovered like a gated feed-forward block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """A module of experts as the linear maps ``gate``, ``up`` and ``down``, in which all experts stand side by side.

    The output of the experts for a token, Σ_e r_e·W_e·a_e, is linear in the concatenated inputs r_e·a_e. These inputs
    are zero for the experts to which the router does not send the token. The state dict is that of the stock module.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the projections from the stock ``module``.

        ``module`` has ``gate_up_proj`` ``[experts, 2 * channels, hidden]``, ``down_proj`` ``[experts, hidden,
        channels]`` and ``act_fn``.
        """
        super().__init__()
        gate_up, down = module.gate_up_proj, module.down_proj
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        self.count = len(gate_up)
        self.act_fn: Any = module.act_fn  # a module, or a function in some classes
        gate, up = (half.flatten(0, 1) for half in gate_up.detach().chunk(2, dim=1))
        self.gate, self.up = _linear(gate, gate_up.requires_grad), _linear(up, gate_up.requires_grad)
        self.down = _linear(down.detach().transpose(0, 1).flatten(1), down.requires_grad)
        self.routed = False
        """Whether each expert runs only on the tokens that the router sends to it. The projections are then not
        called as modules, so hooks on the projections do not run, and nothing that hooks or wrapping modules add
        takes effect."""
        self.watch: Callable[[int, Tensor, Tensor], None] | None = None
        """A function that is called for each expert that runs while ``routed``, or ``None``. The arguments are the
        expert, the weights ``[tokens]`` of the tokens that are sent to the expert, and the expert's outputs ``[tokens,
        hidden]`` for these tokens before the weights multiply the outputs."""

    def forward(self, hidden: Tensor, sent_to: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs ``[tokens, hidden]``.

        ``hidden`` is ``[tokens, hidden]``; ``sent_to`` ``[tokens, k]`` holds the experts to which each token is sent,
        and ``weights`` ``[tokens, k]`` their weights.
        """
        if self.routed:
            return self._on_own_tokens(hidden, sent_to, weights)
        routing = hidden.new_zeros(len(hidden), self.count).scatter(1, sent_to, weights.to(hidden.dtype))
        activations = self.act_fn(self.gate(hidden)) * self.up(hidden)
        given: Tensor = self.down((activations.unflatten(1, (self.count, -1)) * routing[..., None]).flatten(1))
        return given

    def _on_own_tokens(self, hidden: Tensor, sent_to: Tensor, weights: Tensor) -> Tensor:
        given = torch.zeros_like(hidden)
        gate, up, down = self.stacked()
        for expert in sent_to.unique().tolist():
            tokens, place = torch.where(sent_to == expert)
            own = hidden[tokens]
            activations = self.act_fn(own @ gate[expert].T) * (own @ up[expert].T)
            outputs, own_weights = activations @ down[expert].T, weights[tokens, place]
            if self.watch is not None:
                self.watch(expert, own_weights, outputs)
            given.index_add_(0, tokens, (outputs * own_weights[:, None]).to(given.dtype))
        return given

    def keep(self, kept: Tensor) -> None:
        """Cut the module in place to the experts ``kept``, a tensor of ascending indices on the module's device."""
        for linear, dim in ((self.gate, 0), (self.up, 0), (self.down, 1)):
            by_expert = linear.weight.detach().unflatten(dim, (self.count, -1))
            weight = by_expert.index_select(dim, kept).flatten(dim, dim + 1)
            linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        self.count = len(kept)
        self.gate.out_features = self.up.out_features = self.down.in_features = self.down.weight.shape[1]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the state dict of the stock module that this module replaces; arguments as in ``nn.Module``."""
        found = {} if destination is None else destination
        gate, up, down = (weight if keep_vars else weight.detach() for weight in self.stacked())
        found[f"{prefix}gate_up_proj"] = torch.cat([gate, up], 1)
        found[f"{prefix}down_proj"] = down.contiguous()
        return found

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return gate and up ``[experts, channels, hidden]``, and down ``[experts, hidden, channels]``."""
        gate, up = (linear.weight.unflatten(0, (self.count, -1)) for linear in (self.gate, self.up))
        return gate, up, self.down.weight.unflatten(1, (self.count, -1)).transpose(0, 1)


def _linear(weight: Tensor, requires_grad: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=requires_grad)
    return linear
