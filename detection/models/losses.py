"""What the losses of both stages share."""

from __future__ import annotations

from torch import Tensor


def smooth_l1(differences: Tensor, beta: float) -> Tensor:
    """Girshick 2015, equation 3, with the quadratic part up to `beta`, elementwise; beta 0 is the absolute
    value.
    """
    absolute = differences.abs()
    if beta == 0:
        return absolute
    quadratic = absolute * absolute * (0.5 / beta)
    return quadratic.where(absolute < beta, absolute - 0.5 * beta)


def count_at_least_one(counts: Tensor) -> Tensor:
    """Sum of counts, as a divisor: 1 where there is nothing to count."""
    return counts.sum().clamp(min=1)
