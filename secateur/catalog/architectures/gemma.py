"""Gemma 2 and the text model of Gemma 3: Llama's projections; norms surround attention and feed-forward."""

from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import Family
from secateur.catalog.architectures.llama import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE


def _biased(config: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({QUERY, KEY, VALUE, OUTPUT} if config.get("attention_bias") else ())


def _norm_parameters(config: Mapping[str, Any]) -> int:
    """Return the number of norm parameters of a layer.

    A layer has four RMS norms; in Gemma 3 also one of size ``head_dim`` for queries and one for keys.
    """
    per_head = 2 * config["head_dim"] if config["model_type"] == "gemma3_text" else 0
    return int(4 * config["hidden_size"] + per_head)


GEMMA = Family(
    name="gemma",
    model_types=("gemma2", "gemma3_text"),
    layers="model.layers",
    query=QUERY,
    key=KEY,
    value=VALUE,
    attention_output=OUTPUT,
    channel_inputs=(GATE, UP),
    channel_output=DOWN,
    norm_parameters=_norm_parameters,
    stock_heads=lambda config: "divisors",
    biased=_biased,
    additive=False,
    opened=True,
    defaults={"head_dim": 256, "tie_word_embeddings": True},
)
