"""Mixed precision of the training step: off, bfloat16, or float16 with a loss scale."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast, backward and optimizer step at the chosen precision.

    Weights, gradients and optimizer state stay float32. float16 alone needs a loss scale: it starts at 2**16, is
    halved (and the step skipped) when a gradient overflows, and doubled after 2,000 good steps, unless the schedule
    says otherwise; its state belongs into the checkpoint.
    """

    def __init__(self, amp: str, device: torch.device, loss_scale: str | float | dict[str, Any] = "dynamic") -> None:
        """
        Args:
            amp: off, bf16 or fp16.
            device: where the step runs.
            loss_scale: for fp16: "dynamic", a fixed number, or arguments of torch.amp.GradScaler.
        """
        self.amp = amp
        self.device = device
        self._fixed_scale = float(loss_scale) if isinstance(loss_scale, (int, float)) else None
        arguments = dict(loss_scale) if isinstance(loss_scale, dict) else {}
        if self._fixed_scale is not None:
            arguments["init_scale"] = self._fixed_scale
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16", **arguments)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        return torch.autocast(self.device.type, dtype=_DTYPES.get(self.amp, torch.bfloat16), enabled=self.amp != "off")

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, scaled where the precision needs it."""
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring the gradients back to their true size, before their norm is taken."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, skip: Tensor | None = None) -> None:
        """Optimizer step; skipped by the scaler where a float16 gradient overflowed.

        Args:
            skip: 1.0 on the device for no step (weights and states stay as they are), 0.0 for one. Fused optimizers
                look at it there; None for others. With float16 it is not asked: a gradient that is not finite is the
                scaler's own case.
        """
        if skip is None or self.scaler.is_enabled():
            self.scaler.step(optimizer)
        else:
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
        self.scaler.update(self._fixed_scale)

    def loss_scale_before(self, steps_missed: int) -> float:
        """The loss scale before the last so many steps, none of which was made; waits for the device."""
        scale = float(self.scaler.get_scale())
        halves = self.scaler.is_enabled() and self._fixed_scale is None
        return scale / self.scaler.get_backoff_factor() ** steps_missed if halves else scale

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16 (elsewhere they are put together from others)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Without a public name; true of processors with AMX as well.
    has_instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(has_instructions())


def gradient_norm(parameters: Iterable[nn.Parameter], *, norm_type: float = 2.0, clip_to: float | None) -> Tensor:
    """Norm of all gradients together, a scalar on their device; gradients are scaled down to `clip_to` if above it."""
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type=norm_type)
    if clip_to is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_to, norm)
    return norm
