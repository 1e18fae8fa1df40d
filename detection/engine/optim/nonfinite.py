"""Iterations that are not finite leave nothing behind (--skip-nonfinite), decided on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NonFiniteGuard:
    """Says on the device whether an iteration counts, and takes back what its forward pass left in the model.

    The decision is the same on every process without a message of its own: `carry` makes the gradients of a loss that
    is not finite NaN, the gradient exchange brings them to all, and all look at the norm of the exchanged gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        # Running statistics of batch norm: NaN in the activations would stay in them for good.
        self._buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer in module.buffers(recurse=False)
        ]
        self._before = [buffer.clone() for buffer in self._buffers]

    def begin(self) -> None:
        """Before an iteration's first forward pass."""
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    def carry(self, loss: Tensor) -> Tensor:
        """`loss` (a scalar), with gradients that are all NaN where it is not finite; bit-equal where it is."""
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def finish(self, grad_norm: Tensor) -> Tensor:
        """After the backward pass: 1.0 where the iteration is to be skipped, else 0.0; float32 scalar on the device."""
        skip = grad_norm.isfinite().logical_not()
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skip, before, buffer))
        return skip.float()
