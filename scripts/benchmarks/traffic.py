"""Bytes and FLOPs of a training step on a GPU, by stage, counted without one, and the time that they need there."""

from __future__ import annotations

import argparse
import collections
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import checkout  # noqa: F401
from benchmarks.machine import add_common_arguments
from benchmarks.timing import BenchmarkError, format_table
from benchmarks.variants import ASSIGNMENT, BACKWARD, BOX_HEAD, FEATURES, LOSSES, PROPOSALS, ROI_ALIGN, RPN_HEAD
from detection.models import FasterRCNN, ImageBatch, TargetBatch, backbones, build_model, faster_rcnn, rpn
from detection.models.ops import conv, matcher, nms, roi_align
from gpu_checks.fake_device import is_supported, move, pretend_gpu

_STAGES = (FEATURES, RPN_HEAD, PROPOSALS, ASSIGNMENT, ROI_ALIGN, BOX_HEAD, LOSSES, BACKWARD)
# They make no pass over memory.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "device", "_unsafe_view"}
_ONLY_WRITE = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "arange"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=1)
    parser.add_argument("--model", default="faster_rcnn_r50_fpn", help="[faster_rcnn_r50_fpn]")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step [16]")
    parser.add_argument("--height", type=int, default=800, help="[800]")
    parser.add_argument("--width", type=int, default=1344, help="[1344]")
    parser.add_argument("--boxes", type=int, default=40, help="rows of ground truth an image, padding included [40]")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of the GPU's memory, TB/s [3.35: H100 SXM]")
    parser.add_argument("--rate", type=float, default=600, help="of large products, TFLOP/s [600]")


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the table. Nothing is timed: bytes and FLOPs are counts, times arithmetic."""
    if not is_supported():
        raise BenchmarkError(f"traffic needs a newer PyTorch than {torch.__version__}")
    found = {kind: _count(arguments, kind == "kernels", say) for kind in ("operators", "kernels")}
    table = []
    for stage in (*_STAGES, None):
        cells = [stage or "whole step"]
        for traffic in found.values():
            of_stage = sum((row for name, row in traffic.items() if stage in (None, name)), Traffic())
            cells += [str(of_stage.calls), f"{of_stage.gigabytes:.1f}", f"{of_stage.teraflops:.2f}"]
            cells += [f"{of_stage.milliseconds:.1f}"]
        table.append(cells)
    headers = ["stage"]
    for kind in ("operators", "with Triton"):
        headers += [f"{kind}: calls", "GB", "TFLOP", "ms"]
    counts = {kind: {stage: vars(row) for stage, row in traffic.items()} for kind, traffic in found.items()}
    text = (
        f"{arguments.batch_size} images of {arguments.height}x{arguments.width}, bfloat16, uncompiled. Every operator "
        f"reads its inputs and writes its outputs once at {arguments.bandwidth:g} TB/s, or computes at "
        f"{arguments.rate:g} TFLOP/s."
    )
    return {"device": "cpu", "traffic": counts}, f"{text}\n\n{format_table(headers, table)}"


@dataclass
class Traffic:
    """Operator calls that move data, what they move and compute, and the time for it."""

    calls: int = 0
    gigabytes: float = 0.0
    teraflops: float = 0.0
    milliseconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.calls + other.calls,
            self.gigabytes + other.gigabytes,
            self.teraflops + other.teraflops,
            self.milliseconds + other.milliseconds,
        )


class TrafficCounter(TorchDispatchMode):
    """Counts by stage; `stage` is that of the moment. What lies in caches from one operator to the next counts too."""

    def __init__(self, bandwidth: float, rate: float) -> None:
        super().__init__()
        self.stage = LOSSES
        self.found: dict[str, Traffic] = collections.defaultdict(Traffic)
        self._bandwidth, self._rate = bandwidth, rate

    def add(self, num_bytes: int, flops: int = 0) -> None:
        """One more call."""
        gigabytes, teraflops = num_bytes / 1e9, flops / 1e12
        seconds = max(gigabytes / 1e3 / self._bandwidth, teraflops / self._rate)
        self.found[self.stage] += Traffic(1, gigabytes, teraflops, seconds * 1e3)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        if func.is_view or name in _FREE or func.namespace == "prim":
            return result
        read = 0 if name in _ONLY_WRITE else _bytes_of((args, kwargs))
        if name == "copy_":
            read = _bytes_of(args[1:])
        flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result) if packet in flop_registry else 0
        self.add(read + _bytes_of(result), flops)
        if name == "convolution" and args[2] is not None:
            # On a GPU PyTorch adds the bias in a pass of its own.
            self.add(2 * _bytes_of(result))
        return result

    @contextlib.contextmanager
    def of(self, owner: Any, name: str, stage: str) -> Iterator[None]:
        """Calls of the owner's attribute count for the stage."""
        call = getattr(owner, name)

        def staged(*args: Any, **kwargs: Any) -> Any:
            before, self.stage = self.stage, stage
            try:
                return call(*args, **kwargs)
            finally:
                self.stage = before

        with mock.patch.object(owner, name, staged):
            yield


