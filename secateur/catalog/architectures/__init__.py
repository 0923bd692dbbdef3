"""The architectures that can be pruned, and the sizes of a model read from its config."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.catalog.architectures import chatglm
from secateur.catalog.architectures.base import (
    MOST_CHANNELS,
    MOST_EXPERTS,
    MOST_HEADS,
    Family,
    ModelShape,
    channel_steps,
    nearest_amount,
    read_size,
)
from secateur.catalog.architectures.chatglm6b import CHATGLM6B
from secateur.catalog.architectures.gemma import GEMMA
from secateur.catalog.architectures.glm import GLM, GLM4
from secateur.catalog.architectures.gpt2 import GPT2
from secateur.catalog.architectures.gpt_neox import GPT_NEOX
from secateur.catalog.architectures.llama import LLAMA
from secateur.catalog.architectures.mixtral import MIXTRAL
from secateur.catalog.architectures.opt import OPT
from secateur.catalog.architectures.phi3 import PHI3
from secateur.catalog.architectures.qwen3_moe import QWEN3_MOE
from secateur.catalog.structures import LayerCost, LayerShape
from secateur.catalog.untrusted import LARGEST_NUMBER, MOST_LAYERS, check_values, shown
from secateur.contract.errors import ErrorCode, PruningError

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    CHATGLM6B,
    GEMMA,
    GLM,
    GLM4,
    GPT2,
    GPT_NEOX,
    MIXTRAL,
    OPT,
    PHI3,
    QWEN3_MOE,
)

MODEL_TYPES: dict[str, Family] = {model_type: family for family in FAMILIES for model_type in family.model_types}


SUPPORTED = ", ".join(sorted({*MODEL_TYPES, chatglm.MODEL_TYPE}))
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""The keys that a config must have so that the modules with these sizes can be found."""
PER_LAYER = {
    "heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "channels_per_expert": "intermediate_size",
}
"""The sizes in which the layers of a pruned model differ, with transformers' usual keys for them."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family of the model that a ``config.json`` describes.

    ``None`` means that the model type has no adapter, and that the model may be built like Llama.

    Raises:
        PruningError: ``unsupported_architecture`` for any other model.
    """
    model_type = str(config.get("model_type"))
    family = MODEL_TYPES.get(model_type)
    if family is None and (reason := _unlike_llama(config)):
        raise PruningError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"Models of type {model_type!r} cannot be pruned: {reason}. Supported: {SUPPORTED}, and "
            "decoders built like Llama.",
            field="model_id",
        )
    return family


def _unlike_llama(config: Mapping[str, Any]) -> str | None:
    """Return why a model without an adapter is not built like Llama, as far as its config tells; else ``None``."""
    if config.get("is_encoder_decoder") or "text_config" in config:
        return "it is more than a decoder of text"
    if config.get("per_layer_config") and "added_biases" not in config:
        return "its layers differ ('per_layer_config')"
    if experts := [key for key in EXPERTS if config.get(key)]:
        return f"it is a mixture of experts ('{experts[0]}')"
    if missing := [size for size in SIZES if not isinstance(config.get(size), int)]:
        return f"its config.json has no '{missing[0]}'"
    if not any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ["ForCausalLM"]):
        return f"it is no causal language model but {config['architectures'][0]}"
    return None


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Return the sizes of the model that a ``config.json`` describes; the model's family must have an adapter.

    Raises:
        PruningError: ``unsupported_architecture``, ``weights_quantized`` or ``config_invalid``.
    """
    family = family_of(config)
    if family is None:
        raise PruningError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"Models of type {config.get('model_type')!r} have no adapter; supported: {SUPPORTED}.",
            field="model_id",
        )
    return shape_of(family, config)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a model that its config already rules out.

    For a family without an adapter, loading the model reveals any other obstacle.

    Raises:
        PruningError: ``unsupported_architecture``, ``weights_quantized`` or ``config_invalid``.
    """
    check_values(config)
    family = family_of(config)
    if family is None:
        _check_weights(config)
        _check_sizes(config)
    else:
        shape_of(family, config)


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Check the sizes of a model without an adapter, which are needed before its modules are built."""
    most = {"num_hidden_layers": MOST_LAYERS, "num_attention_heads": MOST_HEADS, "intermediate_size": MOST_CHANNELS}
    for size in SIZES:
        read_size(config, size, most=most.get(size, LARGEST_NUMBER))


def declared_parameters(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of layers and of parameters that a checked config declares.

    For a model without an adapter, the second number counts only one embedding and two feed-forward projections of each
    layer, so that no such model has fewer parameters.
    """
    family = family_of(config)
    if family is not None:
        shape = shape_of(family, config)
        return len(shape.layers), shape.parameters
    hidden, width, _, depth, vocabulary = (config[size] for size in SIZES)
    return depth, vocabulary * hidden + 2 * depth * hidden * width


