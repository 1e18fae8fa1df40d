"""Worker processes that carry out plans, one set of them for a whole run."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from data.errors import DataError
from data.images.decode import ImageError
from data.loading.batch import BatchPlan, RawBatch
from data.loading.dataset import CocoDataset
from data.loading.read_batch import BatchReader, Job, OnUnreadable
from data.loading.shared_buffers import SharedBuffers

PLANS_AHEAD_PER_WORKER = 2
"""One that a worker is at, and one that waits, decoded, for its turn."""

BATCHES_IN_USE = 3
"""Decoded batches beyond those that workers are at: one being assembled, one before and one after it."""

ORPHAN_CHECK_SECONDS = 2.0
"""How often a worker looks whether the main process is still there."""

SECONDS_TO_END = 1.0
"""For the workers of a pool that is closed."""

LARGEST_BUFFER = 4.0
"""A buffer holds a batch of the largest images, but no more than so many times a batch of average ones: a few huge
images shall not make every buffer huge, and take a slower way instead."""

MASKS_BUFFER = 2
"""With masks a buffer is so many times as large: the bitmaps of an image have about as many bytes as its pixels."""

_stuck: list[DataLoader | None] = []
"""Loaders with a worker that does not end. Python waits five seconds for each such worker when it takes one down."""


class WorkerError(DataError):
    """A worker process ended on its own."""


def worker_error(error: RuntimeError) -> WorkerError | None:
    """The user's error for `error` if it says that a worker is dead; torch raises that wherever the main thread is."""
    if not str(error).startswith("DataLoader worker (pid"):
        return None
    return WorkerError(
        f"a process that loads images ended: {str(error).rstrip(' .')}. Most often the machine, or its shared memory "
        "(in a container: --shm-size), has run full: use fewer --workers. Continue with --resume."
    )


class _Jobs(Sampler[Job]):
    """What the DataLoader is to work off next; set before each pass."""

    def __init__(self) -> None:
        self.upcoming: Iterator[Job] = iter(())

    def __iter__(self) -> Iterator[Job]:
        return self.upcoming


class WorkerPool:
    """One DataLoader, and so one set of worker processes, for as many passes as are wanted.

    Pixels and masks come through buffers that the workers share with this process, the rest as a message; what finds no
    buffer free, or does not fit into one, is in the message too.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        batch_size: int,
        workers: int,
        pin: bool,
        on_unreadable: OnUnreadable,
        max_faults: int = 0,
    ) -> None:
        self._jobs = _Jobs()
        self._pin = pin
        self._processes: set[multiprocessing.process.BaseProcess] = set()
        self._buffers: SharedBuffers | None = None
        if workers > 0 and worker_context() == "fork":
            number = workers * PLANS_AHEAD_PER_WORKER + BATCHES_IN_USE
            self._buffers = SharedBuffers(number, _buffer_size(dataset, batch_size))
        # A generator of its own: a DataLoader draws from the global one at each pass otherwise.
        self._reader = BatchReader(dataset, on_unreadable, max_faults, self._buffers)
        self._loader: DataLoader | None = DataLoader(
            self._reader,
            batch_size=None,
            sampler=self._jobs,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=PLANS_AHEAD_PER_WORKER if workers > 0 else None,
            worker_init_fn=functools.partial(start_worker, main_pid=os.getpid()),
            multiprocessing_context=worker_context() if workers > 0 else None,
            generator=torch.Generator(),
        )

    def start(self) -> None:
        """Fork the workers now, before this process is in a state that forbids it; otherwise the first `run` does."""
        if self._loader is not None and self._loader.num_workers > 0:
            self._results(self._loader)

    def read(self, plan: BatchPlan) -> RawBatch:
        """A plan's batch, read in this process."""
        return self._reader.read(plan)

    def run(self, plans: Iterator[BatchPlan]) -> Iterator[RawBatch]:
        if self._loader is None:
            raise RuntimeError("The loader is closed.")
        self._jobs.upcoming = self._with_buffers(plans)
        for result in self._results(self._loader):
            if isinstance(result, ImageError):
                raise result
            batch, number = result
            if self._buffers is not None and number is not None:
                if len(batch.pixels):
                    self._buffers.release(number)
                else:
                    num_bytes = batch.num_pixel_bytes
                    room = self._buffers.take(number, num_bytes + batch.num_mask_bits)
                    batch.pixels = room[:num_bytes]
                    if batch.mask_bits is not None and not len(batch.mask_bits):
                        batch.mask_bits = room[num_bytes:]
            # Pinned here and not by the DataLoader, whose thread would have to know the buffers: a copy of 0.1 ms an
            # image, after which the buffer is free.
            yield batch.pin_memory() if self._pin else batch

    def _results(self, loader: DataLoader) -> Iterator[Any]:
        others = set(multiprocessing.active_children())
        results = iter(loader)
        self._processes |= set(multiprocessing.active_children()) - others
        return results

    def _with_buffers(self, plans: Iterator[BatchPlan]) -> Iterator[Job]:
        if self._buffers is not None:
            # What an earlier pass left undone is over once the first plan is asked for.
            self._buffers.release_all()
        for plan in plans:
            yield plan, None if self._buffers is None else self._buffers.reserve()

    def close(self) -> None:
        """Ends the worker processes. One that waits for a disk that does not answer ends by itself, when that does."""
        for process in self._processes:
            process.terminate()
        end = time.monotonic() + SECONDS_TO_END
        for process in self._processes:
            process.join(max(end - time.monotonic(), 0))
        if any(process.is_alive() for process in self._processes):
            _stuck.append(self._loader)
        self._loader = None


def _buffer_size(dataset: CocoDataset, batch_size: int) -> int:
    sizes = dataset.num_bytes(slice(None))
    pixels = batch_size * int(min(sizes.max(), LARGEST_BUFFER * sizes.mean()))
    return pixels * MASKS_BUFFER if dataset.has_masks else pixels


def worker_context() -> str | None:
    # A forked worker has the annotations at once and shares their pages; it never touches a GPU. With annotations of
    # COCO's size four are ready in 0.2 s and hold 9 MB each of their own; a fork server's take 5 s and 79 MB each.
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def start_worker(worker_id: int, main_pid: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group, and so do the SIGHUP of a closed terminal and the SIGTERM of torchrun or a
    # batch system. The main process decides what becomes of the run, and may still want batches: only its own SIGTERM
    # counts here.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_main_process, args=(main_pid,), daemon=True, name="end").start()


def _end_with_main_process(main_pid: int) -> None:
    # torch's worker loop looks after its parent too, but takes for it whoever that is when the loop begins: killed
    # before that, the main process would leave a worker that waits for ever.
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, ORPHAN_CHECK_SECONDS)
        if os.getppid() != main_pid or (received is not None and received.si_pid == main_pid):
            os._exit(0)
