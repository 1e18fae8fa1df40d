"""What each iteration reported, read from the device in one go every few iterations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data import UnreadableImage
from detection.engine.distributed.comm import Processes
from detection.errors import DetectionError

MOST_SKIPPED_IN_A_ROW = 100
"""Iterations. A run that learns nothing for as long as that is over, also with --skip-nonfinite. A loss scale that
begins at 2**16 finds one that fits in a quarter of them."""


@dataclass(frozen=True)
class BadStep:
    """The iteration that a run ended with because it was not finite."""

    iteration: int
    ranks: tuple[int, ...]
    """The processes whose losses were not finite; all of them where only the exchanged gradient was not."""
    steps_missed: int
    """Iterations since then, itself counted: none of them changed the model."""


class NonFiniteLoss(DetectionError):
    """A loss or the gradient became NaN or infinite. The message says where; `records` lead up to it."""

    def __init__(self, message: str, step: BadStep, records: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.records = list(records)


class StepMetrics:
    """Holds the losses of recent iterations on the device until `read` fetches them all with one synchronization."""

    def __init__(
        self,
        processes: Processes,
        *,
        images_per_iteration: int,
        gradient_may_overflow: bool,
        skips_nonfinite: bool = False,
    ) -> None:
        """
        Args:
            images_per_iteration: global batch size.
            gradient_may_overflow: float16 with a loss scale: a gradient that is not finite is the scaler's business.
            skips_nonfinite: iterations that are not finite made no step; they are counted and do not end the run.
        """
        self._processes = processes
        self._images_per_iteration = images_per_iteration
        self._gradient_may_overflow = gradient_may_overflow
        self._skips_nonfinite = skips_nonfinite
        self.skipped_steps = 0
        """Iterations without a step since the run began; the same on every process."""
        self.warnings: list[str] = []
        """Lines for the console, of the latest read."""
        self.unreadable: list[UnreadableImage] = []
        """This process's images that could not be used, of the latest read."""
        self.take_idle_seconds: Callable[[], float] = lambda: 0.0
        """How long this process's device has waited for data since the last call, see DevicePrefetcher."""
        self._skipped_in_a_row = 0
        self._figures: tuple[str, ...] = ()
        self._values: list[Tensor] = []
        self._facts: list[dict[str, Any]] = []
        self._image_ids: list[list[int]] = []
        self._unreadable: list[UnreadableImage] = []
        self._since = time.perf_counter()

    def __len__(self) -> int:
        return len(self._facts)

    def restart_clock(self) -> None:
        """Leave out what happened since the last read (a validation, say) from images per second."""
        self._since = time.perf_counter()

    def add(
        self,
        losses: dict[str, Tensor],
        grad_norm: Tensor,
        image_ids: Sequence[int],
        unreadable: Sequence[UnreadableImage] = (),
        **facts: float | int,
    ) -> None:
        """Note one iteration.

        Args:
            losses: this process's, scalars on the device; the same names in every iteration.
            grad_norm: scalar on the device.
            image_ids: images of this process in this iteration.
            unreadable: images of this process that could not be used.
            facts: epoch, iteration, lr, data_seconds.
        """
        self._figures = ("loss", *losses, "grad_norm")
        parts = [value.detach().float() for value in losses.values()]
        total = sum(parts, start=torch.zeros_like(parts[0]))
        # full_like, unlike a tensor made from a number, copies nothing to a GPU.
        replaced = torch.full_like(total, sum(fault.place is not None for fault in unreadable))
        self._values.append(torch.stack([total, *parts, grad_norm.float(), replaced]))
        self._facts.append({"kind": "train", **facts})
        self._image_ids.append(list(image_ids))
        self._unreadable += unreadable

    def read(self) -> list[dict[str, Any]]:
        """The records since the last read, losses averaged over the processes; every process must call it.

        "idle_share" is the part of the time since then in which a device waited for a batch. It is that of the process
        that waited longest: the others wait for it when gradients are exchanged.

        A record has "replaced_images" where images of its iteration could not be used, and with skips_nonfinite
        "skipped_steps", the count so far.

        Raises:
            NonFiniteLoss: on every process, where a loss of any of them is not finite, or too many in a row made no
                step (with float16 also for a gradient that overflows at every loss scale).
        """
        self.warnings, self.unreadable = [], []
        if not self._facts:
            return []
        values = torch.stack(self._values)
        # A column of its own for each process's wait: the mean over the processes tells them all apart.
        idle = values.new_zeros(len(values), self._processes.world_size)
        idle[:, self._processes.rank] = self.take_idle_seconds()
        # On a GPU the exchange is only begun by `mean`: its end is waited for here.
        exchanged = self._processes.mean(torch.cat([values, idle], dim=1))
        with self._processes.waiting("the losses of every process"):
            means = exchanged.tolist()
        now = time.perf_counter()
        rows = [row[: values.shape[1]] for row in means]
        idle_seconds = max(means[0][values.shape[1] :]) * self._processes.world_size
        idle_share = min(idle_seconds / max(now - self._since, 1e-9), 1.0)
        rate = len(rows) * self._images_per_iteration / max(now - self._since, 1e-9)
        checked = len(self._figures) - 1 if self._gradient_may_overflow else len(self._figures)
        records, bad = [], []
        for place, (facts, (*row, replaced)) in enumerate(zip(self._facts, rows, strict=True)):
            record = {**facts, **dict(zip(self._figures, row, strict=True)), "images_per_second": rate}
            record["idle_share"] = idle_share
            if self._processes.device.type == "cuda":
                record["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            if replaced > 0:
                record["replaced_images"] = round(replaced * self._processes.world_size)
            is_bad = not all(map(math.isfinite, row[:checked]))
            if is_bad:
                bad.append(place)
            # With float16 the gradient is not among what is checked, and such an iteration makes no step either.
            self._skipped_in_a_row = 0 if all(map(math.isfinite, row)) else self._skipped_in_a_row + 1
            if self._skips_nonfinite:
                self.skipped_steps += is_bad
                record["skipped_steps"] = self.skipped_steps
            records.append(record)
            if is_bad and not self._skips_nonfinite:
                break
        if bad and not self._skips_nonfinite:
            report, step = self._report(bad[0], values)
            raise NonFiniteLoss(f"the training is no longer finite: {report}", step, records)
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            words = f"{MOST_SKIPPED_IN_A_ROW} iterations in a row were not finite and made no step, the last:"
            report, step = self._report(len(records) - 1, values)
            raise NonFiniteLoss(f"{words}\n{report}", step, records)
        if bad:
            self.warnings = [f"step skipped ({self.skipped_steps} so far): {self._report(bad[-1], values)[0]}"]
        self.unreadable = self._unreadable
        self._values, self._facts, self._image_ids, self._unreadable, self._since = [], [], [], [], now
        return records

    def _report(self, place: int, values: Tensor) -> tuple[str, BadStep]:
        """Which iteration it is and what each process saw, the same on every process."""
        *losses, grad_norm = values[place].tolist()[: len(self._figures)]
        bad = [
            f"{name} = {value}" for name, value in zip(self._figures, losses, strict=False) if not math.isfinite(value)
        ]
        parts = self._processes.gather_objects((bad, self._image_ids[place]))
        facts = self._facts[place]
        lines = [
            f"iteration {facts['iteration']} (epoch {facts['epoch'] + 1}, learning rate {facts['lr']:.6g}, "
            f"grad_norm {grad_norm:.6g}; iterations count from 0) is not finite"
        ]
        # Through the exchanged gradients one loss spoils those of all: only the process that had it is named.
        ranks = tuple(rank for rank, (found, _) in enumerate(parts) if found) or tuple(range(len(parts)))
        for rank in ranks:
            found, image_ids = parts[rank]
            lines.append(f"  process {rank}: {', '.join(found) or 'losses are finite'}; image ids {image_ids}")
        return "\n".join(lines), BadStep(facts["iteration"], ranks, steps_missed=len(self._facts) - place)
