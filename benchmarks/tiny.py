"""Tiny checkpoints with random weights of the model types of transformers, from configs that are shrunk by the names of their fields."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LISTS: dict[str, list[str]] = {
    "causal": sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)),
}
"""The model types of transformers, by the automatic class that builds them."""
MAX_PARAMETERS = 30_000_000
"""A model with more parameters than this was not shrunk by the fields below, and is not built."""
_NAMES: dict[int | float, str] = {
    1: "topk_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers moe_layer_start_index"
    " mamba_n_groups n_groups bos_token_id decoder_start_token_id",
    2: "encoder_layers num_key_value_heads num_kv_heads num_global_key_value_heads num_experts_per_tok experts_per_token"
    " moe_k moe_top_k top_k_experts moe_topk n_group o_groups index_n_heads linear_num_key_heads mamba_expand"
    " n_mamba_heads altup_num_inputs num_codebooks eos_token_id",
    3: "num_channels",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers depth num_attention_heads n_head n_heads num_heads"
    " attention_heads decoder_attention_heads encoder_attention_heads linear_num_value_heads linear_conv_kernel_dim"
    " mamba_dt_rank",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim mamba_n_heads mamba_num_heads"
    " laurel_rank patch_size rotary_dim",
    16: "head_dim global_head_dim kv_channels attention_head_dim kv_lora_rank qk_nope_head_dim v_head_dim o_lora_rank"
    " index_head_dim index_topk linear_key_head_dim linear_value_head_dim mamba_d_head mamba_d_state mamba_head_dim"
    " ssm_state_size state_size mamba_chunk_size chunk_size hidden_size_per_layer_input sliding_window"
    " attention_window_size",
    24: "qk_head_dim",
    32: "q_lora_rank image_size",
    64: "hidden_size d_model n_embd dim embed_dim model_dim emb_dim word_embed_proj_dim moe_intermediate_size"
    " shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size"
    " shared_intermediate_size mamba_d_ssm lm_head_hidden_size block_size lru_width projection_dim out_hidden_size"
    " vision_output_dim projector_hidden_size kv_size adapter_dim proj_dim",
    128: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim hidden_dim"
    " intermediate_size_mlp prefix_dense_intermediate_size",
    384: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length original_max_position_embeddings",
    0: "pad_token_id",
    374: "boa_token_id",
    375: "eoa_token_id",
    376: "eoi_token_id",
    377: "boi_token_id",
    378: "vision_start_token_id",
    379: "vision_end_token_id",
    380: "image_token_id image_token_index",
    381: "video_token_id video_token_index",
    382: "audio_token_id audio_token_index",
}
SIZES = {name: value for value, names in _NAMES.items() for name in names.split()}
"""The value of every config field that makes a model small. A config takes those that it has."""
_HYBRID = ["mamba", "mamba", "hybrid", "mamba"]
_CONVOLUTIONS = ["conv", "full_attention"] * 2
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "intermediate_size": 128,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {"hidden_size": 64},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "jetmoe": {"num_key_value_heads": 4},
    "lfm2": {
        "block_auto_adjust_ff_dim": False,
        "block_dim": 64,
        "conv_dim": 64,
        "block_ff_dim": 128,
        "layer_types": _CONVOLUTIONS,
    },
    "lfm2_moe": {"layer_types": _CONVOLUTIONS},
    "llama4_text": {"no_rope_layers": None, "interleave_moe_layer_step": 2},
    "longcat_flash": {"ffn_hidden_size": 128, "expert_ffn_hidden_size": 64, "zero_expert_num": 2},
    "mamba": {"hidden_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16, "hidden_size": 64, "expand": 2, "n_groups": 1},
    "minimax": {"block_size": 16},
    "nemotron_h": {
        "hybrid_override_pattern": "M*-M",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "layers_block_type": None,
    },
    "phi3": {"rope_scaling": None},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 128},
    "xlstm": {"hidden_size": 64, "num_heads": 4},
    "zamba": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "layers_block_type": _HYBRID,
    },
    "zamba2": {
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": _HYBRID,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
    },
}
"""Config fields of single model types, which :data:`SIZES` alone would leave large or inconsistent."""


def build(model_type: str) -> PreTrainedModel:
    """Return a tiny model of the type, with random weights.

    Raises:
        ValueError: the model is not tiny. Constructors of transformers may raise any other exception.
    """
    config = CONFIG_MAPPING[model_type](**_fields(CONFIG_MAPPING[model_type], model_type))
    auto = AutoModelForCausalLM if model_type in LISTS["causal"] else AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"too large: {size} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    _randomise(model)
    return model


def save_tiny(model_type: str, folder: Path) -> str:
    """Write a tiny checkpoint of the type into ``folder``, with a tokenizer of bytes; return the name of its class."""
    model = build(model_type)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return type(model).__name__


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Set all matrices to random values of a usual size: the classes' own initial values are too small to tell models apart."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.is_floating_point():
            scale = 0.5 if "embed" in name else max(parameter.shape[-1], 1) ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif not torch.isfinite(parameter).all():
            parameter.zero_()


def _fields(config_class: Any, model_type: str | None) -> dict[str, Any]:
    """Return the fields of a small config, those of nested configs included."""
    try:
        instance = config_class()
    except Exception:  # some classes require fields, or raise an exception of any other kind
        instance = None
    default = instance.to_dict() if instance is not None else {}
    known = set(SIZES) if instance is None else {*default, *vars(instance)}
    known |= set((getattr(config_class, "attribute_map", None) or {}).values())
    fields: dict[str, Any] = {name: value for name, value in SIZES.items() if name in known}
    for name in ("sliding_window", "q_lora_rank"):  # None turns a feature off
        if name in default and default[name] is None:
            fields.pop(name, None)
    for name, nested_class in (getattr(config_class, "sub_configs", None) or {}).items():
        if instance is None or name in default:
            fields |= _nested(name, nested_class, default.get(name))
    return fields | EXCEPTIONS.get(model_type or "", {})


def _nested(name: str, config_class: Any, default: Any) -> dict[str, Any]:
    """Return the nested config ``name``, or nothing if its class is unknown."""
    if config_class is AutoConfig:
        model_type = default.get("model_type") if isinstance(default, dict) else None
        if model_type not in CONFIG_MAPPING:
            return {}
        config_class = CONFIG_MAPPING[model_type]
    else:
        model_type = getattr(config_class, "model_type", None)
    fields = _fields(config_class, model_type)
    return {name: fields | ({"model_type": model_type} if model_type else {})}


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
