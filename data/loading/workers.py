"""Worker processes that carry out plans, one set of them for a whole run."""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.images.decode import ImageError
from data.loading.batch import RawBatch
from data.loading.dataset import CocoDataset
from data.loading.read_batch import BatchPlan, BatchReader, OnUnreadable
from data.loading.shared_buffers import SharedBuffers
from data.loading.transport import LoadFailure, MainSide, Reply, Request, WorkerSide

PLANS_AHEAD_PER_WORKER = 2
"""One that a worker is at, and one that waits, decoded, for its turn."""

BATCHES_IN_USE = 3
"""Decoded batches beyond those that workers are at: one being assembled, one before and one after it."""

ORPHAN_CHECK_SECONDS = 2.0
"""How often a worker looks whether the main process is still there."""

LARGEST_BUFFER = 4.0
"""A buffer holds a batch of the largest images, but no more than so many times a batch of average ones: a few huge
images shall not make every buffer huge, and take a slower way instead."""


class _Plans(Sampler[BatchPlan | Request]):
    """The plans that the DataLoader is to work off next; set before each pass."""

    def __init__(self) -> None:
        self.upcoming: Iterator[BatchPlan | Request] = iter(())

    def __iter__(self) -> Iterator[BatchPlan | Request]:
        return self.upcoming


class WorkerPool:
    """One DataLoader, and so one set of worker processes, for as many passes as are wanted."""

    def __init__(
        self,
        dataset: CocoDataset,
        batch_size: int,
        workers: int,
        pin: bool,
        on_unreadable: OnUnreadable,
        max_faults: int = 0,
    ) -> None:
        self._plans = _Plans()
        self._pin = pin
        reader = BatchReader(dataset, on_unreadable, max_faults)
        self._hand_over: MainSide | None = None
        worker_side: Dataset = reader
        if workers > 0 and _worker_context() == "fork":
            buffers = SharedBuffers(
                workers * PLANS_AHEAD_PER_WORKER + BATCHES_IN_USE, _buffer_size(dataset, batch_size)
            )
            self._hand_over, worker_side = MainSide(buffers), WorkerSide(reader, buffers)
        # A generator of its own: a DataLoader draws from the global one at each pass otherwise.
        self._loader: DataLoader | None = DataLoader(
            worker_side,
            batch_size=None,
            sampler=self._plans,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=PLANS_AHEAD_PER_WORKER if workers > 0 else None,
            worker_init_fn=functools.partial(_start_worker, main_pid=os.getpid()),
            multiprocessing_context=_worker_context() if workers > 0 else None,
            generator=torch.Generator(),
        )

    def run(self, plans: Iterator[BatchPlan]) -> Iterator[RawBatch]:
        if self._loader is None:
            raise RuntimeError("The loader is closed.")
        self._plans.upcoming = plans if self._hand_over is None else self._hand_over.requests(plans)
        for result in self._loader:
            if isinstance(result, LoadFailure):
                raise ImageError(result.message)
            batch = result
            if isinstance(result, Reply):
                assert self._hand_over is not None
                batch = self._hand_over.batch(result)
            # Pinned here and not by the DataLoader, whose thread would have to know the buffers: a copy of 0.1 ms an
            # image, after which the buffer is free.
            yield batch.pin_memory() if self._pin else batch

    def close(self) -> None:
        # The workers end with the loader's iterator.
        self._loader = None


def _buffer_size(dataset: CocoDataset, batch_size: int) -> int:
    sizes = dataset.num_bytes(slice(None))
    return batch_size * int(min(sizes.max(), LARGEST_BUFFER * sizes.mean()))


def _worker_context() -> str | None:
    # A forked worker has the annotations at once and shares their pages; it never touches a GPU.
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def _start_worker(worker_id: int, main_pid: int) -> None:
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
