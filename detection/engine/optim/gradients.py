"""The gradients of one iteration: forward and backward passes of its micro-steps, averaged over the processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from data import DevicePrefetcher, UnreadableImage
from detection.engine.accelerate.cuda_graphs import StepGraphs
from detection.engine.distributed.comm import Processes, without_gradient_exchange
from detection.engine.optim.amp import Precision
from detection.engine.optim.flat_gradients import FlatGradients
from detection.engine.optim.nonfinite import KeepEveryStep
from detection.models import ImageBatch, TargetBatch

Losses = dict[str, Tensor]


@dataclass
class FedBatches:
    """What an iteration was fed on this process, and its losses."""

    losses: Losses = field(default_factory=dict)
    """Means over the micro-steps, detached scalars on the device."""
    image_ids: list[int] = field(default_factory=list)
    unreadable: list[UnreadableImage] = field(default_factory=list)
    data_seconds: float = 0.0
    """How long the process waited for the batches."""


class GradientComputer:
    """Leaves in every parameter's `grad` the gradient of the mean loss of a global batch.

    Without graphs DistributedDataParallel averages the gradients while the last micro-step's backward pass runs. With
    graphs the passes are replayed, which must find the gradients where they were: they stay in one tensor, and one
    exchange averages it.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        precision: Precision,
        processes: Processes,
        guard: KeepEveryStep,
        *,
        accumulate: int,
        graphs: StepGraphs | None = None,
    ) -> None:
        """
        Args:
            model: the detector, wrapped for the run's processes; with `graphs` the detector itself.
            accumulate: micro-steps of an iteration, one batch each.
            graphs: captures and replays the forward and backward passes.
        """
        self.model = model
        self.accumulate = accumulate
        self._precision = precision
        self._processes = processes
        self._guard = guard
        self._run = self._forward_backward
        self._zero: Callable[[], None] = partial(_drop_gradients, parameters)
        self._average: Callable[[], None] = lambda: None
        if graphs is not None:
            flat = FlatGradients(parameters)
            self._run = partial(graphs.run, self._forward_backward)
            self._zero, self._average = flat.zero, partial(flat.average, processes)

    def compute(self, batches: DevicePrefetcher) -> FedBatches:
        """Take an iteration's batches and leave their gradients in the parameters."""
        self._zero()
        self._guard.begin()
        fed = FedBatches()
        for micro_step in range(self.accumulate):
            batch = next(batches)
            fed.data_seconds += batches.data_seconds
            images = ImageBatch(batch.pixels, batch.sizes)
            targets = TargetBatch(batch.boxes_xyxy, batch.labels, batch.valid, batch.sample_keys)
            is_last = micro_step == self.accumulate - 1
            # Only the last backward pass talks to the other processes.
            with (
                self._processes.waiting("the gradients of every process")
                if is_last
                else without_gradient_exchange(self.model)
            ):
                losses = self._run(images, targets)
            fed.losses = {name: fed.losses[name] + value for name, value in losses.items()} if fed.losses else losses
            fed.image_ids += batch.image_ids.tolist()
            fed.unreadable += batch.unreadable
            # Load the next batch while the device computes this one.
            batches.prepare()
        self._average()
        return fed

    def _forward_backward(self, images: ImageBatch, targets: TargetBatch) -> Losses:
        """Gradients of one micro-step; its share of the iteration's losses, detached."""
        with self._precision.autocast():
            losses = self.model(images, targets)
        shares = {name: value / self.accumulate for name, value in losses.items()}
        self._precision.backward(self._guard.mark(torch.stack(list(shares.values())).sum()))
        return {name: value.detach() for name, value in shares.items()}


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
