"""Choice of the anchors and proposals that a training step learns from: random, or the hardest.

A random choice is a pure function of an image's sample key: each candidate gets a hash of (key, stage, its number)
and the largest win. So it depends neither on the image's place in the local batch, nor on how many ranks
share the global batch, nor on the device, and nothing waits for the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detection.models.ops.matcher import NEGATIVE, POSITIVE

RPN_STAGE, ROI_STAGE = 1, 2

# Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014): SplitMix64, as signed 64-bit
# integers.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

_HASH_BITS = 30
_INDEX_BITS = 31
_POSITIVE_BONUS = 1 << (_HASH_BITS + _INDEX_BITS)
_NOT_ELIGIBLE = -1


class Sample(NamedTuple):
    """Chosen candidates in S slots an image.

    candidate: int64 [B, S], or None where slot i is candidate i. positive: bool [B, S]. chosen: bool [B, S],
    False where a slot is empty (candidate is then any).
    """

    candidate: Tensor | None
    positive: Tensor
    chosen: Tensor

    def take(self, values: Tensor) -> Tensor:
        """The slots' rows of `values`, [B, N] or [B, N, D]: [B, S] or [B, S, D]."""
        if self.candidate is None:
            return values
        if values.dim() == 2:
            return values.gather(1, self.candidate)
        return values.gather(1, self.candidate[..., None].expand(-1, -1, values.shape[2]))


@torch.no_grad()
def sample(
    kind: Tensor,
    sample_keys: Tensor,
    *,
    stage: int,
    num_samples: int | None,
    positive_fraction: float,
    hardness: Tensor | None = None,
) -> Sample:
    """Draws num_samples candidates an image: positives up to positive_fraction of them, negatives for the
    rest.

    Both are drawn uniformly without replacement, or the hardest are taken. kind: int64 [B, N] of POSITIVE, NEGATIVE,
    IGNORED; sample_keys: int64 [B]. num_samples None takes every positive and every negative. hardness: float [B, N].
    """
    positive = kind == POSITIVE
    negative = kind == NEGATIVE
    if num_samples is None:
        return Sample(None, positive, positive | negative)
    num_candidates = kind.shape[1]
    if hardness is not None:
        keys = hardness.argsort(dim=1, stable=True).argsort(dim=1)  # their ranks
    else:
        keys = candidate_keys(sample_keys, stage, num_candidates)
    positive_keys = torch.where(positive, keys, _NOT_ELIGIBLE)
    num_positive = min(int(num_samples * positive_fraction), num_candidates)
    if num_positive:
        last_chosen = positive_keys.topk(num_positive, dim=1).values[:, -1:]
        favored = positive & (positive_keys >= last_chosen)
    else:
        favored = torch.zeros_like(positive)
    order = torch.where(favored, keys + _POSITIVE_BONUS, torch.where(negative, keys, _NOT_ELIGIBLE))
    top = order.topk(min(num_samples, num_candidates), dim=1)
    return Sample(top.indices, top.values >= _POSITIVE_BONUS, top.values != _NOT_ELIGIBLE)


def candidate_keys(sample_keys: Tensor, stage: int, num_candidates: int) -> Tensor:
    """Random keys int64 [B, N] in 0..2**61-1, no two of an image equal: 30 hashed bits above the candidate's
    number.
    """
    number = torch.arange(num_candidates, device=sample_keys.device)
    seeds = _mix(_mix(sample_keys) ^ stage)
    hashed = _mix(seeds[:, None] + (number + 1) * _GOLDEN_GAMMA)
    return (_shifted_right(hashed, 64 - _HASH_BITS) << _INDEX_BITS) | number


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shifted_right(state, 30)) * _MULTIPLIERS[0]
    state = (state ^ _shifted_right(state, 27)) * _MULTIPLIERS[1]
    return state ^ _shifted_right(state, 31)


def _shifted_right(values: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask drops the copies of the sign.
    return (values >> bits) & ((1 << (64 - bits)) - 1)
