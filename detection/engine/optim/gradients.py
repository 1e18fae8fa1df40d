"""The gradients of one iteration: forward and backward passes of its micro-steps, averaged over the processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from data import DevicePrefetcher, UnreadableImage
from detection.engine.accelerate.algorithm_search import AlgorithmSearch
from detection.engine.accelerate.cuda_graphs import StepGraphs
from detection.engine.distributed.signals import Stopped
from detection.engine.optim.amp import Precision
from detection.engine.optim.gradient_buckets import GradientBuckets
from detection.engine.optim.nonfinite import NonFiniteGuard
from detection.models import ImageBatch, MaskBatch, TargetBatch

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
    """Leaves in every parameter's `grad` the gradient of the mean loss of a global batch."""

    def __init__(
        self,
        model: nn.Module,
        buckets: GradientBuckets,
        precision: Precision,
        guard: NonFiniteGuard,
        *,
        accumulate: int,
        graphs: StepGraphs | None = None,
        search: AlgorithmSearch | None = None,
    ) -> None:
        """
        Args:
            buckets: averages the gradients of the model's trained parameters; with `graphs` they stay there.
            accumulate: micro-steps of an iteration, one batch each.
            graphs: captures and replays the forward and backward passes.
            search: finds the fastest algorithms of their convolutions.
        """
        self.model = model
        self.accumulate = accumulate
        self._buckets = buckets
        self._precision = precision
        self._guard = guard
        self._run = self._forward_backward if search is None else partial(search.run, self._forward_backward)
        if graphs is not None:
            self._run = partial(graphs.run, self._run)

    def compute(self, batches: DevicePrefetcher) -> FedBatches:
        """Take an iteration's batches and leave their gradients in the parameters.

        Raises:
            Stopped: on every process; nothing of the iteration is left.
        """
        self._buckets.zero()
        self._guard.begin()
        fed = FedBatches()
        for micro_step in range(self.accumulate):
            try:
                batch = next(batches)
            except Stopped:
                self._guard.undo()
                raise
            fed.data_seconds += batches.data_seconds
            images = ImageBatch(batch.pixels, batch.sizes)
            masks = None if batch.masks is None else MaskBatch(*batch.masks)
            targets = TargetBatch(batch.boxes_xyxy, batch.labels, batch.valid, batch.sample_keys, masks)
            if micro_step == self.accumulate - 1:
                self._buckets.send_in_backward()
            losses = self._run(images, targets)
            fed.losses = {name: fed.losses[name] + value for name, value in losses.items()} if fed.losses else losses
            fed.image_ids += batch.image_ids.tolist()
            fed.unreadable += batch.unreadable
            # Load the next batch while the device computes this one.
            batches.prepare()
        self._buckets.finish()
        return fed

    def check(self) -> None:
        """RuntimeError: the gradients are no longer where graphs leave them."""
        self._buckets.check()

    def _forward_backward(self, images: ImageBatch, targets: TargetBatch) -> Losses:
        """Gradients of one micro-step; its share of the iteration's losses, detached."""
        with self._precision.autocast():
            losses = self.model(images, targets)
        shares = {name: value / self.accumulate for name, value in losses.items()}
        self._precision.backward(self._guard.mark(torch.stack(list(shares.values())).sum()))
        return {name: value.detach() for name, value in shares.items()}
