"""The pruned models that llama.cpp can run, and the llama.cpp architecture that runs each of them.

The rules follow llama.cpp's loaders (``src/models/*.cpp``). Most loaders require one width for all layers, some require
that all heads together are as wide as the hidden size, and each loader has its own rotary scalings and biases.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from secateur.catalog.architectures import ModelShape
from secateur.contract.errors import ErrorCode, PruningError

GgufKind = Literal["F32", "F16", "Q8_0", "Q4_K_M"]
GGUF_KINDS: tuple[GgufKind, ...] = get_args(GgufKind)
BLOCKS: dict[GgufKind, int] = {"F32": 1, "F16": 1, "Q8_0": 32, "Q4_K_M": 256}
"""The number of weights of a row that each kind of GGUF file quantises together."""


@dataclass(frozen=True)
class Runtime:
    """The way in which llama.cpp runs a family of models.

    ``uniform`` is the llama.cpp architecture for layers of one width. ``differing`` is the architecture for layers that
    differ in width; it is ``None`` if llama.cpp has none.
    """

    uniform: str
    differing: str | None
    added_biases: bool
    """Whether attention and feed-forward may have biases that the source does not have."""
    ropes: frozenset[str]
    activation: str


_LLAMA = Runtime("llama", "deci", True, frozenset({"default", "llama3", "linear"}), "silu")
_GEMMA_ACTIVATION = "gelu_pytorch_tanh"

RUNTIMES: dict[str, Runtime] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3"), _LLAMA),
    "qwen3": Runtime("qwen3", "openelm", False, frozenset({"default"}), "silu"),
    "mixtral": Runtime("llama", None, False, _LLAMA.ropes, "silu"),
    "qwen3_moe": Runtime("qwen3moe", None, False, frozenset({"default"}), "silu"),
    "gemma2": Runtime("gemma2", None, False, frozenset({"default"}), _GEMMA_ACTIVATION),
    "gemma3_text": Runtime("gemma3", None, False, frozenset({"default", "linear"}), _GEMMA_ACTIVATION),
}
"""The runtime of each ``model_type``.

Mistral, Qwen2 and Phi-3 compute the same function as Llama once their weights have Llama's names; their own llama.cpp
architectures do not support fewer heads.
"""
_FIXED_HEADS = "llama.cpp takes its heads only where together they are as wide as the hidden size"
LACKING = {
    "gpt2": _FIXED_HEADS,
    "gpt_neox": _FIXED_HEADS,
    "opt": "llama.cpp has no such architecture",
    "chatglm6b": "llama.cpp has no such architecture",
}
"""The reason why :data:`RUNTIMES` lacks a ``model_type``, where llama.cpp itself cannot run the model."""


def gguf_obstacle(
    shape: ModelShape,
    config: Mapping[str, Any],
    kind: GgufKind,
    *,
    uniform: bool,
    added_biases: bool = False,
    width_multiple: int | None = None,
) -> PruningError | None:
    """Return the reason why a pruned model of this config cannot be written as GGUF, or ``None`` if it can be.

    ``uniform`` says whether every layer will have the same widths. ``added_biases`` says whether the recovery adds
    biases where the source has none. ``width_multiple`` is the request's ``allocation.width_multiple``; ``None`` means
    the default. No request can choose the hidden size and the heads: where a kind's block does not divide such rows,
    llama.cpp stores the rows less tightly, and this function does not report them.
    """
    runtime = RUNTIMES.get(shape.model_type)
    if runtime is None:
        lacking = LACKING.get(shape.model_type, "this is not supported yet")
        return unsupported(f"its type is {shape.model_type}, and {lacking}; types that can: {', '.join(RUNTIMES)}")
    if shape.dense:
        return unsupported("some of its layers have experts and some have none, and llama.cpp has no such architecture")
    if not uniform and (reason := _needs_uniform(shape, runtime)):
        return unsupported(f"{reason}; layout 'uniform' or 'padded' gives them one width", "layout")
    if added_biases and not runtime.added_biases:
        return unsupported(
            f"llama.cpp has no place for the biases that this recovery adds to a {shape.model_type} model; "
            "recovery.layerwise.kind 'least-squares' or 'none' adds none",
            "recovery.layerwise.kind",
        )
    if reason := _unlike(shape, config, runtime):
        return unsupported(reason)
    block = BLOCKS[kind]
    if (multiple := shape.width_multiple(width_multiple)) % block:
        return PruningError(
            ErrorCode.GGUF_UNSUPPORTED,
            f"{kind} quantises {block} weights of a row together, and {multiple}, of which feed-forward widths are "
            f"multiples, is none of {block}; ask for allocation.width_multiple {block}.",
            field="allocation.width_multiple",
        )
    return None


def gguf_architecture(model_type: str, uniform: bool) -> str:
    """Return llama.cpp's name for the architecture of a model that :func:`gguf_obstacle` does not object to."""
    runtime = RUNTIMES[model_type]
    architecture = runtime.uniform if uniform else runtime.differing
    assert architecture is not None
    return architecture


def unsupported(reason: str, field: str = "formats") -> PruningError:
    return PruningError(ErrorCode.GGUF_UNSUPPORTED, f"This model cannot be written as GGUF: {reason}.", field=field)


def _needs_uniform(shape: ModelShape, runtime: Runtime) -> str | None:
    if runtime.differing is None:
        return f"llama.cpp runs {shape.model_type} models with layers of one width alone"
    if runtime.differing == "openelm" and not shape.tied_embeddings:
        return "llama.cpp runs Qwen3 models whose layers differ in width only where embeddings and head are tied"
    return None


def _unlike(shape: ModelShape, config: Mapping[str, Any], runtime: Runtime) -> str | None:
    """Return what this model computes that llama.cpp's architecture for its family does not compute, or ``None``."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention") or rope
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    rotary = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    activation = config.get("hidden_activation") or config.get("hidden_act") or runtime.activation
    scalar = config.get("query_pre_attn_scalar")
    if scaling not in runtime.ropes:
        return f"its rotary scaling is {scaling!r}; supported: {', '.join(sorted(runtime.ropes))}"
    if rotary != 1:
        return f"it rotates only {rotary:g} of each head (partial_rotary_factor)"
    if activation != runtime.activation:
        return f"its activation is {activation!r}, llama.cpp's {runtime.activation!r}"
    if scalar is not None and scalar != shape.stock_layer.head_dim:
        return f"its attention is scaled by {scalar} (query_pre_attn_scalar), not by the size of a head"
    if shape.model_type in ("qwen3", "qwen3_moe") and config.get("attention_bias"):
        return "its attention has biases"
    if shape.model_type == "qwen3_moe" and not config.get("norm_topk_prob"):
        return "its router's weights are not scaled to a sum of one (norm_topk_prob)"
    if shape.model_type.startswith("gemma") and (config.get("attention_bias") or not shape.tied_embeddings):
        return "it has attention biases, or a head of its own"
    return None
