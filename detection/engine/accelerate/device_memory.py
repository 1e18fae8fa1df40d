"""How much memory a device has and a step takes, and the error where it is too little."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from detection.errors import DetectionError

GIB = 2**30
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""Of the CUDA and CPU allocators, and of cuBLAS and cuDNN, which raise a RuntimeError."""

REMEDIES = (
    "What takes less: a smaller --batch-size with more --accumulate (the same global batch; in a new run --batch-size "
    "auto finds the largest), a smaller --max-size, --amp bf16, --freeze backbone. Other programs on the same device "
    "count too."
)


class OutOfMemory(DetectionError):
    """A device has too little memory. The message says for what, and what takes less."""


class DeviceMemory(Protocol):
    """The memory of this process's device."""

    def begin(self) -> int:
        """Count the peak from here on; the bytes that this process can have in all, with those it has."""

    def peak(self) -> int:
        """The most bytes that this process has held since `begin`."""

    def give_back(self) -> None:
        """Return what is not in use, so that what follows finds memory as if nothing had been tried."""


class CudaMemory:
    """That of a GPU, counted as the allocator holds it: in use, cached and broken up into pieces."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> int:
        self.give_back()
        torch.cuda.reset_peak_memory_stats(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)

    def give_back(self) -> None:
        # An error holds the frames that it came through, and with them what they had.
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a device with a limit of its own; None for a CPU, which shares that of its machine."""
    return CudaMemory(device) if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


@contextlib.contextmanager
def naming_out_of_memory(place: Callable[[], str]) -> Iterator[None]:
    """Inside, an allocation that fails is an OutOfMemory that says where it was: `place()`, and the peak so far."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peak = ""
        if torch.cuda.is_initialized():
            peak = f"; at most {torch.cuda.max_memory_allocated() / GIB:.1f} GiB were in use before"
        words = str(error).splitlines()[0]
        text = f"out of memory {place()}{peak}: {words}\n{REMEDIES} --resume continues from the newest checkpoint."
        raise OutOfMemory(text) from error
