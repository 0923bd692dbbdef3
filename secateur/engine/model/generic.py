"""Support for Llama-like models without an adapter: their projections are found by name and then verified.

All decoder layers must be alike. A layer needs query, key, value and output projections with one of the usual names,
and a gated or plain feed-forward block. Everything else in a layer must be a norm that does not span heads or channels.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from secateur.catalog.architectures import SUPPORTED, Family, ModelShape, family_of, shape_of
from secateur.catalog.architectures.base import StockHeads
from secateur.catalog.sources import ModelSource, read_shape
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.in_float32 import InFloat32
from secateur.engine.model.per_layer import OF_LAYERS
from secateur.engine.structures import WIDTHS, Width, gated
from secateur.engine.time_limit import BUILD_SECONDS, within

QUERY, KEY, VALUE = (
    {f"{name}_proj", f"{name}_linear", f"w{name}", name, long}
    for name, long in zip("qkv", ("query", "key", "value"), strict=True)
)
OUTPUT = {"o_proj", "out_proj", "dense", "wo", "o", "c_proj", "output"}
"""Usual names of the four attention projections; a name is the last part of a module's path."""
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
"""Attributes in which attention modules keep their numbers of heads and of KV heads."""
TOKENS = 24
MOST_MODULES = 100_000
"""Largest number of modules of a model; a decoder with a thousand layers has about 20,000."""
TOLERANCE = 1e-4
"""Largest allowed difference of logits, relative to the largest logit."""


def sizes_of(source: ModelSource) -> ModelShape:
    """Return the sizes of a local model, from its family's adapter or else from its modules.

    Raises:
        PruningError: ``unsupported_architecture`` with the reason, or ``config_invalid``.
    """
    assert source.config is not None
    return read_shape(source) if family_of(source.config) else _discover(source.config)


