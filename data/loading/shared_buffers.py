"""Buffers that worker processes fill and the main process reads, used over and over."""

import mmap
import weakref

import numpy as np
import torch


class SharedBuffers:
    """`number` buffers of `size` bytes that this process shares with those it forks later.

    Only this process gives buffers out and takes them back: `reserve` one, tell a worker its number, the worker fills
    `view`, and `take` makes a tensor of it. The buffer is free again once the tensor, and whatever shares its memory,
    is gone; so nothing that is still in use can be overwritten, and nothing has to travel back to a worker.

    A buffer that was used before is mapped in already: a megabyte of fresh shared memory costs page faults in the
    process that writes it and again in the one that reads it. The memory has no name and no file, so nothing is left
    behind however the processes end, and the size of /dev/shm does not matter. Pages take up memory from their first
    use on, and the buffers used last are given out first.
    """

    def __init__(self, number: int, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, number * size)
        self._free = list(range(number))
        self._reserved: set[int] = set()

    def reserve(self) -> int | None:
        """The number of a free buffer; None where there is none."""
        if not self._free:
            return None
        number = self._free.pop()
        self._reserved.add(number)
        return number

    def release(self, number: int) -> None:
        """Frees a reserved buffer that is not to be taken."""
        self._reserved.remove(number)
        self._free.append(number)

    def release_all(self) -> None:
        """Frees every reserved buffer that was not taken. No worker may be at work on any of them."""
        self._free += sorted(self._reserved)
        self._reserved.clear()

    def view(self, number: int) -> np.ndarray:
        """A buffer, uint8 [size], in whichever process."""
        return np.frombuffer(self._memory, dtype=np.uint8, count=self.size, offset=number * self.size)

    def take(self, number: int, num_bytes: int) -> torch.Tensor:
        """The start of a reserved buffer, uint8 [num_bytes], without a copy."""
        self._reserved.remove(number)
        view = self.view(number)[:num_bytes]
        # The tensor's storage keeps the array, and nothing else does.
        weakref.finalize(view, self._free.append, number).atexit = False
        return torch.from_numpy(view)
