"""Phi-3 and Phi-4: one module computes query, key and value, and another computes the gate and up projections."""

from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import Family, StockHeads
from secateur.catalog.architectures.llama import DOWN, OUTPUT

QUERY_KEY_VALUE, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


def _stock_heads(config: Mapping[str, Any]) -> StockHeads:
    """Return the numbers of heads that the stock class accepts.

    If the rotations are scaled, the config's class checks the number of factors against ``hidden_size / heads``.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return "unchanged" if "short_factor" in rope else "any"


PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    layers="model.layers",
    query=f"{QUERY_KEY_VALUE}.query",
    key=f"{QUERY_KEY_VALUE}.key",
    value=f"{QUERY_KEY_VALUE}.value",
    attention_output=OUTPUT,
    channel_inputs=(f"{GATE_UP}.gate", f"{GATE_UP}.up"),
    channel_output=DOWN,
    norm_parameters=lambda config: int(2 * config["hidden_size"]),
    fused={QUERY_KEY_VALUE: ("query", "key", "value"), GATE_UP: ("gate", "up")},
    sizes={"self_attn.num_key_value_heads": "kv_groups", "self_attn.config.num_attention_heads": "heads"},
    stock_heads=_stock_heads,
)
