"""cuDNN's search for the fastest algorithm of each convolution, for a few sizes of batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from detection.models import ImageBatch, TargetBatch

MOST_SIZES = 9
"""As many as the buckets of padded sizes are: each costs some seconds of trying."""


class AlgorithmSearch:
    """Lets cuDNN try its algorithms in the first pass of each of the first MOST_SIZES sizes.

    It keeps what it has found, and takes it also where it does not search: so there is no search while a CUDA graph is
    recorded, which could not hold one, nor in a validation with its dozens of sizes.
    """

    def __init__(self) -> None:
        self._tried: set[torch.Size] = set()

    def run(
        self,
        step: Callable[[ImageBatch, TargetBatch], dict[str, Tensor]],
        images: ImageBatch,
        targets: TargetBatch,
    ) -> dict[str, Tensor]:
        """What `step` gives for a batch."""
        size = images.pixels.shape
        if size in self._tried or len(self._tried) == MOST_SIZES:
            return step(images, targets)
        self._tried.add(size)
        torch.backends.cudnn.benchmark = True
        try:
            return step(images, targets)
        finally:
            torch.backends.cudnn.benchmark = False
            # What the algorithms worked with: a recording could not free it to make room.
            torch.cuda.empty_cache()
