"""Qwen3's mixture of experts: Qwen3's attention and gated experts; a router picks some experts for each token."""

from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import Family, read_size
from secateur.catalog.architectures.llama import KEY, LLAMA, OUTPUT, QUERY, VALUE
from secateur.catalog.architectures.mixtral import DOWN, GATE, UP


def _is_dense(config: Mapping[str, Any], index: int) -> bool:
    step = read_size(config, "decoder_sparse_step", 1)
    return index in (config.get("mlp_only_layers") or ()) or (index + 1) % step != 0


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
    dense=LLAMA,
    is_dense=_is_dense,
    defaults={"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    names={"intermediate_size": "moe_intermediate_size"},
)
