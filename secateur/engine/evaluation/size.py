"""Count the size on disk and the floating-point operations of a model, without measuring."""

from secateur.engine.model.decoder import Decoder


def weight_bytes(decoder: Decoder) -> int:
    """Return the bytes of the weights as they are saved; tied weights count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in decoder.model.parameters())


def forward_flops(decoder: Decoder, tokens: int) -> int:
    """Return the floating-point operations of one forward pass over ``tokens`` tokens.

    The logits of all positions are included. Every weight of every projection and of the head counts two operations for
    each token. QKᵀ and AV count 4·tokens·head_dim for each head and token; a causal mask is not discounted, as kernels
    differ in what they skip. Of a mixture of experts, only the experts count to which a token is sent. Norms, routers
    and activations are left out.
    """
    shape = decoder.shape
    projections = decoder.prunable_parameters + shape.vocab_size * shape.hidden_size
    for layer in decoder.layers:
        idle = max(layer.shape.experts - shape.experts_per_token, 0)
        projections -= layer.shape.channels_per_expert * layer.cost.channel * idle
    heads = sum(widths.attention_width for widths in decoder.widths)
    return 2 * tokens * projections + 4 * tokens * tokens * heads
