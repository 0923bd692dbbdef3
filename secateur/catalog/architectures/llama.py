"""Llama and related models: separate q/k/v/o projections with grouped KV heads, a gated MLP and RMS norms."""

from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import Family, StockHeads

QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))


def _biased(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the projections that have a bias.

    Llama and Qwen3 have config keys for biases; Qwen2 always has a bias on q, k and v; Mistral has none.
    """
    if config["model_type"] == "qwen2":
        return frozenset({QUERY, KEY, VALUE})
    attention = {QUERY, KEY, VALUE, OUTPUT} if config.get("attention_bias") else set()
    mlp = {GATE, UP, DOWN} if config.get("mlp_bias") and config["model_type"] == "llama" else set()
    return frozenset(attention | mlp) if config["model_type"] != "mistral" else frozenset()


def _norm_parameters(config: Mapping[str, Any]) -> int:
    """Return the number of norm parameters of a layer.

    A layer has two RMS norms; in Qwen3 also one of size ``head_dim`` for queries and one for keys.
    """
    per_head = 2 * config["head_dim"] if config["model_type"] == "qwen3" else 0
    return int(2 * config["hidden_size"] + per_head)


def _stock_heads(config: Mapping[str, Any]) -> StockHeads:
    """Return the numbers of heads that the stock class accepts.

    Llama's class requires that the number of heads divides ``hidden_size``; without biases, Mistral's class computes
    the same function for any number of heads.
    """
    return "divisors" if config["model_type"] == "llama" and _biased(config) else "any"


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    layers="model.layers",
    query=QUERY,
    key=KEY,
    value=VALUE,
    attention_output=OUTPUT,
    channel_inputs=(GATE, UP),
    channel_output=DOWN,
    norm_parameters=_norm_parameters,
    stock_heads=_stock_heads,
    twins={"llama": ("mistral", "MistralForCausalLM")},
    biased=_biased,
)
