"""Iterations that are not finite: they end the run, or leave nothing behind (--skip-nonfinite)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KeepEveryStep:
    """Every iteration makes its step: one that is not finite is found when the losses are read, and ends the run."""

    def begin(self) -> None:
        """Before an iteration's first forward pass."""

    def mark(self, loss: Tensor) -> Tensor:
        """`loss` (a scalar) as the backward pass takes it."""
        return loss

    def finish(self, grad_norm: Tensor) -> Tensor | None:
        """After the backward pass: 1.0 where the iteration is to be skipped, else 0.0; None where none ever is."""
        return None


class NonFiniteGuard(KeepEveryStep):
    """Decides on the device whether an iteration counts, and takes back what its forward pass left in the model.

    Every process decides alike without a message: `mark` makes the gradients of a non-finite loss NaN, the gradient
    exchange brings them to all processes, and each looks at the norm of the exchanged gradients.
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
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    def mark(self, loss: Tensor) -> Tensor:
        """`loss` with gradients that are all NaN where it is not finite; bit-equal where it is."""
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def finish(self, grad_norm: Tensor) -> Tensor:
        skip = grad_norm.isfinite().logical_not()
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skip, before, buffer))
        return skip.float()
