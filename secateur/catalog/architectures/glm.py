"""GLM-4 (``glm``) and its successor (``glm4``): one module computes the gate and up projections.

``glm4`` applies a norm to the outputs of attention and feed-forward before it adds them to the hidden states.
"""

from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import Family
from secateur.catalog.architectures.llama import DOWN, KEY, OUTPUT, QUERY, VALUE

GATE_UP = "mlp.gate_up_proj"


def _biased(config: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({QUERY, KEY, VALUE} if config.get("attention_bias") else ())


def _family(name: str, norms: int, additive: bool) -> Family:
    """Return the family ``name``, whose layers have ``norms`` RMS norms each."""
    return Family(
        name=name,
        model_types=(name,),
        layers="model.layers",
        query=QUERY,
        key=KEY,
        value=VALUE,
        attention_output=OUTPUT,
        channel_inputs=(f"{GATE_UP}.gate", f"{GATE_UP}.up"),
        channel_output=DOWN,
        norm_parameters=lambda config: int(norms * config["hidden_size"]),
        biased=_biased,
        fused={GATE_UP: ("gate", "up")},
        additive=additive,
        opened=True,
        defaults={"head_dim": 128, "attention_bias": True},
    )


GLM = _family("glm", 2, True)
GLM4 = _family("glm4", 4, False)
