"""SlimLLM's recovery: each output dimension on its own is a line of what it was."""

from torch import Tensor

from secateur.engine.recovery.base import Cut


def recover(cut: Cut) -> tuple[Tensor, Tensor | None]:
    """O_i ≈ A_i·O_i^pruned + B_i by least squares over the tokens, folded into the weight's rows and a bias (equations 9, 10).

    Means and covariances of outputs follow from those of the inputs, so no output is ever stored. Where the pruned output
    does not vary, A is 1.
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
