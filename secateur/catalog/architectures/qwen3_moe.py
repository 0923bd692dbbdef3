"""Qwen3's mixture of experts: Qwen3's attention and gated experts; a router picks some experts for each token."""

from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import Family
from secateur.catalog.architectures.llama import KEY, OUTPUT, QUERY, VALUE
from secateur.catalog.architectures.mixtral import DOWN, GATE, UP


def _refused(config: Mapping[str, Any]) -> str | None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "some of its layers have experts and some have none ('mlp_only_layers', 'decoder_sparse_step')"
    return None


QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    layers="model.layers",
    query=QUERY,
    key=KEY,
    value=VALUE,
    attention_output=OUTPUT,
    channel_inputs=(GATE, UP),
    channel_output=DOWN,
    experts=("num_local_experts", "num_experts"),
    norm_parameters=lambda config: int(2 * config["hidden_size"] + 2 * config["head_dim"]),
    biased=lambda config: frozenset({QUERY, KEY, VALUE, OUTPUT}) if config.get("attention_bias") else frozenset(),
    refused=_refused,
    defaults={"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    names={"intermediate_size": "moe_intermediate_size"},
)
