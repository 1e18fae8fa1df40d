"""Whether the training waits for its data, and what might help."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data import LoadTimes, TrainLoader, resized_sizes
from detection.engine.distributed.comm import Processes

TOLERATED_SHARE = 0.1
WARMUP_ITERATIONS = 20
"""Workers start, caches fill and kernels are chosen in these."""
WINDOW_ITERATIONS = 50
WINDOW_SECONDS = 30.0
"""A window has both, so that neither one slow image nor a run that is over in a minute brings a warning."""
MINUTES_BETWEEN_WARNINGS = 60.0

_SPARE_PIXELS = 2.0
"""Stored images with more than this times the pixels that the detector sees are worth making smaller."""
_DISK_SHARE = 0.5
"""Of the time of loading: a process that computes for less of it waits for something else."""


class DataStallWatch:
    """Follows "idle_share" in the records of a training, and speaks up where it is too much."""

    def __init__(self, images_per_iteration: int, advice: Callable[[], str]) -> None:
        """
        Args:
            images_per_iteration: global batch size.
            advice: what to do, asked for only when it is needed.
        """
        self._images_per_iteration = images_per_iteration
        self._advice = advice
        self._seen = 0
        self._last_warning: float | None = None
        self._begin_window()

    def note(self, records: Sequence[dict[str, Any]]) -> str | None:
        """Take in the records of iterations just done; a warning where the training waits too much."""
        for record in records:
            self._seen += 1
            if self._seen <= WARMUP_ITERATIONS:
                continue
            seconds = self._images_per_iteration / record["images_per_second"]
            self._iterations += 1
            self._seconds += seconds
            self._idle += seconds * record["idle_share"]
        if self._iterations < WINDOW_ITERATIONS or self._seconds < WINDOW_SECONDS:
            return None
        share, seconds = self._idle / self._seconds, self._seconds
        self._begin_window()
        if share <= TOLERATED_SHARE or self._was_said_lately():
            return None
        self._last_warning = time.monotonic()
        return f"the training has waited for data for {share:.0%} of the last {seconds:.0f} s. {self._advice()}"

    def _begin_window(self) -> None:
        self._iterations, self._seconds, self._idle = 0, 0.0, 0.0

    def _was_said_lately(self) -> bool:
        if self._last_warning is None:
            return False
        return time.monotonic() - self._last_warning < MINUTES_BETWEEN_WARNINGS * 60


@dataclass(frozen=True)
class DataAdvice:
    """What might help a training that waits for its data."""

    num_workers: int
    """Of this process"""
    num_cores: int
    """For this process and its workers"""
    stored_megapixels: float
    """Of an average image"""
    seen_megapixels: float
    """The same, as the detector sees it"""
    has_simplejpeg: bool

    @classmethod
    def of(cls, loader: TrainLoader, processes: Processes) -> DataAdvice:
        """The facts of a run that the advice rests on."""
        dataset = loader.dataset
        seen = resized_sizes(dataset.widths, dataset.heights, min_size=loader.min_size, max_size=loader.max_size)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(
            num_workers=loader.num_workers,
            num_cores=max(1, cores // processes.local_world_size),
            stored_megapixels=float(np.mean(dataset.widths * dataset.heights) / 1e6),
            seen_megapixels=float(np.mean(seen.prod(axis=1)) / 1e6),
            has_simplejpeg=importlib.util.find_spec("simplejpeg") is not None,
        )

    def text(self, times: LoadTimes) -> str:
        """In words; `times` is what loading took so far."""
        who = "a worker" if self.num_workers else "the training's own process"
        images = max(times.num_images, 1)
        milliseconds, computing = (value / images * 1e3 for value in (times.seconds, times.cpu_seconds))
        facts = (
            f"Loading an image takes {who} {milliseconds:.1f} ms, {computing:.1f} ms of them computing; "
            f"workers: {self.num_workers}, CPU cores: {self.num_cores} a process."
        )
        remedies = []
        waits_for_disk = times.cpu_seconds < _DISK_SHARE * times.seconds
        if waits_for_disk:
            remedies.append("it mostly waits: put the images on a faster disk, or leave more cores free")
        if waits_for_disk or self.num_workers < self.num_cores:
            more = max(2 * self.num_workers, 4) if waits_for_disk else self.num_cores
            remedies.append(f"more workers (--workers {more})")
        if not self.has_simplejpeg:
            remedies.append("a faster decoder (pip install simplejpeg; the pixels are the same)")
        if self.stored_megapixels > _SPARE_PIXELS * self.seen_megapixels:
            remedies.append(
                f"smaller copies of the images and their annotations: they have {self.stored_megapixels:.1f} "
                f"megapixels on average, of which the detector is shown {self.seen_megapixels:.1f}"
            )
        if not remedies:
            remedies.append("more CPU cores a GPU: every core already decodes")
        return f"{facts} What helps: {'; '.join(remedies)}."
