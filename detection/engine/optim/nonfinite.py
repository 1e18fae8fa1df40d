"""Iterations that are not finite make no step: nothing of them stays in the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NonFiniteGuard:
    """Decides on the device whether an iteration counts; the host does not wait for it.

    Every process decides alike without a message: `mark` makes the gradients of a non-finite loss NaN, the gradient
    exchange brings them to all processes, and each looks at the norm of the exchanged gradients.

    With `skips` the run continues with the next iteration. Without it the first such iteration is the last that could
    have changed anything: the gradients of all later ones are made NaN too. So when the losses are read, which ends the
    run, the model still is what it was before that iteration.
    """

    def __init__(self, model: nn.Module, *, skips: bool, gradient_may_overflow: bool = False) -> None:
        """
        Args:
            skips: --skip-nonfinite.
            gradient_may_overflow: float16: a gradient that is not finite is the loss scaler's case, a loss is not.
        """
        self.skips = skips
        self._gradient_may_overflow = gradient_may_overflow
        self._bad = torch.zeros((), dtype=torch.bool, device=next(model.parameters()).device)
        # Running statistics of batch norm: NaN in the activations would stay in them for good.
        buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer in module.buffers(recurse=False)
        ]
        by_type = {buffer.dtype: [each for each in buffers if each.dtype == buffer.dtype] for buffer in buffers}
        self._buffers = list(by_type.values())
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Before an iteration's first forward pass."""
        if self.skips:
            self._bad.zero_()
        self._before = [_flat(buffers) for buffers in self._buffers]

    def mark(self, loss: Tensor) -> Tensor:
        """`loss` (a scalar) as the backward pass takes it: bit-equal where all is finite, else with gradients that are
        all NaN."""
        self._bad.logical_or_(loss.detach().isfinite().logical_not_())
        return loss * torch.where(self._bad, torch.nan, 1.0)

    def undo(self) -> None:
        """Instead of `finish`: the iteration is given up before its end, and nothing of it stays in the model."""
        for buffers, before in zip(self._buffers, self._before, strict=True):
            _fill(buffers, before)

    def finish(self, grad_norm: Tensor) -> Tensor:
        """After the backward pass: 1.0 where the iteration is to make no step, else 0.0."""
        skip = grad_norm.isfinite().logical_not_()
        if not self._gradient_may_overflow:
            self._bad.logical_or_(skip)
        undo = skip if self.skips else self._bad
        for buffers, before in zip(self._buffers, self._before, strict=True):
            _fill(buffers, torch.where(undo, before, _flat(buffers)))
        return skip.float()


def _flat(tensors: list[Tensor]) -> Tensor:
    # One kernel for all, where each tensor's own would cost the host more than the device.
    return torch.cat([tensor.flatten() for tensor in tensors])


def _fill(tensors: list[Tensor], flat: Tensor) -> None:
    values = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [value.view_as(tensor) for value, tensor in zip(values, tensors, strict=True)])
