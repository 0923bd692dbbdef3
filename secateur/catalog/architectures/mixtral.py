"""Mixtral: Mistral's attention, and several gated feed-forward networks; a router picks some of them for each token."""

from secateur.catalog.architectures.base import Family
from secateur.catalog.architectures.llama import KEY, OUTPUT, QUERY, VALUE

GATE, UP, DOWN = "mlp.experts.gate", "mlp.experts.up", "mlp.experts.down"

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    layers="model.layers",
    query=QUERY,
    key=KEY,
    value=VALUE,
    attention_output=OUTPUT,
    channel_inputs=(GATE, UP),
    channel_output=DOWN,
    experts=("num_local_experts",),
    norm_parameters=lambda config: int(2 * config["hidden_size"]),
    defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
)
