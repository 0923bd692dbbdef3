"""GPT-NeoX and Pythia: one module holds query, key and value of each head side by side; a plain MLP and LayerNorms."""

from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import Family

QUERY_KEY_VALUE, DENSE = "attention.query_key_value", "attention.dense"
EXPANSION, CONTRACTION = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
STRUCTURES = ("query", "key", "value")


def _biased(config: Mapping[str, Any]) -> frozenset[str]:
    attention = {*(f"{QUERY_KEY_VALUE}.{part}" for part in STRUCTURES), DENSE} if config["attention_bias"] else set()
    return frozenset({*attention, EXPANSION, CONTRACTION})


GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    query=f"{QUERY_KEY_VALUE}.query",
    key=f"{QUERY_KEY_VALUE}.key",
    value=f"{QUERY_KEY_VALUE}.value",
    attention_output=DENSE,
    channel_inputs=(EXPANSION,),
    channel_output=CONTRACTION,
    norm_parameters=lambda config: int(4 * config["hidden_size"]),
    biased=_biased,
    outer_parameters=lambda config: int(2 * config["hidden_size"]),
    fused={QUERY_KEY_VALUE: STRUCTURES},
    interleaved=frozenset({QUERY_KEY_VALUE}),
    defaults={"attention_bias": True},
    stock_heads=lambda config: "unchanged",
    names={"num_key_value_heads": "num_attention_heads"},
)
