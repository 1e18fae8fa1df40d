"""All gradients in one piece of memory, so that a recording always finds them and one exchange averages them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from detection.engine.distributed.comm import Processes


class FlatGradients:
    """The gradients of `parameters` (float32) as views of one tensor, where they stay."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        # Each begins at a multiple of 16 bytes, for operators that take four numbers at a time.
        rounded = [-(-parameter.numel() // 4) * 4 for parameter in parameters]
        self._flat = torch.zeros(sum(rounded), device=parameters[0].device)
        start = 0
        for parameter, length in zip(parameters, rounded, strict=True):
            # As the parameter lies in memory, which fused optimizers rely on.
            parameter.grad = torch.as_strided(self._flat, parameter.shape, parameter.stride(), start)
            start += length

    def zero(self) -> None:
        self._flat.zero_()

    def average(self, processes: Processes) -> None:
        """Replace them by their mean over the processes."""
        processes.average(self._flat)
