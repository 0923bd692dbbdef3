"""OPT: separate projections with biases, a key and value for every head, a plain MLP.

LayerNorms come before attention and before feed-forward.
"""

from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import Family

QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
OFFSET = 2
"""The number from which OPT counts positions."""


def _biased(config: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({QUERY, KEY, VALUE, OUTPUT, "fc1", "fc2"} if config["enable_bias"] else ())


def _norm(config: Mapping[str, Any]) -> int:
    """Return the number of parameters of one LayerNorm."""
    return int(2 * config["hidden_size"] if config["layer_norm_elementwise_affine"] else 0)


def _outer_parameters(config: Mapping[str, Any]) -> int:
    positions = (config["max_position_embeddings"] + OFFSET) * config["hidden_size"]
    return int(positions) + (0 if config.get("_remove_final_layer_norm") else _norm(config))


def _refused(config: Mapping[str, Any]) -> str | None:
    if not config["do_layer_norm_before"]:
        return "its hidden states are normed after each part (do_layer_norm_before is false)"
    if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
        return "its embeddings are projected (word_embed_proj_dim is not hidden_size)"
    return None


OPT = Family(
    name="opt",
    model_types=("opt",),
    layers="model.decoder.layers",
    query=QUERY,
    key=KEY,
    value=VALUE,
    attention_output=OUTPUT,
    channel_inputs=("fc1",),
    channel_output="fc2",
    norm_parameters=lambda config: 2 * _norm(config),
    biased=_biased,
    outer_parameters=_outer_parameters,
    refused=_refused,
    sizes={"self_attn.num_heads": "heads"},
    defaults={
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    },
    stock_heads=lambda config: "unchanged",
    names={"num_key_value_heads": "num_attention_heads", "intermediate_size": "ffn_dim"},
)
