"""GPT-2: a key and value for every head, a plain MLP, and weights that are stored input by output (``Conv1D``)."""

from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import Family

ATTENTION, PROJECTION, EXPANSION, CONTRACTION = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
STRUCTURES = {
    ATTENTION: ("query", "key", "value"),
    PROJECTION: ("output",),
    EXPANSION: ("input",),
    CONTRACTION: ("output",),
}


def _refused(config: Mapping[str, Any]) -> str | None:
    return "it has cross-attention" if config.get("add_cross_attention") else None


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    layers="transformer.h",
    query=f"{ATTENTION}.query",
    key=f"{ATTENTION}.key",
    value=f"{ATTENTION}.value",
    attention_output=f"{PROJECTION}.output",
    channel_inputs=(f"{EXPANSION}.input",),
    channel_output=f"{CONTRACTION}.output",
    norm_parameters=lambda config: int(4 * config["n_embd"]),
    biased=lambda config: frozenset(f"{module}.{part}" for module, parts in STRUCTURES.items() for part in parts),
    outer_parameters=lambda config: int((config["n_positions"] + 2) * config["n_embd"]),
    refused=_refused,
    fused=STRUCTURES,
    sizes={"attn.split_size": "attention_width"},
    defaults={"n_positions": 1024, "tie_word_embeddings": True},
    default_width=4,
    stock_heads=lambda config: "unchanged",
    names={
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    },
)
