"""Score units by the L1 norm of their weights."""

from secateur.engine.scoring.base import Context, Scores, l1_norms


def score(context: Context) -> Scores:
    """Return ‖W_u‖1 (Han et al. 2015, section 3, summed over the unit), which needs no data."""
    return l1_norms(context.decoder)
