"""The figures of a training: collected on the device, read every few iterations, written and watched."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from data import DevicePrefetcher, TrainLoader
from detection.engine.distributed.comm import Processes
from detection.engine.inputs.bad_images import BadImages
from detection.engine.inputs.data_stall import DataAdvice, DataStallWatch
from detection.engine.metrics.logger import MetricLogger
from detection.engine.metrics.step_metrics import NonFiniteLoss, StepMetrics


class TrainingLog:
    """Writes what iterations report. Every process calls it alike: reading the figures is collective."""

    def __init__(
        self,
        processes: Processes,
        loader: TrainLoader,
        metrics: StepMetrics,
        metric_logger: MetricLogger,
        bad_images: BadImages,
        *,
        log_interval: int,
    ) -> None:
        """
        Args:
            log_interval: iterations between two readings; the first iteration and ends of epochs are read too.
        """
        self.metrics = metrics
        self.logger = metric_logger
        self._processes = processes
        self._loader = loader
        self._bad_images = bad_images
        self._log_interval = log_interval
        self._data_stall: DataStallWatch | None = None

    def training_bar(self, batches: DevicePrefetcher, total: int, initial: int) -> AbstractContextManager[None]:
        """Show the progress while inside, and watch how long the training waits for `batches`."""
        self.metrics.take_idle_seconds = batches.take_idle_seconds
        self._data_stall = DataStallWatch(
            self._loader.global_batch_size,
            lambda: DataAdvice.of(self._loader, self._processes).text(batches.load_times),
        )
        self.metrics.restart_clock()
        return self.logger.training_bar(total, initial)

    def reads_after(self, iterations_done: int) -> bool:
        """Whether the figures are read after `iterations_done` iterations."""
        per_epoch = self._loader.iterations_per_epoch
        return iterations_done == 1 or 0 in (iterations_done % self._log_interval, iterations_done % per_epoch)

    def is_at_interval(self, iterations_done: int) -> bool:
        return iterations_done % self._log_interval == 0

    def write(self) -> None:
        """Read and write the figures since the last time.

        Raises:
            NonFiniteLoss, TooManyBadImages: on every process.
        """
        try:
            records = self.metrics.read()
        except NonFiniteLoss as error:
            self.logger.train(error.records)
            raise
        self.logger.train(records)
        self._warn_of(records)
        if any("replaced_images" in record for record in records):
            self._bad_images.agree("train", self.metrics.unreadable)

    def _warn_of(self, records: list[dict[str, Any]]) -> None:
        waited = self._data_stall.note(records) if self._data_stall is not None else None
        if self._processes.is_main:
            for line in [*self.metrics.warnings, *([waited] if waited is not None else [])]:
                self.logger.warn(line)
