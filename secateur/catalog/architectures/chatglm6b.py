"""The first ChatGLM-6B: GPT-NeoX's modules under other names, with a different rotation and a different residual.

transformers has no class for the model; Secateur's class is in ``secateur/engine/model/modeling_chatglm6b.py``.
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