def _discover(config: Mapping[str, Any]) -> ModelShape:
    slow = _refusal(config, f"transformers does not build it within {BUILD_SECONDS:.0f} seconds")
    try:
        plain = {key: value for key, value in config.items() if key not in OF_LAYERS}
        loaded, model = within(BUILD_SECONDS, slow, lambda: _build(plain))
    except PruningError:
        raise
    except Exception as error:  # the constructors may raise any exception
        _refuse(
            config,
            f"transformers cannot build it ({str(error).strip().splitlines()[0][:200] if str(error) else error!r})",
        )
    name, layers = _layers(model, config)
    first = layers[0]
    linears = {path: module for path, module in first.named_modules() if isinstance(module, nn.Linear)}
    attention = [_named(linears, names, config) for names in (QUERY, KEY, VALUE)]
    owner = attention[0].rpartition(".")[0]
    inside = {path: linear for path, linear in linears.items() if path.rpartition(".")[0] == owner}
    output = _named(inside, OUTPUT, config)
    others = {path: linear for path, linear in linears.items() if path not in {*attention, output}}
    hidden, width = config["hidden_size"], config["intermediate_size"]
    inputs = [path for path, linear in others.items() if (linear.in_features, linear.out_features) == (hidden, width)]
    outputs = [path for path, linear in others.items() if (linear.in_features, linear.out_features) == (width, hidden)]
    if len(others) > len(inputs) + len(outputs) or len(inputs) not in (1, 2) or len(outputs) != 1:
        _refuse(config, f"its layers are neither gated nor plain: {', '.join(others) or 'no feed-forward part'}")
    head_dim = config.get("head_dim") or getattr(loaded, "head_dim", None) or hidden // config["num_attention_heads"]
    _check_rest(first, linears, {hidden, head_dim}, config)
    module = first.get_submodule(owner)
    sizes = {f"{owner}.{attribute}": "heads" for attribute in HEADS if hasattr(module, attribute)}
    sizes |= {f"{owner}.{attribute}": "kv_groups" for attribute in KV_HEADS if hasattr(module, attribute)}
    stock_heads: StockHeads = (
        "divisors" if _takes_head_dim(plain, f"{name}.0.{attention[0]}", head_dim) else "unchanged"
    )
    family = Family(
        name="generic",
        model_types=(config["model_type"],),
        layers=name,
        query=attention[0],
        key=attention[1],
        value=attention[2],
        attention_output=output,
        channel_inputs=tuple(inputs),
        channel_output=outputs[0],
        norm_parameters=lambda config: 0,
        biased=lambda config: frozenset(path for path, linear in linears.items() if linear.bias is not None),
        sizes=sizes,
        stock_heads=lambda config: stock_heads,
    )
    # Keys that are missing in config.json have the defaults of the config's class.
    whole = {
        **loaded.to_dict(),
        **plain,
        "head_dim": head_dim,
        "tie_word_embeddings": loaded.tie_word_embeddings,
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    other = total - shape_of(family, whole).prunable_parameters
    return replace(shape_of(family, {**whole, **config, "head_dim": head_dim}), other_parameters=other)


def _build(config: Mapping[str, Any]) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """Build a model without weights.

    Raises:
        PruningError: ``unsupported_architecture`` when it has more than :data:`MOST_MODULES` modules.
    """
    thread, count = threading.get_ident(), 0

    def counted(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > MOST_MODULES:
            _refuse(config, f"it has more than {MOST_MODULES:,} modules")

    loaded = AutoConfig.for_model(**config)
    hook = register_module_module_registration_hook(counted)
    try:
        with torch.device("meta"):
            return loaded, AutoModelForCausalLM.from_config(loaded)
    finally:
        hook.remove()


def _takes_head_dim(config: Mapping[str, Any], query: str, head_dim: int) -> bool:
    """Return whether the model's class takes the size of a head from the config's ``head_dim``.

    A class that does not divides the hidden size by the number of heads, so that fewer heads would be larger ones.
    """
    try:
        _, model = _build({**config, "head_dim": 2 * head_dim})
    except Exception:  # constructors of models pass on any exception
        return False
    projection = model.get_submodule(query)
    return isinstance(projection, nn.Linear) and projection.out_features == 2 * head_dim * config["num_attention_heads"]


def _layers(model: PreTrainedModel, config: Mapping[str, Any]) -> tuple[str, nn.ModuleList]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config["num_hidden_layers"]
    }
    if len(lists) != 1:
        _refuse(config, "its decoder layers cannot be told apart from its other modules")
    ((name, layers),) = lists.items()
    kinds = [{path: tuple(tensor.shape) for path, tensor in layer.named_parameters()} for layer in layers]
    if any(kind != kinds[0] for kind in kinds):
        _refuse(config, "its layers are not all alike")
    return name, layers


def _named(linears: Mapping[str, nn.Linear], names: set[str], config: Mapping[str, Any]) -> str:
    found = [path for path in linears if path.rpartition(".")[2] in names]
    if len(found) != 1:
        _refuse(
            config, f"{'none' if not found else 'several'} of its projections is named like {', '.join(sorted(names))}"
        )
    return found[0]


def _check_rest(layer: nn.Module, linears: Mapping[str, nn.Linear], sizes: set[int], config: Mapping[str, Any]) -> None:
    """Check that all other parameters of the layer are vectors over hidden states or over one head.

    Pruning leaves such vectors whole.

    Raises:
        PruningError: ``unsupported_architecture`` when a parameter has another shape.
    """
    for path, parameter in layer.named_parameters():
        if path.rpartition(".")[0] not in linears and (parameter.dim() > 1 or parameter.numel() not in sizes):
            _refuse(config, f"its layers have a tensor {path} of shape {list(parameter.shape)}")


def _refuse(config: Mapping[str, Any], reason: str) -> NoReturn:
    raise _refusal(config, reason)


def _refusal(config: Mapping[str, Any], reason: str) -> PruningError:
    return PruningError(
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        f"Models of type {config.get('model_type')!r} have no adapter, and this one is not built like Llama: {reason}. "
        f"With an adapter: {SUPPORTED}.",
        field="model_id",
    )


@torch.no_grad()
def verify(decoder: Decoder) -> None:
    """Verify a model without an adapter, whose projections were found by name.

    In the first, a middle and the last layer, cutting units must give the same output as setting them to zero. The
    logits must be computed from the output of the last layer. All is computed in float32.

    Raises:
        PruningError: ``unsupported_architecture``.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(decoder.shape.vocab_size, (2, TOKENS), generator=generator).to(decoder.device)
    config = {"model_type": decoder.shape.model_type}
    try:
        with InFloat32():
            captured = decoder.capture(tokens)
            whole = decoder.model(tokens, use_cache=False).logits
            if not _close(decoder.resume(captured, 0, captured.inputs[0]), whole):
                _refuse(config, "its logits are not made of what leaves its last layer")
            for index in sorted({0, len(decoder.layers) // 2, len(decoder.layers) - 1}):
                for structure in WIDTHS.values():
                    if not _cuts_as_it_shields(decoder, tokens, index, structure):
                        _refuse(
                            config,
                            f"cutting {structure.name} of layer {index} does not give the same output as setting them "
                            "to zero",
                        )
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
    ) as error:  # a forward after a wrong cut may raise any of these
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _refuse(config, f"it does not run when it is cut ({str(error).strip().splitlines()[0][:200]})")


def _cuts_as_it_shields(decoder: Decoder, tokens: Tensor, index: int, structure: Width) -> bool:
    layer = decoder.layers[index]
    units = structure.units(layer)
    if units < 2:
        return True
    kept = tuple(range(1, units, 2))
    gate = torch.zeros(1, units, device=decoder.device)
    gate[:, list(kept)] = 1
    with gated(layer, {structure.name: gate}):
        shielded = decoder.model(tokens, use_cache=False).logits
    whole = [(linear, linear.weight, linear.bias) for linear in (*structure.inputs(layer), structure.output(layer))]
    try:
        structure.cut(layer, kept)
        return _close(decoder.model(tokens, use_cache=False).logits, shielded)
    finally:
        for linear, weight, bias in whole:
            linear.weight, linear.bias = weight, bias
            linear.out_features, linear.in_features = weight.shape
        layer.tell_sizes()


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())
