"""The first ChatGLM-6B: query, key and value of each head side by side in one module, a plain MLP, LayerNorms.

transformers has no class for it; ours is workers/engine/modeling_chatglm6b.py.
"""

from app.catalog.architectures.base import Family
from app.catalog.architectures.gpt_neox import CONTRACTION, DENSE, EXPANSION, PARTS, QUERY_KEY_VALUE

CHATGLM6B = Family(
    name="chatglm6b",
    model_types=("chatglm6b",),
    layers="transformer.layers",
    query=f"{QUERY_KEY_VALUE}.query",
    key=f"{QUERY_KEY_VALUE}.key",
    value=f"{QUERY_KEY_VALUE}.value",
    attention_output=DENSE,
    channel_inputs=(EXPANSION,),
    channel_output=CONTRACTION,
    norm_parameters=lambda config: int(4 * config["hidden_size"]),
    biased=lambda config: frozenset({*(f"{QUERY_KEY_VALUE}.{part}" for part in PARTS), DENSE, EXPANSION, CONTRACTION}),
    outer_parameters=lambda config: int(2 * config["hidden_size"]),
    fused={QUERY_KEY_VALUE: PARTS},
    interleaved=frozenset({QUERY_KEY_VALUE}),
    additive=False,
    opened=True,
    names={"num_key_value_heads": "num_attention_heads"},
)
