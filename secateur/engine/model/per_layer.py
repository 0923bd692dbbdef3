"""Models whose layers have widths of their own: their modeling file, and the class that loads them without it.

transformers has no class for such a model. A published model carries a small modeling file, which this module writes; a
source of this kind is loaded with the same text, written anew, and never with the file that it carries.
"""

import importlib.util
import inspect
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from secateur.catalog.architectures import ModelShape, per_layer_keys
from secateur.engine.model.modeling_chatglm6b import ChatGLM6BConfig, ChatGLM6BForCausalLM, ChatGLM6BModel

TEMPLATE = Path(__file__).with_name("modeling_pruned.py.tmpl")
OF_LAYERS = ("per_layer_config", "added_biases", "allow_global_per_layer_attribute_access")
"""The config's keys that only models have whose layers have widths of their own."""


def own_class(causal: type[PreTrainedModel]) -> Path | None:
    """Return the file of a model's class if the class is ours, else ``None``; transformers has all other classes."""
    return Path(inspect.getfile(causal)) if causal.__module__.startswith("secateur.") else None


def modeling_file(shape: ModelShape, classes: dict[str, type[Any]], module: str) -> str:
    """Return the template filled with its base classes, and with the sizes that follow from a layer's widths.

    ``classes`` are the stock classes by ``config``, ``base`` and ``causal``, which ``module`` provides. A size is a sum
    of widths; it is written as the factor of each width: ``{"num_attention_heads": 64}``.
    """
    family, head_dim, own = shape.family, shape.stock_layer.head_dim, own_class(classes["causal"])
    keys = per_layer_keys(family)
    heads, kv_heads, channels = keys["heads"], keys["kv_groups"], keys["channels_per_expert"]
    outputs = {family.query: (heads, head_dim), family.key: (kv_heads, head_dim), family.value: (kv_heads, head_dim)}
    plain = family.dense or family  # a layer without experts has its channels in linear projections
    outputs |= dict.fromkeys(plain.channel_inputs, (channels, 1))
    inputs = {family.attention_output: (heads, head_dim), plain.channel_output: (channels, 1)}
    linears: dict[str, tuple[Counter[str], Counter[str]]] = {}
    attention = (*family.attention_inputs, family.attention_output)
    for projection in attention if plain.experts else plain.projections:
        sums_of = linears.setdefault(family.module(projection), (Counter(), Counter()))
        for sums, sizes in zip(sums_of, (outputs, inputs), strict=True):
            if projection in sizes:
                width, times = sizes[projection]
                sums[width] += times
    held = {"kv_groups": {kv_heads: 1}, "heads": {heads: 1}, "attention_width": {heads: head_dim}}
    prefix, _, layers = family.layers.partition(".")
    return TEMPLATE.read_text().format(
        **{kind: stock.__name__ for kind, stock in classes.items()},
        module=module,
        whose="are the stock ones" if own is None else f"are those of {own.name}",
        prefix=prefix,
        sdpa=classes["causal"]._supports_sdpa,
        linears=json.dumps(linears, indent=4),
        sizes=json.dumps({name: held[size] for name, size in family.sizes.items()}),
        keys=json.dumps([*dict.fromkeys((heads, kv_heads, channels))]),
        layers=layers,
    )


def pruned_class(shape: ModelShape) -> type[PreTrainedModel]:
    """Return the class that loads a model whose layers have widths of their own, made from the stock classes."""
    classes: dict[str, type[Any]]
    if shape.model_type == ChatGLM6BConfig.model_type:
        classes = {"config": ChatGLM6BConfig, "base": ChatGLM6BModel, "causal": ChatGLM6BForCausalLM}
    else:
        config = type(AutoConfig.for_model(shape.model_type))
        base, causal = (auto._model_mapping[config] for auto in (AutoModel, AutoModelForCausalLM))
        classes = {"config": config, "base": base, "causal": causal}
    stock = classes["causal"]
    module = "transformers" if own_class(stock) is None else stock.__module__
    name = f"secateur_pruned_{shape.model_type}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.py")
        file.write_text(modeling_file(shape, classes, module))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    pruned: type[PreTrainedModel] = getattr(made, f"Pruned{stock.__name__}")
    return pruned


def as_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a loaded model of a :func:`pruned_class` into one of its stock class, in place.

    Its modules keep their widths, as those of a model that was pruned in memory do.
    """
    pruned = model.config
    plain = {key: value for key, value in pruned.to_dict().items() if key not in OF_LAYERS}
    stock = ChatGLM6BConfig(**plain) if isinstance(model, ChatGLM6BForCausalLM) else AutoConfig.for_model(**plain)
    stock._attn_implementation = pruned._attn_implementation
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = stock
    model.__class__ = next(each for each in type(model).__mro__ if each.__module__ != type(model).__module__)
    return model
