"""L1 norm of a unit's weights."""

from secateur.engine.scoring.base import Context, Scores, l1_norms


def score(context: Context) -> Scores:
    """‖W_u‖1 (Han et al. 2015, section 3, summed over the unit). Needs no data."""
    return l1_norms(context.decoder)
