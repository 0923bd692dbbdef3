"""Score units by PIEM, the Pruning Importance Evaluation Mechanism (Wang, section 3.2)."""

from torch import Tensor

from secateur.engine.measure.gates import shielded_loss_change
from secateur.engine.scoring.base import Context, Scores, l1_norms
from secateur.engine.structures import WIDTHS

# Floating-point operations that exact shielding may cost in a round: a minute on a few CPU cores, minutes on a GPU.
AFFORDABLE_FLOPS = {"cpu": 4e12, "cuda": 4e16}


def score(context: Context) -> Scores:
    """Return S(u) = Ĩ(u) + γ·|∂L/∂u| with Ĩ(u) = α(l)·I(u)/Σ_j I(u_j) and I(u) = λ1·‖W_u‖1 + λ2·ΔL(u).

    The paper leaves the scales of the terms open. Here the KV groups and the channels of a layer are two populations.
    Within a population, ‖W‖1 and ΔL are divided by their mean magnitude before the λ weights apply; Σ_j I is taken over
    magnitudes, because ΔL may be negative; α(l) is the population's mean |∂L/∂u| divided by that of the most sensitive
    layer; and |∂L/∂u| is divided by the number of units times the mean |∂L/∂u| of the most sensitive layer. Over a
    layer the terms of S add up to α(l) and γ·α(l). Within a layer α(l) does not change the order of the units; it makes
    KV groups of different layers comparable.

    ΔL of KV groups is computed exactly by shielding where that is affordable. Otherwise, and always for channels, ΔL is
    −g + ½·h from the gates.
    """
    weights, exact, report = context.resolved.spec.scoring, exact_shielding(context), context.progress
    context.details["shielding"] = "exact" if exact else "estimate"
    if exact:
        context.progress = lambda share: report(share / 2)
    norms, gates = l1_norms(context.decoder), context.gates
    changes = {name: [layer[name].loss_change for layer in gates] for name in norms}
    if exact:
        changes["kv_groups"] = context.memo(
            "shielded",
            lambda: shielded_loss_change(
                context.decoder, context.tokens, context.batch_windows, lambda share: report((1 + share) / 2)
            ),
        )

    def combine(norms: list[Tensor], changes: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        largest = max(_mean(gradient) for gradient in gradients) or 1.0
        scores = []
        for norm, change, gradient in zip(norms, changes, gradients, strict=True):
            importance = weights.lambda_weight * _scaled(norm) + weights.lambda_loss * _scaled(change)
            sensitivity = _mean(gradient) / largest
            share = importance / importance.abs().sum().clamp_min(1e-300)
            scores.append(sensitivity * share + weights.gamma * gradient.abs() / (max(len(gradient), 1) * largest))
        return scores

    return {name: combine(norms[name], changes[name], [layer[name].gradient for layer in gates]) for name in norms}


def exact_shielding(context: Context) -> bool:
    """Return whether ΔL of KV groups is computed by shielding.

    The request decides, unless it says ``auto``: then shielding is used where its forward passes are affordable on this
    kind of device.
    """
    if context.resolved.spec.scoring.shielding != "auto":
        return context.resolved.spec.scoring.shielding == "exact"
    decoder = context.decoder
    groups = sum(WIDTHS["kv_groups"].units(layer) for layer in decoder.layers)
    cost = groups * context.tokens.numel() * 2 * decoder.parameters
    return cost <= AFFORDABLE_FLOPS.get(decoder.device.type, 0)


def _mean(gradient: Tensor) -> float:
    """Return the mean magnitude, which is 0 in a layer that has no such units."""
    return float(gradient.abs().mean()) if len(gradient) else 0.0


def _scaled(term: Tensor) -> Tensor:
    return term / term.abs().mean().clamp_min(1e-300)
