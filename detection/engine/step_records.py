"""What each iteration reported, read from the device in one go every few iterations."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detection.engine.distributed import Processes

LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox")
_COLUMNS = ("loss", *LOSSES, "grad_norm")


class NonFiniteLoss(ValueError):
    """A loss or the gradient became NaN or infinite. The message says where and gives advice."""


class StepRecords:
    """Holds the losses of recent iterations on the device until `read` fetches them all with one synchronisation."""

    def __init__(self, processes: Processes, *, images_per_iteration: int, gradient_may_overflow: bool) -> None:
        """
        Args:
            images_per_iteration: global batch size.
            gradient_may_overflow: float16 with a loss scale: a gradient that is not finite is the scaler's business.
        """
        self._processes = processes
        self._images_per_iteration = images_per_iteration
        self._gradient_may_overflow = gradient_may_overflow
        self._values: list[Tensor] = []
        self._facts: list[dict[str, Any]] = []
        self._image_ids: list[list[int]] = []
        self._since = time.perf_counter()

    def __len__(self) -> int:
        return len(self._facts)

    def restart_clock(self) -> None:
        """Leave out what happened since the last read (a validation, say) from images per second."""
        self._since = time.perf_counter()

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor, image_ids: Sequence[int], **facts: float | int) -> None:
        """Note one iteration.

        Args:
            losses: the four losses of this process, scalars on the device.
            grad_norm: scalar on the device.
            image_ids: images of this process in this iteration.
            facts: epoch, iteration, lr, data_seconds.
        """
        parts = [losses[name].detach().float() for name in LOSSES]
        self._values.append(torch.stack([sum(parts, start=torch.zeros_like(parts[0])), *parts, grad_norm.float()]))
        self._facts.append({"kind": "train", **facts})
        self._image_ids.append(list(image_ids))

    def read(self) -> list[dict[str, Any]]:
        """The records since the last read, losses averaged over the processes; every process must call it.

        Raises:
            NonFiniteLoss: on every process, where a loss of any of them is not finite.
        """
        if not self._facts:
            return []
        values = torch.stack(self._values)
        rows = self._processes.mean(values).tolist()
        now = time.perf_counter()
        rate = len(rows) * self._images_per_iteration / max(now - self._since, 1e-9)
        records = []
        for facts, row in zip(self._facts, rows, strict=True):
            record = {**facts, **dict(zip(_COLUMNS, row, strict=True)), "images_per_second": rate}
            if self._processes.device.type == "cuda":
                record["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            records.append(record)
        checked = len(_COLUMNS) - 1 if self._gradient_may_overflow else len(_COLUMNS)
        bad = next((i for i, row in enumerate(rows) if not all(map(math.isfinite, row[:checked]))), None)
        if bad is not None:
            raise NonFiniteLoss(self._explain(bad, values[bad].tolist()))
        self._values, self._facts, self._image_ids, self._since = [], [], [], now
        return records

    def _explain(self, index: int, mine: list[float]) -> str:
        bad = [f"{name} = {value}" for name, value in zip(_COLUMNS, mine, strict=True) if not math.isfinite(value)]
        reports = self._processes.gather_objects((bad, self._image_ids[index]))
        facts = self._facts[index]
        lines = [
            f"iteration {facts['iteration']} (epoch {facts['epoch'] + 1}, learning rate {facts['lr']:.6g}): "
            "the training is no longer finite"
        ]
        lines += [
            f"  process {rank}: {', '.join(bad)}; image ids {ids}" for rank, (bad, ids) in enumerate(reports) if bad
        ]
        lines.append(
            "No checkpoint was written after it. Lower --lr (or give --auto-scale-lr: the schedule's learning rate is "
            "meant for its own batch size), add --clip-grad 35, or use --amp bf16 instead of fp16; then --resume."
        )
        return "\n".join(lines)