def _check_weights(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        raise PruningError(
            ErrorCode.WEIGHTS_QUANTIZED,
            "This checkpoint is quantised; prune the model it was made from, then quantise the result.",
            field="model_id",
        )


def shape_of(family: Family, config: Mapping[str, Any]) -> ModelShape:
    """Return the sizes of a model of ``family`` from its config.

    Raises:
        PruningError: ``unsupported_architecture``, ``weights_quantized`` or ``config_invalid``.
    """
    _check_weights(config)
    config = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    if reason := family.refused(config):
        raise PruningError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE, f"This model cannot be pruned: {reason}.", field="model_id"
        )
    hidden, heads = (
        read_size(config, family.name_of("hidden_size")),
        read_size(config, family.name_of("num_attention_heads"), most=MOST_HEADS),
    )
    if config.get("head_dim") is None and hidden % heads:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"config.json: {heads} heads do not divide hidden_size {hidden}.",
            field="model_id",
        )
    head_dim = read_size(config, "head_dim", hidden // heads)
    groups = read_size(config, family.name_of("num_key_value_heads"), heads)
    width = read_size(
        config,
        family.name_of("intermediate_size"),
        family.default_width and family.default_width * hidden,
        most=MOST_CHANNELS,
    )
    if heads % groups:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"config.json: {heads} heads are no multiple of {groups} KV heads.",
            field="model_id",
        )
    depth = read_size(config, family.name_of("num_hidden_layers"), most=MOST_LAYERS)
    experts = next((read_size(config, key, most=MOST_EXPERTS) for key in family.experts if key in config), 1)
    stock = LayerShape(groups, heads, head_dim, width, experts)
    dense = frozenset(index for index in range(depth) if family.is_dense(config, index))
    dense_layer = None
    if family.dense is not None and dense:
        own_width = read_size(config, family.dense.name_of("intermediate_size"), most=MOST_CHANNELS)
        dense_layer = replace(stock, channels_per_expert=own_width, experts=1)
    layers = _layers(
        family, config, [dense_layer if dense_layer and index in dense else stock for index in range(depth)]
    )
    biased = family.biased(config) | added_biases(family, config)
    costs = tuple(_cost(family, layer, hidden, biased) for layer in layers)
    vocabulary, tied = read_size(config, "vocab_size"), bool(config.get("tie_word_embeddings", False))
    norms = depth * family.norm_parameters({**config, "head_dim": head_dim})
    mixtures = [layer for index, layer in enumerate(layers) if index not in dense] if family.experts else []
    return ModelShape(
        family=family,
        model_type=str(config["model_type"]),
        hidden_size=hidden,
        vocab_size=vocabulary,
        tied_embeddings=tied,
        max_positions=read_size(config, family.name_of("max_position_embeddings"), 2048),
        layers=layers,
        costs=costs,
        stock_layer=stock,
        other_parameters=vocabulary * hidden * (1 if tied else 2)
        + norms
        + sum(layer.experts * hidden for layer in mixtures)
        + family.outer_parameters(config),
        experts_per_token=read_size(config, "num_experts_per_tok", most=experts) if family.experts else 1,
        stock_heads=family.stock_heads(config),
        dense=dense,
        dense_layer=dense_layer,
    )


def per_layer_keys(family: Family) -> dict[str, str]:
    """Return the config's keys for the sizes in which layers of a pruned model differ, by their names in a shape.

    ``per_layer_config`` has these keys for each layer. Where every head has its own key and value, two names have one
    key.
    """
    return {size: family.name_of(key) for size, key in PER_LAYER.items()}


def added_biases(family: Family, config: Mapping[str, Any]) -> frozenset[str]:
    """Return the projections that got a bias when the model was pruned, which the stock class does not have."""
    modules = config.get("added_biases") or ()
    return frozenset(projection for projection in family.projections if family.module(projection) in modules)


def _layers(family: Family, config: Mapping[str, Any], stocks: Sequence[LayerShape]) -> tuple[LayerShape, ...]:
    """Return the sizes of every layer: those of ``stocks``, or those that ``per_layer_config`` gives the layer.

    Raises:
        PruningError: ``config_invalid``.
    """
    own = config.get("per_layer_config")
    if not own:
        return tuple(stocks)
    keys = per_layer_keys(family)
    if not isinstance(own, dict) or own.keys() != {str(index) for index in range(len(stocks))}:
        raise _no_layers(f"'per_layer_config' must be an object with the keys '0' to '{len(stocks) - 1}'")
    layers = []
    for index, stock in enumerate(stocks):
        sizes = own[str(index)]
        if not isinstance(sizes, dict) or sizes.keys() != {*keys.values()}:
            raise _no_layers(f"layer {index} in 'per_layer_config' must have the keys {', '.join({*keys.values()})}")
        found = {}
        for size, key in keys.items():
            value = sizes[key]
            most = getattr(stock, size)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                raise _no_layers(
                    f"'{key}' of layer {index} in 'per_layer_config' must be an integer from 0 to {most}, the size of "
                    f"the unpruned model, not {shown(value)}"
                )
            found[size] = value
        if (found["heads"] % found["kv_groups"] if found["kv_groups"] else found["heads"]) or (
            found["kv_groups"] and not found["heads"]
        ):
            raise _no_layers(
                f"{found['heads']} heads of layer {index} are no multiple of its {found['kv_groups']} KV heads"
            )
        layers.append(replace(stock, **found))
    return tuple(layers)


def _no_layers(reason: str) -> PruningError:
    return PruningError(ErrorCode.CONFIG_INVALID, f"config.json: {reason}.", field="model_id")


def _cost(family: Family, layer: LayerShape, hidden: int, biased: frozenset[str]) -> LayerCost:
    per_group = layer.heads_per_group * layer.head_dim
    rows = {family.query: per_group, family.key: layer.head_dim, family.value: layer.head_dim}
    return LayerCost(
        kv_group=sum(count * (hidden + (name in biased)) for name, count in rows.items()) + per_group * hidden,
        channel=sum(hidden + (name in biased) for name in family.channel_inputs) + hidden,
        attention_bias=hidden * (family.attention_output in biased),
        channel_bias=hidden * (family.channel_output in biased),
    )


__all__ = [
    "FAMILIES",
    "MODEL_TYPES",
    "PER_LAYER",
    "SUPPORTED",
    "Family",
    "LayerCost",
    "LayerShape",
    "ModelShape",
    "added_biases",
    "channel_steps",
    "check_config",
    "declared_parameters",
    "family_of",
    "nearest_amount",
    "per_layer_keys",
    "shape_from_config",
    "shape_of",
]
