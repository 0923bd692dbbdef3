"""Score one structure of one layer from the second moments of the inputs of its output projection.

The inputs come from the hidden states that the layers cut before this layer pass on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.catalog.spec import Scoring
from secateur.engine.measure.layer_stream import Moments
from secateur.engine.model.decoder import Layer
from secateur.engine.structures import Width

SPARED_SHARE = 0.01


@dataclass(frozen=True)
class UnitContext:
    """A structure of a layer in a layer stream, or one expert's share of the structure, whose units are to be scored.

    ``removed`` is the number of units that will be removed; the scores decide which units those are.
    """

    layer: Layer
    structure: Width
    expert: int
    moments: Moments
    removed: int
    scoring: Scoring

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output projection, ``[out, in]``, float32."""
        return self._own(self.structure.output(self.layer).weight, 1).float()

    @property
    def input_weights(self) -> list[Tensor]:
        """Weight of each input projection, ``[units * rows, hidden]``, float32."""
        return [self._own(projection.weight, 0).float() for projection in self.structure.inputs(self.layer)]

    @property
    def units(self) -> int:
        return self.structure.units(self.layer) // self.structure.experts(self.layer)

    def by_unit(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the inputs of each unit: ``[in] -> [units]``."""
        return values.view(-1, self.structure.width(self.layer)).sum(1)

    def _own(self, weight: Tensor, dim: int) -> Tensor:
        return weight.chunk(self.structure.experts(self.layer), dim)[self.expert]


LayerwiseScorer = Callable[[UnitContext], Tensor]
"""Function that returns the scores ``[units]`` of a structure; the units with the lowest scores are removed first."""


def wanda(context: UnitContext) -> Tensor:
    """Return Σ over a unit's output columns j of mean_i |W_ij|·‖x_j‖ (Sun et al., equation 1).

    An et al. use this structured form of the score in their comparison.
    """
    norms = context.moments.gram.diagonal().clamp_min(0).sqrt()
    return context.by_unit(context.output_weight.abs().mean(0) * norms)


def lorap(context: UnitContext) -> Tensor:
    """Return I_j = ‖x_j‖·‖W_out^j‖ + Σ over input projections of ‖|W_in^j|·X_L2‖ (Li et al., equations 7 to 9).

    This is the authors' criterion for channels, of which those with the lowest scores are spared. For KV groups, whose
    inputs and outputs are blocks, squares are added up within the block.
    """
    scores = _group_importance(context, context.output_weight.square().sum(0))
    return _spare_lowest(context, scores) if context.structure.single else scores


def slimllm(context: UnitContext) -> Tensor:
    """Score KV groups by Pearson similarity and greedy swaps, and channels in feature space.

    KV groups follow equation 4 and algorithm 1, channels equations 5 to 8.
    """
    return _feature_space(context) if context.structure.single else _pearson(context)


def _group_importance(context: UnitContext, output_importance: Tensor) -> Tensor:
    """Return the score of equation 8, in which ``output_importance`` ``[in]`` stands for the square of I^d."""
    outputs = context.by_unit(context.moments.gram.diagonal().clamp_min(0) * output_importance).sqrt()
    for weight in context.input_weights:
        rows = weight.square() @ context.moments.entering
        outputs = outputs + rows.view(context.units, -1).sum(1).sqrt()
    return outputs


def _feature_space(context: UnitContext) -> Tensor:
    """Score channels by the columns of the output projection in the eigenbasis of the projection's output.

    Each direction is weighted by sigmoid(M_i/mean M), where M_i is the eigenvalue of the direction.
    """
    weight = context.output_weight
    importance = weight.square().sum(0)
    if context.scoring.feature_space:
        values, directions = torch.linalg.eigh((weight @ context.moments.covariance @ weight.T).double())
        values = values.clamp_min(0)
        factors = torch.sigmoid(values / values.mean().clamp_min(1e-300))
        importance = ((weight.T.double() @ directions) * factors).square().sum(1).float()
    return _spare_lowest(context, _group_importance(context, importance))


def _spare_lowest(context: UnitContext, scores: Tensor) -> Tensor:
    """Keep the units with the lowest hundredth of the scores, as LoRAP's and SlimLLM's authors do.

    Units with small inputs do not always have small effects.
    """
    spared = min(round(SPARED_SHARE * len(scores)), len(scores) - context.removed)
    scores[scores.argsort(stable=True)[:spared]] = torch.inf
    return scores


def _pearson(context: UnitContext) -> Tensor:
    """Score KV groups by −Σ over output dimensions of Pearson(output, output without the group).

    Algorithm 1 refines the choice. All quantities follow from the covariance of the groups' outputs in each dimension,
    ``[out, units, units]``. A group that the search swaps out of the kept set is removed before every kept group,
    whatever its score.
    """
    covariance = _head_covariance(context)
    units = covariance.shape[1]
    everything = torch.ones(units, dtype=torch.bool, device=covariance.device)

    def similarity(kept: Tensor) -> Tensor:
        """Return the similarity ``[sets]`` of the groups' output to the output of all groups.

        ``kept`` ``[sets, units]`` names the groups of each set.
        """
        sets = kept.to(covariance.dtype)
        shared = sets @ covariance.sum(2).T  # [sets, out]
        own = torch.einsum("su,duv,sv->sd", sets, covariance, sets)
        total = covariance.sum((1, 2))
        return (shared / (own * total).clamp_min(1e-300).sqrt()).abs().sum(1)

    without = everything.repeat(units, 1)
    without.fill_diagonal_(False)
    scores = -similarity(without)
    if context.scoring.greedy_swaps and 0 < context.removed < units:
        order = scores.argsort(stable=True)
        kept = everything.clone()
        kept[order[: context.removed]] = False
        best = similarity(kept[None])[0]
        for candidate in order[: context.removed].tolist():
            present = kept.nonzero()[:, 0]
            swapped = kept.repeat(len(present), 1)
            swapped[torch.arange(len(present)), present] = False
            swapped[:, candidate] = True
            reached = similarity(swapped)
            if reached.max() > best:
                best, kept = reached.max(), swapped[reached.argmax()]
        scores = torch.where(kept, scores, scores - (scores.max() - scores.min() + 1))
    return scores


def _head_covariance(context: UnitContext) -> Tensor:
    """Return the covariance over tokens of the units' contributions to each output dimension.

    The result is ``[out, units, units]``, float64.
    """
    width = context.structure.width(context.layer)
    blocks = context.output_weight.double().view(context.output_weight.shape[0], -1, width)  # [out, units, width]
    units = blocks.shape[1]
    inputs = context.moments.covariance.double().view(units, width, units, width)
    half = torch.einsum("duw,uwvx->duvx", blocks, inputs)
    return torch.einsum("duvx,dvx->duv", half, blocks)
