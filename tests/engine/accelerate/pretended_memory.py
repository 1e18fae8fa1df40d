"""A device whose memory has a limit, where there is none: what a forward pass takes depends on its batch alone."""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from detection.models import FasterRCNN

BYTES_A_VALUE = 2**20
"""So that tiny batches take gigabytes."""


class PretendedMemory:
    """Of `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.most = 0
        self.shapes: list[tuple[int, ...]] = []
        self.given_back = 0

    def begin(self) -> int:
        self.most = 0
        return self.capacity

    def peak(self) -> int:
        return self.most

    def give_back(self) -> None:
        self.given_back += 1

    def take(self, shape: tuple[int, ...]) -> None:
        self.shapes.append(shape)
        taken = bytes_of(shape)
        if taken > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate what there is not")
        self.most = max(self.most, taken)


def bytes_of(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BYTES_A_VALUE


@contextlib.contextmanager
def pretended(memory: PretendedMemory, take: Callable[[tuple[int, ...]], None] | None = None) -> Iterator[None]:
    """Inside, trainings have this memory."""

    def before_forward(module: Any, arguments: Any) -> None:
        if isinstance(module, FasterRCNN) and module.training:
            (take or memory.take)(tuple(arguments[0].pixels.shape))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(before_forward)
    with pytest.MonkeyPatch.context() as context:
        for place in ("run", "train"):
            context.setattr(
                importlib.import_module(f"detection.engine.{place}"), "device_memory", lambda device: memory
            )
        try:
            yield
        finally:
            hook.remove()
