"""How a batch comes from a worker process: pixels through shared buffers, the rest as a message."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from data.loading.batch import RawBatch
from data.loading.shared_buffers import SharedBuffers


@dataclass(frozen=True)
class LoadFailure:
    """A worker's report of an image that cannot be used. Travels as a value: an exception would reach the
    user wrapped in the worker's traceback."""

    message: str


class Reader(Protocol):
    """What carries out plans."""

    def read(self, plan: Any, room: np.ndarray | None) -> RawBatch | LoadFailure:
        """The plan's batch; its pixels are the start of `room` (uint8) where they fit in."""


@dataclass(frozen=True)
class Request:
    """A plan on its way to a worker."""

    plan: Any
    buffer: int | None
    """Where the pixels are to be put; None where every buffer is in use"""


@dataclass(frozen=True)
class Reply:
    """A batch on its way to the main process, without its pixels."""

    batch: RawBatch
    buffer: int | None
    """That of the order"""
    num_bytes: int
    pixels: np.ndarray | None
    """uint8 [num_bytes] where they are not in the buffer. As an array they go through the pipe, which is slower than
    shared memory and needs none: a container's 64 MB of /dev/shm might be too little for a large batch."""


class WorkerSide(Dataset):
    """Carries out orders, in a process that was forked after the buffers were made."""

    def __init__(self, reader: Reader, buffers: SharedBuffers) -> None:
        self._reader, self._buffers = reader, buffers

    def __getitem__(self, request: Request) -> Reply | LoadFailure:
        room = None if request.buffer is None else self._buffers.view(request.buffer)
        batch = self._reader.read(request.plan, room)
        if isinstance(batch, LoadFailure):
            return batch
        pixels = batch.pixels.numpy()
        is_in_buffer = room is not None and np.may_share_memory(pixels, room)
        batch.pixels = torch.empty(0, dtype=torch.uint8)
        return Reply(batch, request.buffer, pixels.size, None if is_in_buffer else pixels)


class MainSide:
    """Gives buffers to plans, and pixels to batches."""

    def __init__(self, buffers: SharedBuffers) -> None:
        self._buffers = buffers

    def requests(self, plans: Iterable[Any]) -> Iterator[Request]:
        """An order for each plan. What an earlier pass left undone is over once the first of them is asked for."""
        self._buffers.release_all()
        for plan in plans:
            yield Request(plan, self._buffers.reserve())

    def batch(self, reply: Reply) -> RawBatch:
        """The batch with its pixels; their buffer is in use for as long as they are."""
        batch, buffer = reply.batch, reply.buffer
        if reply.pixels is None:
            assert buffer is not None
            batch.pixels = self._buffers.take(buffer, reply.num_bytes)
        else:
            batch.pixels = torch.from_numpy(reply.pixels)
            if buffer is not None:
                self._buffers.release(buffer)
        return batch
