"""The modeling file of a dynamic checkpoint: the template, with the names and sizes of its family."""

import json
from pathlib import Path
from typing import Any

from secateur.catalog.architectures import ModelShape
from secateur.engine.model.decoder import Decoder

TEMPLATE = Path(__file__).with_name("modeling_dynamic.py.tmpl")
MODELING_FILE = "modeling_dynamic.py"
PRIORS = "dynamic_priors.safetensors"
DAMPING = 0.03
"""Of the compensation, as a share of the mean second moment: in trials between 0.01 and 0.1 made no difference."""
SKETCH = 128
"""Rows that a prompt's activations are added up to: in trials 64 gave two thirds of what all 256 tokens of a prompt gave, 128 more."""

Blocks = list[tuple[str, int]]
"""A structure, and how many rows or columns of the module each of its units has."""


def modeling_file(decoder: Decoder) -> str:
    """Its text, for the model's class."""
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
    """By module: the blocks of its outputs, in their order, and of its inputs."""
    family, layer = shape.family, shape.layers[0]
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
        if name in family.interleaved:  # one head's rows of each structure, then the next head's
            blocks = [("kv_groups", sum(width for _, width in blocks))]
        modules[name] = (blocks, [inputs[part] for part in parts if part in inputs])
    return modules


def _sizes(shape: ModelShape) -> dict[str, int]:
    """Attributes that hold a width, and how much of it each KV group makes."""
    layer = shape.layers[0]
    of_group: dict[str, Any] = {
        "kv_groups": 1,
        "heads": layer.heads_per_group,
        "attention_width": layer.heads_per_group * layer.head_dim,
    }
    return {name: of_group[size] for name, size in shape.family.sizes.items()}
