"""What a function of a user's own does to training batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import DataError
from data.transforms.hash_rng import OWN_STREAM, hash_uniform

Uniform = Callable[[int], np.ndarray]
"""How many numbers an image -> float64 [B, n] in [0, 1), the same for the same image, epoch and seed."""
OwnFunction = Callable[[Any, Uniform], Any]
"""A DeviceBatch and a Uniform to that batch, changed in place, or another of the same shapes."""

_KEPT = ("pixels", "boxes_xyxy", "labels", "valid", "sizes")


@dataclass(frozen=True)
class OwnChange:
    """A function with the hash words (int64 [B]) of the images of one batch."""

    function: OwnFunction
    seed: int
    epoch: int
    words: np.ndarray

    def apply(self, batch: Any) -> Any:
        """The batch as the function leaves it. Raises DataError where it fails, or changes a shape or a type."""
        name = f"{self.function.__module__}:{self.function.__qualname__}"

        def uniform(count: int) -> np.ndarray:
            return hash_uniform(self.seed, OWN_STREAM, self.epoch, self.words[:, None], np.arange(count))

        before = {key: (getattr(batch, key).shape, getattr(batch, key).dtype) for key in _KEPT}
        try:
            changed = self.function(batch, uniform)
            after = {key: (getattr(changed, key).shape, getattr(changed, key).dtype) for key in _KEPT}
        except Exception as error:  # whatever a user's function raises
            raise DataError(f"--augmentation {name} failed: {error!r}") from error
        if wrong := [key for key in _KEPT if before[key] != after[key]]:
            raise DataError(f"--augmentation {name} changes the shape or the type of {wrong[0]}; keep both")
        return changed
