"""The gradients of a model in a few pieces of memory, averaged over the processes piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from detection.engine.distributed.comm import PendingSum, Processes

BUCKET_BYTES = 25 * 2**20
"""From this size on a bucket is full; the default of PyTorch's DistributedDataParallel."""


@dataclass
class _Bucket:
    """Some parameters, and memory for their gradients: float32 [length], and a view of it for each."""

    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    num_missing: int = 0
    """How many of its gradients the backward pass under way has not computed yet."""

    def strays(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters whose `grad` is not their view, with the view."""
        return [(p, view) for p, view in zip(self.parameters, self.views, strict=True) if p.grad is not view]

    def collect(self) -> None:
        """Make every `grad` a view of the bucket, with the value that it has."""
        strays = self.strays()
        # A parameter that took no part in the loss has gradient zero.
        gradients = [torch.zeros_like(view) if p.grad is None else p.grad for p, view in strays]
        if strays:
            torch._foreach_copy_([view for _, view in strays], gradients)
        for parameter, view in strays:
            parameter.grad = view


class GradientBuckets:
    """Averages the gradients of a global batch over the processes, while the backward pass runs.

    What is added in which order depends on a gradient's place in its bucket. DistributedDataParallel forms new buckets
    after the first iteration of each process, so that with three or more processes a resumed training rounds otherwise
    than one that was never stopped. Here the places depend on the parameters alone.

    `stay` is for CUDA graphs: the gradients never leave the buckets, and nothing is sent before `finish`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        processes: Processes,
        *,
        stay: bool = False,
        in_rank_order: bool = False,
    ) -> None:
        """
        Args:
            parameters: float32, in the order of the model; their gradients are computed in about the reverse order.
            in_rank_order: add up in the order of the ranks, whatever the network and its library would choose. Sends
                as much, but half of it after the backward pass.
        """
        self._parameters = list(parameters)
        self._processes = processes
        self._stay = stay
        self._in_rank_order = in_rank_order
        self._is_last_pass = False
        self._sums: list[PendingSum] = []
        several = processes.world_size > 1
        self._buckets = _fill_buckets(self._parameters[::-1], processes.world_size) if several or stay else []
        if stay:
            for bucket in self._buckets:
                bucket.collect()
        elif several:
            for bucket in self._buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(partial(self._count, bucket))

    def zero(self) -> None:
        """Before an iteration's first backward pass."""
        if self._stay:
            torch._foreach_zero_([bucket.flat for bucket in self._buckets])
        else:
            for parameter in self._parameters:
                parameter.grad = None

    def send_in_backward(self) -> None:
        """The next backward pass is the iteration's last: it sends each bucket as soon as that is full."""
        self._is_last_pass = True
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.parameters)

    def finish(self) -> None:
        """After an iteration's last backward pass: make every parameter's `grad` the mean over the processes."""
        self._is_last_pass = False
        if self._processes.world_size > 1:
            with self._processes.waiting("the gradients of every process"):
                while len(self._sums) < len(self._buckets):
                    self._send_next()
                for pending in self._sums:
                    pending.wait()
        self._sums.clear()

    def check(self) -> None:
        """RuntimeError: a gradient that stays was replaced, so that what graphs compute does not reach it any more."""
        if self._stay and any(bucket.strays() for bucket in self._buckets):
            raise RuntimeError("a parameter's gradient was replaced, but CUDA graphs write to the one before")

    def _count(self, bucket: _Bucket, _: Tensor) -> None:
        if not self._is_last_pass:
            return
        bucket.num_missing -= 1
        # In one order on every process, in whatever order gradients come.
        while len(self._sums) < len(self._buckets) and self._buckets[len(self._sums)].num_missing == 0:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[len(self._sums)]
        bucket.collect()
        bucket.flat /= self._processes.world_size
        self._sums.append(self._processes.all_reduce_sum_async(bucket.flat, in_rank_order=self._in_rank_order))


def _fill_buckets(parameters: list[nn.Parameter], world_size: int) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    kept: list[nn.Parameter] = []
    starts = [0]
    for place, parameter in enumerate(parameters, 1):
        kept.append(parameter)
        # Each begins at a multiple of 16 bytes, for operators that take four numbers at a time.
        starts.append(starts[-1] + -(-parameter.numel() // 4) * 4)
        if 4 * starts[-1] >= BUCKET_BYTES or place == len(parameters):
            # Of one length for every process that adds up a part of it.
            flat = torch.zeros(-(-starts[-1] // world_size) * world_size, device=parameter.device)
            # As the parameter lies in memory, which fused optimizers rely on.
            views = [torch.as_strided(flat, p.shape, p.stride(), start) for p, start in zip(kept, starts, strict=False)]
            buckets.append(_Bucket(kept, flat, views))
            kept, starts = [], [0]
    return buckets
