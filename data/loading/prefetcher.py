"""Batches onto the training device, one ahead of the one in use."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from data.loading.batch import BatchPlan, DeviceBatch, RawBatch, assemble


@dataclass
class LoadTimes:
    """What reading and decoding took the workers (or this process, without them), summed up over images."""

    num_images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """The rest of the time went by waiting: for the disk, or for a free core"""

    def add(self, raw: RawBatch) -> None:
        self.num_images += len(raw)
        self.seconds += raw.load_seconds
        self.cpu_seconds += raw.load_cpu_seconds


class DevicePrefetcher:
    """Iterates over the DeviceBatches of an iterator over RawBatches.

    On a GPU the next batch is copied and assembled on a stream of its own while the model works on the
    present one, if the caller says when that is, by `prepare`; pinned memory (a loader's pin=True, or pinned here)
    keeps the host from waiting. On the CPU a batch is assembled when it is asked for.

    plan: of the latest batch handed out.

    data_seconds: how long the caller has waited for that batch: for workers that had none ready, and on the CPU for the
    assembly.
    """

    def __init__(self, batches: Iterator[RawBatch], device: torch.device | str) -> None:
        self._batches = batches
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._ahead: DeviceBatch | None = None
        self._over = False
        self._prepare_seconds = 0.0
        self._idle_seconds = 0.0
        self._idle_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.data_seconds = 0.0
        self.plan: BatchPlan | None = None
        self.load_times = LoadTimes()

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        self.fetch()
        if self._ahead is None:
            raise StopIteration
        batch, self._ahead = self._ahead, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            with self._counted_as_idle():
                current.wait_stream(self._stream)
            batch.record_stream(current)
        self.plan = batch.plan
        self.data_seconds, self._prepare_seconds = self._prepare_seconds, 0.0
        return batch

    def prepare(self) -> None:
        """Fetch the next batch while a GPU is at work: to be called when it has been given its work, as the host may
        wait for workers then, and nothing else does. On the CPU it does nothing."""
        if self._stream is not None:
            self.fetch()

    def fetch(self) -> None:
        """Wait for the next batch and assemble it (on a GPU: begin to), if there is one and that has not been done."""
        if self._ahead is not None or self._over:
            return
        start = time.perf_counter()
        with self._counted_as_idle():
            raw = next(self._batches, None)
        if raw is None:
            self._over = True
            return
        self.load_times.add(raw)
        if self._stream is None:
            self._ahead = assemble(raw, self._device)
        else:
            if not raw.pixels.is_pinned():
                raw = raw.pin_memory()
            with torch.cuda.stream(self._stream):
                self._ahead = assemble(raw, self._device)
        self._prepare_seconds = time.perf_counter() - start

    def take_idle_seconds(self) -> float:
        """How long the device has had nothing to do for want of a batch since the last call.

        On a GPU it is measured there, between events, and this call waits until it has done what it was given: for
        when the caller is about to wait for it anyway. On the CPU it is the wait for workers, or for the decoder.
        """
        if self._idle_events:
            torch.cuda.current_stream(self._device).synchronize()
            self._idle_seconds += sum(before.elapsed_time(after) for before, after in self._idle_events) / 1e3
            self._idle_events = []
        seconds, self._idle_seconds = self._idle_seconds, 0.0
        return seconds

    @contextmanager
    def _counted_as_idle(self) -> Iterator[None]:
        if self._stream is None:
            start = time.perf_counter()
            yield
            self._idle_seconds += time.perf_counter() - start
            return
        # The GPU comes to the first event when it has done all that was launched before, and to the second as soon as
        # the host has gone on: next to no time lies between them while it still has work.
        stream = torch.cuda.current_stream(self._device)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        yield
        after.record(stream)
        self._idle_events.append((before, after))
