"""The modeling file of a dynamic checkpoint.

It is a template that is filled with the names and sizes of the model's family.
"""

import json
from pathlib import Path
from typing import Any

from secateur.catalog.architectures import ModelShape
from secateur.engine.model.decoder import Decoder

TEMPLATE = Path(__file__).with_name("modeling_dynamic.py.tmpl")
MODELING_FILE = "modeling_dynamic.py"
PRIORS = "dynamic_priors.safetensors"
DAMPING = 0.03
"""Damping of the compensation, as a share of the mean second moment. In trials, values from 0.01 to 0.1 made no
difference."""
SKETCH = 128
"""Number of rows to which a prompt's activations are summed. In trials, 64 rows gave two thirds of the gain of all 256
tokens of a prompt, and 128 rows gave more."""

Blocks = list[tuple[str, int]]
"""Structures in order, each with the number of rows or columns of the module that belong to one unit."""


def modeling_file(decoder: Decoder) -> str:
    """Return the text of the modeling file for the model's class."""
    model, shape = decoder.model, decoder.shape
    return TEMPLATE.read_text().format(
        causal=type(model).__name__,
        model_type=shape.model_type,
        priors=PRIORS,
        layers=shape.family.layers,
        modules=json.dumps(_modules(shape), indent=4),
        outputs=json.dumps(
            {
                "kv_groups": shape.family.module(shape.family.attention_output),
                "channels": shape.family.module(shape.family.channel_output),
            }
        ),
        sizes=json.dumps(_sizes(shape)),
        damping=DAMPING,
        sketch=SKETCH,
    )


def _modules(shape: ModelShape) -> dict[str, tuple[Blocks, Blocks]]:
    """Return, by module, the blocks of its outputs and the blocks of its inputs, in their order."""
    family, layer = shape.family, shape.stock_layer
    group = layer.heads_per_group * layer.head_dim
    outputs: dict[str, tuple[str, int]] = {
        family.query: ("kv_groups", group),
        family.key: ("kv_groups", layer.head_dim),
        family.value: ("kv_groups", layer.head_dim),
        **dict.fromkeys(family.channel_inputs, ("channels", 1)),
    }
    inputs = {family.attention_output: ("kv_groups", group), family.channel_output: ("channels", 1)}
    modules: dict[str, tuple[Blocks, Blocks]] = {}
    for projection in family.projections:
        name = family.module(projection)
        if name in modules:
            continue
        parts = [f"{name}.{part}" for part in family.fused[name]] if name in family.fused else [projection]
        blocks = [outputs[part] for part in parts if part in outputs]
        if name in family.interleaved:  # the module has one head's rows of all parts, then the next head's
            blocks = [("kv_groups", sum(width for _, width in blocks))]
        modules[name] = (blocks, [inputs[part] for part in parts if part in inputs])
    return modules


def _sizes(shape: ModelShape) -> dict[str, int]:
    """Return the attributes that hold a width, each with the share of the width that one KV group has."""
    layer = shape.stock_layer
    of_group: dict[str, Any] = {
        "kv_groups": 1,
        "heads": layer.heads_per_group,
        "attention_width": layer.heads_per_group * layer.head_dim,
    }
    return {name: of_group[size] for name, size in shape.family.sizes.items()}
