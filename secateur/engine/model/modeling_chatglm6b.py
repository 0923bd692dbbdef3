"""ChatGLM-6B for current transformers, batch first and with caches; the weights have their published names.

The file needs only transformers, 4.57 or 5. Source: "GLM: General Language Model Pretraining with Autoregressive Blank
Infilling" (Du et al. 2022), section 2, and the modeling file of zai-org/chatglm-6b; this file computes the same
function as the last revision of that file.

A text consists of a context, the beginning-of-sequence token, and an answer. Tokens of the context see each other in
both directions; the beginning-of-sequence token and the answer are read from left to right. Each token has two
positions. The first is the position in the context; for all tokens after the context it is the position of the mask
that the answer fills in. The second counts the tokens from the beginning-of-sequence token on; for tokens of the
context it is 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

DEPTH = 28
"""Number of layers from which the scale of residual connections follows. The published code never gives its layers
another number."""
ROPE_BASE = 10000


class ChatGLM6BConfig(PretrainedConfig):
    """Configuration of ChatGLM-6B.

    The number of features of a head is a multiple of 4, because each half of a head is rotated by itself, in pairs.
    """

    model_type = "chatglm6b"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 130528
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    head_dim: int | None = None
    """Features of a head; ``None`` means ``hidden_size / num_attention_heads``."""
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    tie_word_embeddings: bool = False


def width_of_a_head(config: ChatGLM6BConfig) -> int:
    """Return the number of features of an attention head."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def two_positions(input_ids: Tensor, attention_mask: Tensor | None, config: ChatGLM6BConfig) -> Tensor:
    """Return the two positions ``[batch, 2, length]`` of each token: in the context, and after the context.

    ``input_ids`` and ``attention_mask`` are ``[batch, length]``; ``attention_mask`` is 0 for padding. A text without a
    beginning-of-sequence token is treated as text that follows such a token.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    rank = (real.cumsum(1) - 1).clamp(min=0)

    def first(token_id: int | None, default: Tensor) -> Tensor:
        found = (input_ids == token_id) & real
        at = rank.gather(1, found.int().argmax(1, keepdim=True))
        return torch.where(found.any(1, keepdim=True), at, default)

    nowhere = torch.zeros_like(rank[:, :1])
    context = first(config.bos_token_id, nowhere)
    mask = first(config.gmask_token_id, first(config.mask_token_id, nowhere))
    return torch.stack([torch.where(rank < context, rank, mask), (rank - context + 1).clamp(min=0)], 1)


def rotations(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines ``[batch, length, 1, 2, head_dim / 2]`` of the rotation angles.

    The first half of a head is rotated by the first of a token's positions, the second half by the second. The
    frequencies are rounded to float16, as in training; for half-precision dtypes the angles are float16 too.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=position_ids.device) / half
    precision = torch.float32 if dtype in (torch.float32, torch.float64) else torch.float16
    frequencies = (1 / ROPE_BASE**exponents).half().to(precision)
    angles = (position_ids.transpose(1, 2)[..., None].to(precision) * frequencies).float()
    angles = torch.cat([angles, angles], -1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return ``states`` ``[batch, length, heads, head_dim]`` rotated by the given cosines and sines."""
    halves = states.unflatten(-1, (2, -1))
    first, second = halves.chunk(2, -1)
    turned: Tensor = (halves * cosines + torch.cat([-second, first], -1) * sines).flatten(-2)
    return turned


def visible(position_ids: Tensor, attention_mask: Tensor | None, past: int, dtype: torch.dtype) -> Tensor:
    """Return the mask ``[batch, 1, length, past + length]`` that is added to the attention scores.

    The mask is 0 where a token may attend, and the smallest value of ``dtype`` where a token may not.
    """
    device, seen = position_ids.device, past + position_ids.shape[-1]
    keys = torch.arange(seen, device=device)
    allowed = (keys <= keys[past:, None]).repeat(len(position_ids), 1, 1, 1)
    allowed[..., past:] |= (position_ids[:, 1] == 0)[:, None, None]
    if attention_mask is not None:
        allowed &= attention_mask.bool()[:, None, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)


class ChatGLM6BAttention(nn.Module):
    """Self-attention with rotary positions; query, key and value are one projection."""

    def __init__(self, config: ChatGLM6BConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, width_of_a_head(config)
        width = config.num_attention_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width)
        self.dense = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None,
        cache_position: Tensor,
    ) -> Tensor:
        mixed = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_dim))
        query, key, value = mixed.unbind(-2)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})
            seen = attention_mask.shape[-1]  # a static cache also returns the slots of tokens that are not computed yet
            key, value = key[:, :, :seen], value[:, :, :seen]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        output: Tensor = self.dense(attended.transpose(1, 2).flatten(2))
        return output


class ChatGLM6BMLP(nn.Module):
    """The plain feed-forward block, with biases and the tanh approximation of GELU."""

    def __init__(self, config: ChatGLM6BConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))
        return output


class ChatGLM6BLayer(nn.Module):
    """A decoder layer; its residual connections start at the normed input and are scaled by sqrt(2 * DEPTH)."""

    def __init__(self, config: ChatGLM6BConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ChatGLM6BAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ChatGLM6BMLP(config)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        scale = (2 * DEPTH) ** 0.5
        entering = self.input_layernorm(hidden_states)
        entering = self.post_attention_layernorm(entering * scale + self.attention(entering, **arguments))
        output: Tensor = entering * scale + self.mlp(entering)
        return output


class ChatGLM6BPreTrainedModel(PreTrainedModel):
    """Base class of the ChatGLM-6B models."""

    config_class = ChatGLM6BConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["ChatGLM6BLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True


class ChatGLM6BModel(ChatGLM6BPreTrainedModel):
    """ChatGLM-6B without its output projection."""

    def __init__(self, config: ChatGLM6BConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLM6BLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states after the final norm, and the cache.

        ``position_ids`` ``[batch, 2, length]`` are the result of :func:`two_positions` on the whole text so far. They
        may be omitted when ``input_ids`` is the whole text.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if position_ids is None:
            if input_ids is None or past:
                raise ValueError("'position_ids' are needed with 'inputs_embeds' and with a cache that holds tokens.")
            position_ids = two_positions(input_ids, attention_mask, self.config)
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length = hidden_states.shape[1]
        arguments = {
            "attention_mask": visible(position_ids, attention_mask, past, hidden_states.dtype),
            "position_embeddings": rotations(position_ids, width_of_a_head(self.config), hidden_states.dtype),
            "past_key_values": past_key_values,
            "cache_position": torch.arange(past, past + length, device=hidden_states.device),
        }
        for layer in self.layers:
            hidden_states = layer(hidden_states, **arguments)
        return BaseModelOutputWithPast(self.final_layernorm(hidden_states), past_key_values)


class ChatGLM6BForCausalLM(ChatGLM6BPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its output projection, for generation."""

    def __init__(self, config: ChatGLM6BConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLM6BModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        return {
            "input_ids": input_ids[:, past:].contiguous(),
            "position_ids": two_positions(input_ids, attention_mask, self.config)[..., past:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.transformer(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values)
