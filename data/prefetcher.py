"""Batches onto the training device, one ahead of the one in use."""

import time
from collections.abc import Iterator

import torch

from data.batches import DeviceBatch, RawBatch, assemble


class DevicePrefetcher:
    """Iterates over the DeviceBatches of an iterator over RawBatches.

    On a GPU the next batch is copied and assembled on a stream of its own while the model works on the
    present one; pinned memory (a loader's pin=True, or pinned here) keeps the host from waiting. On the CPU a
    batch is assembled when it is asked for.

    data_seconds: how long the caller has waited for the latest batch: for workers that had none ready, and on
    the CPU for the assembly.
    """

    def __init__(self, batches: Iterator[RawBatch], device: torch.device | str) -> None:
        self._batches = batches
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._ahead: DeviceBatch | None = None
        self._started = False
        self.data_seconds = 0.0

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        start = time.perf_counter()
        if self._stream is None:
            batch = assemble(next(self._batches), self._device)
        else:
            batch = self._next_of_stream(self._stream)
        self.data_seconds = time.perf_counter() - start
        return batch

    def _next_of_stream(self, stream: torch.cuda.Stream) -> DeviceBatch:
        if not self._started:
            self._started = True
            self._ahead = self._assemble_next(stream)
        batch = self._ahead
        if batch is None:
            raise StopIteration
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(stream)
        batch.record_stream(current)
        # After wait_stream, so that the present batch does not wait for the next one too.
        self._ahead = self._assemble_next(stream)
        return batch

    def _assemble_next(self, stream: torch.cuda.Stream) -> DeviceBatch | None:
        raw = next(self._batches, None)
        if raw is None:
            return None
        if not raw.pixels.is_pinned():
            raw = raw.pin_memory()
        with torch.cuda.stream(stream):
            return assemble(raw, self._device)
