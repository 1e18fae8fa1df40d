"""Batches that all processes have, or none of them takes: so a run can stop in the wait for data."""

from __future__ import annotations

from collections.abc import Iterator

from data import DeviceBatch, DevicePrefetcher, RawBatch
from detection.engine.distributed.comm import PendingMax, Processes
from detection.engine.distributed.signals import Interrupted, Stopped, StopRequest


class AgreedBatches(DevicePrefetcher):
    """This process's batches of a training. Each is handed out once every process has its own.

    A process that is asked to stop gives up its wait for data. Had the others begun with their batches meanwhile, they
    would wait for it in the exchange of gradients. As it is, all of them stop before the same batch.
    """

    def __init__(self, batches: Iterator[RawBatch], processes: Processes, stop: StopRequest) -> None:
        super().__init__(batches, processes.device)
        self._processes = processes
        self._stop = stop
        self._stop_wanted: PendingMax | None = None

    def __next__(self) -> DeviceBatch:
        """
        Raises:
            Stopped: on every process, where one of them was asked to stop before it had this batch.
        """
        self.fetch()
        assert self._stop_wanted is not None
        if self._stop_wanted.result():
            raise Stopped
        batch = super().__next__()
        self._stop_wanted = None
        return batch

    def fetch(self) -> None:
        """Wait for the next batch, and tell the others when it is there, or when there is a request to stop instead.

        On a GPU this happens while it computes the batch before, so that nobody waits for the answer.
        """
        if self._stop_wanted is not None:
            return
        wish = 0
        try:
            with self._stop.interrupting():
                super().fetch()
        except Interrupted:
            wish = 1
        self._stop_wanted = self._processes.all_reduce_max_async(wish)
