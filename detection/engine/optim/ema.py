"""An exponential moving average of the weights, kept beside the model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class AveragedModel:
    """`module` holds the average: ema <- d * ema + (1 - d) * weights after every iteration.

    The decay of iteration i (0-based) is d = min(decay, (1 + i) / (10 + i)), so that the random start is forgotten
    early; it is a function of the iteration alone and needs no counter in the checkpoint. Floating-point buffers
    (batch-norm statistics) are averaged like weights; whole-number buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, iteration: int, skip: Tensor | None = None) -> None:
        """Take in the weights of `model` after the optimizer step of `iteration`.

        Args:
            skip: a scalar on the device; where it is not 0, the average does not change.
        """
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        averaged, current = [], []
        state = model.state_dict()
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                averaged.append(value)
                current.append(state[name])
            else:
                value.copy_(state[name])
        if skip is not None:
            # lerp(x, x) returns x exactly, so a skipped step leaves the average unchanged.
            stays = skip != 0
            current = [torch.where(stays, old, new) for old, new in zip(averaged, current, strict=True)]
        torch._foreach_lerp_(averaged, current, 1 - decay)
