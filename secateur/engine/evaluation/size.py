"""Size on disk and floating-point operations, counted rather than measured."""

from secateur.engine.model.decoder import Decoder


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of the weights as they are saved; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in decoder.model.parameters())


def forward_flops(decoder: Decoder, tokens: int) -> int:
    """Floating-point operations of one forward over ``tokens`` tokens, all positions' logits included.

    Two for every weight of every projection and of the head, and 4·tokens·head_dim a head and token for QKᵀ and AV (a
    causal mask is not discounted, as kernels differ in what they skip). Of a mixture those experts alone that a token is sent
    to. Norms, routers and activations are left out.
    """
    shape = decoder.shape
    projections = decoder.prunable_parameters + shape.vocab_size * shape.hidden_size
    for widths in decoder.widths:
        idle = widths.experts - shape.experts_per_token
        projections -= widths.channels_per_expert * shape.cost.channel * idle // widths.experts
    heads = sum(widths.attention_width for widths in decoder.widths)
    return 2 * tokens * projections + 4 * tokens * tokens * heads