def _bytes_of(values: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _count(arguments: argparse.Namespace, with_kernels: bool, say: Callable[[str], None]) -> dict[str, Traffic]:
    say(f"counting {'with' if with_kernels else 'without'} Triton's kernels")
    device, mode = pretend_gpu()
    counter = TrafficCounter(arguments.bandwidth, arguments.rate)
    with mode, contextlib.ExitStack() as stack:
        model = build_model(arguments.model).train()
        move(model, device)
        images, targets = _batch(arguments, device)
        for owner, name, stage in _places(model):
            stack.enter_context(counter.of(owner, name, stage))
        # Its operator has a fake of its own, which the counter would not look into.
        stack.enter_context(mock.patch.object(rpn, "suppress_within_levels", nms.suppress))
        # Whether the rounds have settled is nothing that shapes could tell.
        stack.enter_context(mock.patch.object(nms, "_rounds_until_settled", _first_rounds))
        for patch in _kernels(counter) if with_kernels else ():
            stack.enter_context(patch)
        with counter:
            with torch.autocast(device.type, torch.bfloat16):
                losses = model(images, targets)
            counter.stage = BACKWARD
            torch.stack(list(losses.values())).sum().backward()
    return dict(counter.found)


def _batch(arguments: argparse.Namespace, device: torch.device) -> tuple[ImageBatch, TargetBatch]:
    number, boxes = arguments.batch_size, arguments.boxes
    pixels = torch.empty((number, 3, arguments.height, arguments.width), dtype=torch.uint8, device=device)
    images = ImageBatch(
        pixels.contiguous(memory_format=torch.channels_last),
        torch.empty((number, 2), dtype=torch.int64, device=device),
    )
    targets = TargetBatch(
        torch.empty((number, boxes, 4), device=device),
        torch.empty((number, boxes), dtype=torch.int64, device=device),
        torch.empty((number, boxes), dtype=torch.bool, device=device),
        torch.empty(number, dtype=torch.int64, device=device),
    )
    return images, targets


def _places(model: FasterRCNN) -> list[tuple[Any, str, str]]:
    return [
        (model, "extract_features", FEATURES),
        (model.rpn, "forward", RPN_HEAD),
        (model.rpn, "at_anchors", RPN_HEAD),
        (faster_rcnn, "cell_table", RPN_HEAD),
        (faster_rcnn, "take_rows", RPN_HEAD),
        (faster_rcnn, "select_proposals", PROPOSALS),
        (faster_rcnn, "anchor_targets", ASSIGNMENT),
        (faster_rcnn, "sample_rois", ASSIGNMENT),
        (model, "_pool", ROI_ALIGN),
        (model.roi_head, "forward", BOX_HEAD),
    ]


def _first_rounds(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    return nms._rounds_of_all(boxes, valid, threshold, nms.ROUNDS)[0]


class _PooledFromTable(torch.autograd.Function):
    """The shapes, and the backward pass's passes over memory, of the kernel's own function."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, num_rois: int, size: int) -> Tensor:
        ctx.shape, ctx.dtype = table.shape, table.dtype
        return table.new_empty((num_rois, table.shape[1], size, size))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.new_zeros(ctx.shape, dtype=torch.float32).to(ctx.dtype), None, None


class _Finished(torch.autograd.Function):
    """As much as the kernels for the ends of convolutions read and write."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, count: Any) -> Tensor:
        ctx.mark_dirty(out)
        ctx.relu, ctx.count, ctx.has_residual = relu, count, residual is not None
        ctx.bias_shape = None if bias is None else bias.shape
        count(_bytes_of((out, out, bias, residual)))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_input = torch.empty_like(gradient) if ctx.relu else gradient
        ctx.count(_bytes_of((gradient, gradient, of_input) if ctx.relu else gradient))
        of_bias = gradient.new_empty(ctx.bias_shape, dtype=torch.float32) if ctx.bias_shape is not None else None
        return of_input, of_bias, of_input if ctx.has_residual else None, None, None


def _kernels(counter: TrafficCounter) -> Iterator[Any]:
    """Stand-ins for the kernels that count what these read and write; of RoIAlign the table once, whatever its bins."""

    def finished(
        x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Any = (1, 1), padding: Any = (0, 0), groups: int = 1,
        relu: bool = False, residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.nn.functional.conv2d(x, weight, None, tuple(stride), tuple(padding), 1, groups)
        if not relu and bias is None and residual is None:
            return out
        result: Tensor = _Finished.apply(out, bias, residual, relu, counter.add)
        return result

    def keep_best(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
        groups, number = valid.shape
        bits = groups * number * number // 8
        counter.add(_bytes_of((boxes, valid)) + bits)
        counter.add(bits + 2 * _bytes_of(valid))
        return torch.empty_like(valid)

    def best_matches(
        self: matcher.MaxIoUAssigner, gt_boxes: Tensor, gt_valid: Tensor, candidates: Tensor, usable: Tensor | None
    ) -> matcher.Matches:
        shape = (len(gt_boxes), candidates.shape[1])
        best_iou = torch.empty(shape, device=candidates.device)
        best_index = torch.empty(shape, dtype=torch.int64, device=candidates.device)
        counter.add(_bytes_of((candidates, usable, best_iou, best_index)))
        if self.low_quality_iou is None:
            return matcher.Matches(best_iou, best_index, None)
        counter.add(_bytes_of((candidates, usable, best_index)))
        return matcher.Matches(best_iou, best_index, torch.empty_like(best_index))

    def pool(
        self: roi_align.RoIAlign, features: Any, boxes: Tensor, levels: Tensor, table: Tensor | None = None
    ) -> Tensor:
        assert table is not None
        pooled = _PooledFromTable.apply(table, levels.numel(), self.output_size)
        counter.add(_bytes_of((table, pooled)))
        return pooled

    for module in (conv, backbones, rpn):
        yield mock.patch.object(module, "convolution", finished)
    yield mock.patch.object(nms, "_rounds_until_settled", keep_best)
    yield mock.patch.object(matcher.MaxIoUAssigner, "best_in_blocks", best_matches)
    yield mock.patch.object(roi_align.RoIAlign, "__call__", pool)
