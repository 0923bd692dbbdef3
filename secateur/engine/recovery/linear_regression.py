"""Recover as SlimLLM does: each output dimension on its own is fitted by a line."""

from torch import Tensor

from secateur.engine.recovery.base import Cut


def recover(cut: Cut) -> tuple[Tensor, Tensor | None]:
    """Fit O_i ≈ A_i·O_i^pruned + B_i by least squares over the tokens (equations 9 and 10).

    A is folded into the rows of the weight, and B into a bias. Means and covariances of outputs follow from those of
    the inputs, so no output is ever stored. Where the pruned output does not vary, A is 1.
    """
    weight, kept, mean = cut.weight.double(), cut.weight[:, cut.kept].double(), cut.moments.mean.double()
    covariance = cut.moments.covariance.double()
    variance = ((kept @ covariance[cut.kept][:, cut.kept]) * kept).sum(1)
    shared = ((weight @ covariance[:, cut.kept]) * kept).sum(1)
    varies = variance > 1e-12 * ((weight @ covariance) * weight).sum(1).abs()
    slope = (shared / variance).where(varies, variance.new_ones(()))
    intercept = weight @ mean - slope * (kept @ mean[cut.kept])
    if cut.bias is not None:
        intercept = intercept + cut.bias.double()
    return (slope[:, None] * kept).float(), intercept.float()
