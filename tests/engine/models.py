"""Small real models for the tests: random ones of every family, and one that is trained for seconds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from secateur.catalog.architectures import shape_from_config
from secateur.engine.model.decoder import Decoder, token_losses
from secateur.engine.model.modeling_chatglm6b import ChatGLM6BConfig, ChatGLM6BForCausalLM
from secateur.engine.model.plan import Kept

TEXTS = Path(__file__).parents[2] / "demo"
VOCABULARY = 384

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "chatglm6b": (ChatGLM6BConfig, {"bos_token_id": 5, "gmask_token_id": 4, "mask_token_id": 3}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": (LlamaConfig, {"num_key_value_heads": 6}),
    "mistral": (MistralConfig, {"sliding_window": 32}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma2": (Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "sliding_window_pattern": 2},
    ),
    "glm": (GlmConfig, {"head_dim": 16, "attention_bias": True}),
    "glm4": (Glm4Config, {"head_dim": 16}),
    "phi3": (Phi3Config, {"sliding_window": 32}),
    "gpt2": (GPT2Config, {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 128, "n_inner": 160}),
    "gpt-neox": (GPTNeoXConfig, {"num_attention_heads": 3}),
    "gpt-neox-serial": (GPTNeoXConfig, {"use_parallel_residual": False, "attention_bias": False}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "sliding_window": 32}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {"head_dim": 16, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 160},
    ),
    "opt": (OPTConfig, {"ffn_dim": 160, "word_embed_proj_dim": 48}),
}

LIKE_LLAMA: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_bias": True}),
    "nemotron": (NemotronConfig, {"head_dim": 8}),
    "olmo": (OlmoConfig, {}),
    "smollm3": (SmolLM3Config, {}),
    "stablelm": (StableLmConfig, {}),
    "starcoder2": (Starcoder2Config, {"use_bias": True}),
}
"""Families without an adapter."""


def english(part: str) -> list[str]:
    return [path.read_text() for path in sorted((TEXTS / part).glob("*.txt"))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(english("calibration"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def make_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family, its weights and biases large enough that every unit matters."""
    config_class, own = (FAMILIES | LIKE_LLAMA)[name]
    torch.manual_seed(seed)
    config = config_class(**{**SIZES, **own, **changes})
    if isinstance(config, ChatGLM6BConfig):
        model = ChatGLM6BForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5) + (parameter.dim() == 1)
            )
    return model.eval().requires_grad_(False)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int = 0) -> PreTrainedModel:
    """Train for seconds on the demo's text, enough for scores to mean something."""
    ids = torch.tensor(tokenizer("\n\n".join(english("calibration"))).input_ids)
    generator = torch.Generator().manual_seed(seed)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 65, (16,), generator=generator)
        batch = torch.stack([ids[start : start + 64] for start in starts])
        optimizer.zero_grad()
        token_losses(model(batch).logits, batch).mean().backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


def decoder_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Decoder:
    return Decoder(model, tokenizer, shape_from_config(model.config.to_dict()))


def layer_plan(kv_groups: Iterable[int], channels: Iterable[int]) -> Kept:
    """What a layer keeps."""
    return {"kv_groups": tuple(kv_groups), "channels": tuple(channels)}
