"""The first ChatGLM-6B: GPT-NeoX's modules under other names, with a rotation and a residual of their own.

transformers has no class for it; ours is workers/engine/modeling_chatglm6b.py.
"""

from dataclasses import replace

from secateur.catalog.architectures.gpt_neox import GPT_NEOX

CHATGLM6B = replace(
    GPT_NEOX,
    name="chatglm6b",
    model_types=("chatglm6b",),
    layers="transformer.layers",
    biased=lambda config: GPT_NEOX.biased({"attention_bias": True}),
    defaults={},
    stock_heads=lambda config: "any",
    additive=False,
    two_positions=True,
    opened=True,
)
