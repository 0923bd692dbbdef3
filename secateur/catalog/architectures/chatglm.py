"""Configs of ChatGLM's own repositories, which use other names than transformers.

The first ChatGLM-6B becomes Secateur's ``chatglm6b``; ChatGLM2, ChatGLM3 and GLM-4 become transformers' ``glm``.
Source: configuration_chatglm.py and modeling_chatglm.py of zai-org/chatglm-6b and zai-org/chatglm3-6b.
"""

import math
from collections.abc import Mapping
from typing import Any

from secateur.catalog.architectures.base import read_size
from secateur.catalog.untrusted import MOST_LAYERS
from secateur.contract.errors import ErrorCode, PruningError

MODEL_TYPE = "chatglm"

ALIKE: dict[str, tuple[bool, bool]] = {
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "apply_residual_connection_post_layernorm": (False, False),
    "fp32_residual_connection": (False, False),
    "add_bias_linear": (False, False),
    "multi_query_attention": (True, False),
    "original_rope": (True, True),
    "pre_seq_len": (False, False),
}
"""Keys that ``glm`` does not have: the behaviour of ``glm``, and the behaviour of a config that lacks the key."""

CARRIED = ("eos_token_id", "pad_token_id", "bos_token_id", "attention_dropout", "torch_dtype", "dtype")

FIRST = {"position_encoding_2d", "inner_hidden_size"}
"""Keys that only configs of the first ChatGLM-6B have."""
CHATGLM6B_TOKENS = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id")
IMAGES = ("vision_config", "eva_config")

INTERPOLATED = 16
"""``rope_ratio`` of ChatGLM2-6B-32K, whose code divides positions by it; later code multiplies the rope's base."""


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a ``config.json`` of model type ``chatglm`` to a ``GlmConfig`` or to Secateur's ``ChatGLM6BConfig``.

    The translated config describes the same function of the same weights.

    Raises:
        PruningError: ``unsupported_architecture`` if the model is neither of the two, or ``config_invalid``.
            Both errors name the key.
    """
    if image := next((key for key in IMAGES if config.get(key)), None):
        raise _unsupported(f"it reads images ('{image}')")
    return _chatglm6b(config) if FIRST & config.keys() else _glm(config)


def _chatglm6b(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config.get("position_encoding_2d", True):
        raise _unsupported("its 'position_encoding_2d' is false, which no published ChatGLM-6B's is")
    if config.get("pre_seq_len"):
        raise _unsupported(
            f"it has a trained prefix ('pre_seq_len' is {config['pre_seq_len']}); merge or drop it first"
        )
    hidden, heads = read_size(config, "hidden_size", 4096), read_size(config, "num_attention_heads", 32)
    if hidden % heads or hidden // heads % 4:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"config.json: 'num_attention_heads' is {heads}, and 'hidden_size' {hidden} is no multiple of 4 for each: "
            "half a head cannot be rotated in pairs.",
            field="model_id",
        )
    return _with_common(
        config,
        {
            "model_type": "chatglm6b",
            "vocab_size": read_size(config, "vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": read_size(config, "inner_hidden_size", 16384),
            "num_hidden_layers": read_size(config, "num_layers", 28, most=MOST_LAYERS),
            "num_attention_heads": heads,
            "max_position_embeddings": read_size(config, "max_sequence_length", 2048),
            "layer_norm_eps": _number(config, "layernorm_epsilon", 1e-5),
            **{key: read_size(config, key) for key in CHATGLM6B_TOKENS},
        },
    )


def _glm(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, (wanted, silent) in ALIKE.items():
        value = config.get(key, silent)
        if bool(value) != wanted:
            raise _unsupported(f"its '{key}' is {value}, and transformers' glm, which it is read as, cannot be so")
    ratio = _number(config, "rope_ratio", 1.0)
    if ratio == INTERPOLATED:
        raise _unsupported(
            f"its 'rope_ratio' is {INTERPOLATED}, that of ChatGLM2-6B-32K, which interpolates positions; any other is "
            "read as ChatGLM3's and GLM-4's code reads it, as a factor of the rope's base"
        )
    head_dim = read_size(config, "kv_channels")
    if head_dim % 4:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"config.json: 'kv_channels' is {head_dim}: half a head cannot be rotated in pairs.",
            field="model_id",
        )
    translated = {
        "model_type": "glm",
        "vocab_size": read_size(config, "padded_vocab_size"),
        "hidden_size": read_size(config, "hidden_size"),
        "intermediate_size": read_size(config, "ffn_hidden_size"),
        "num_hidden_layers": read_size(config, "num_layers", most=MOST_LAYERS),
        "num_attention_heads": read_size(config, "num_attention_heads"),
        "num_key_value_heads": read_size(config, "multi_query_group_num"),
        "head_dim": head_dim,
        "max_position_embeddings": read_size(config, "seq_length"),
        "attention_bias": bool(config.get("add_qkv_bias", False)),
        "hidden_act": "silu",
        "rms_norm_eps": _number(config, "layernorm_epsilon", 1e-5),
        "rope_theta": 10000.0 * ratio,
        "partial_rotary_factor": 0.5,
        # GlmConfig's default ids are those of GLM-4, which are outside ChatGLM's vocabulary.
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return _with_common(config, translated)


def _with_common(config: Mapping[str, Any], translated: dict[str, Any]) -> dict[str, Any]:
    """Return the translated config with the keys that have the same name in all of these configs."""
    translated |= {key: config[key] for key in CARRIED if config.get(key) is not None}
    translated["tie_word_embeddings"] = False  # ChatGLM's classes never tie embeddings, whatever the config says
    if quantized := config.get("quantization_config") or config.get("quantization_bit"):
        translated["quantization_config"] = quantized
    return translated


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"config.json: '{key}' must be a positive number, not {repr(value)[:40]}.",
            field="model_id",
        )
    return float(value)


def _unsupported(reason: str) -> PruningError:
    return PruningError(ErrorCode.UNSUPPORTED_ARCHITECTURE, f"This model cannot be pruned: {reason}.", field="model_id")
