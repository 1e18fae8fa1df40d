"""Bytes and FLOPs of a training step on a GPU, by stage, counted without one, and the time that they need there."""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import checkout  # noqa: F401
from benchmarks.figures import BenchmarkError, Say, add_common_arguments, format_table
from benchmarks.profilers import BACKWARD, LOSSES, OUR_FUNCTIONS, REST, STAGES
from detection.models import FasterRCNN, ImageBatch, MaskBatch, TargetBatch, build_model, model_config
from detection.models.ops import nms
from detection.models.ops.backend import TRITON, implementation
from detection.models.postprocess import select_detections
from gpu_checks.fake_device import is_supported, move, pretend_gpu
from gpu_checks.generated_code import GeneratedCode, Kernel, pretended_h100

_STAGE_OF: dict[CodeType, str] = {
    inspect.unwrap(function).__code__: stage for stage, some in OUR_FUNCTIONS.items() for function in some
} | {FasterRCNN.forward.__code__: LOSSES, inspect.unwrap(FasterRCNN.fixed_outputs).__code__: REST}
# They make no pass over memory.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "device", "_unsafe_view"}
_ONLY_WRITE = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "arange"}


def _keep_best(*arguments: Any) -> Tensor:
    from detection.models.ops.triton.nms import keep_best

    return keep_best(*arguments)


_OPERATORS = {"suppress_within_levels": nms.suppress, "keep_best": _keep_best}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=1)
    parser.add_argument("--model", default="faster_rcnn_r50_fpn", help="[faster_rcnn_r50_fpn]")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step [16]")
    parser.add_argument("--height", type=int, default=800, help="[800]")
    parser.add_argument("--width", type=int, default=1344, help="[1344]")
    parser.add_argument("--inference", action="store_true", help="a detection in place of the training step")
    parser.add_argument("--boxes", type=int, default=40, help="rows of ground truth an image, padding included [40]")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of the GPU's memory, TB/s [3.35: H100 SXM]")
    parser.add_argument("--rate", type=float, default=600, help="of large products, TFLOP/s [600]")
    parser.add_argument(
        "--compiled", action="store_true", help="the step with --compile instead: kernels generated for an H100"
    )
    parser.add_argument("--code", type=Path, metavar="FILE", help="with --compiled: keep the generated code there")


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the table. Nothing is timed: bytes and FLOPs are counts, times arithmetic."""
    if not is_supported():
        raise BenchmarkError(f"traffic needs a newer PyTorch than {torch.__version__}")
    if arguments.compiled:
        return _run_compiled(arguments, say)
    found, headers = {}, ["stage"]
    for kind, title in (("operators", "operators"), ("kernels", "with Triton")):
        say(f"counting {title}")
        found[kind], _ = _count(arguments, kind == "kernels")
        headers += [f"{title}: calls", "GB", "TFLOP", "ms"]
    stages = [stage for stage in STAGES if any(stage in traffic for traffic in found.values())]
    rows = []
    for stage in (*stages, "whole step"):
        cells = [stage]
        for traffic in found.values():
            chosen = traffic.values() if stage == "whole step" else [traffic[stage]]
            calls, *amounts = (sum(column) for column in zip(*map(astuple, chosen), strict=True))
            cells += [str(calls), *(f"{amount:.{digits}f}" for amount, digits in zip(amounts, (1, 2, 1), strict=True))]
        rows.append(cells)
    text = (
        f"{arguments.batch_size} images of {arguments.height}x{arguments.width}, bfloat16, uncompiled. Every operator "
        f"reads its inputs and writes its outputs once at {arguments.bandwidth:g} TB/s, or computes at "
        f"{arguments.rate:g} TFLOP/s.\n\n{format_table(headers, rows)}"
    )
    if arguments.inference:
        text += (
            "\n\nCUDA graphs replay all of this in one launch. After it come, as written, "
            f"{_calls_of_selection(arguments.model)} calls an image that select its detections."
        )
    counts = {kind: {stage: vars(row) for stage, row in traffic.items()} for kind, traffic in found.items()}
    return {"device": "cpu", "traffic": counts}, text


def _calls_of_selection(name: str) -> int:
    """Calls for an image with a thousand candidates, of which one in ten is above the threshold in its class."""
    config = model_config(name).stages[-1]
    num_rois, classes = config.rpn_proposals_test, config.num_classes
    logits = torch.zeros(num_rois, classes + 1)
    logits[::10, 0] = 9.0
    corners = torch.arange(num_rois)[:, None] % 50 * 10.0
    boxes = torch.cat((corners, corners, corners + 30, corners + 30), dim=1)
    counter = TrafficCounter(1, 1)
    with counter:
        select_detections(
            config,
            logits,
            torch.zeros(num_rois, classes, 4),
            boxes[None],
            torch.ones(1, num_rois, dtype=torch.bool),
            torch.tensor([[800, 800]]),
        )
    return sum(row.calls for row in counter.found.values())


def _run_compiled(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The same of a step whose dense parts are compiled, as code for an H100 that is not there."""
    parts: dict[str, tuple[Traffic, Traffic]] = collections.defaultdict(lambda: (Traffic(), Traffic()))

    def count(kernels: Sequence[Kernel]) -> None:
        for kernel in kernels:
            place = f"{kernel.stage}, {'backward' if kernel.is_backward else 'forward'}"
            row = parts[place][kernel.is_product]
            row.calls += 1
            row.gigabytes += kernel.num_bytes / 1e9

    say("compiling for an H100, which takes minutes")
    with pretended_h100():
        rest, code = _count(arguments, True, count)
    if arguments.code is not None:
        arguments.code.write_text("\n".join(code))
    nothing = Traffic()
    parts |= {f"{stage}, uncompiled": (row, nothing) for stage, row in rest.items()}
    whole = {}
    for title, some in (
        ("compiled parts", [kinds for place, kinds in parts.items() if not place.endswith("uncompiled")]),
        ("forward and backward pass", list(parts.values())),
    ):
        whole[title] = tuple(
            Traffic(sum(row.calls for row in column), sum(row.gigabytes for row in column))
            for column in zip(*some, strict=True)
        )
    table = format_table(
        ["part", "passes: launches", "GB", "products: launches", "GB"],
        [
            [place, *(cell for row in kinds for cell in (str(row.calls), f"{row.gigabytes:.2f}"))]
            for place, kinds in (*parts.items(), *whole.items())
        ],
    )
    text = (
        f"{arguments.batch_size} images of {arguments.height}x{arguments.width}, bfloat16, compiled for an H100. Every "
        f"kernel reads its inputs and writes its outputs once.\n\n{table}"
    )
    figures = {
        place: {kind: vars(row) for kind, row in zip(("passes", "products"), kinds, strict=True)}
        for place, kinds in (*parts.items(), *whole.items())
    }
    return {"device": "cpu", "traffic": figures}, text


@dataclass
class Traffic:
    """Operator calls that move data, what they move and compute, and the time for it."""

    calls: int = 0
    gigabytes: float = 0.0
    teraflops: float = 0.0
    milliseconds: float = 0.0


class TrafficCounter(TorchDispatchMode):
    """Counts by stage, which the Python frames above an operator tell: the backward pass has none of its own.

    What lies in caches from one operator to the next counts too.
    """

    def __init__(self, bandwidth: float, rate: float) -> None:
        super().__init__()
        self.found: dict[str, Traffic] = collections.defaultdict(Traffic)
        self.stage: str | None = None
        """Of what comes next, where no frame tells it"""
        self._bandwidth, self._rate = bandwidth, rate

    def call(self, stage: str, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Counts a function as part of the stage."""
        self.stage = stage
        with contextlib.nullcontext() if _get_current_dispatch_mode() is self else self:
            function(*arguments)
        self.stage = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def add(self, num_bytes: int, flops: int = 0) -> None:
        """One more call."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code not in _STAGE_OF:
            frame = frame.f_back
        row = self.found[self.stage or (BACKWARD if frame is None else _STAGE_OF[frame.f_code])]
        row.calls += 1
        row.gigabytes += num_bytes / 1e9
        row.teraflops += flops / 1e12
        row.milliseconds += 1e3 * max(num_bytes / 1e12 / self._bandwidth, flops / 1e12 / self._rate)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func._overloadpacket
        name = packet.__name__
        if name in _OPERATORS:
            with self:  # its operator has a fake of its own, which would hide what it consists of
                return _OPERATORS[name](*args)
        if name in ("is_nonzero", "item", "_local_scalar_dense"):
            return True  # the rounds of suppression have settled at first; nothing else asks
        result = func(*args, **(kwargs or {}))
        if func.is_view or name in _FREE or func.namespace == "prim":
            return result
        read = 0 if name in _ONLY_WRITE else bytes_of(args[1:] if name == "copy_" else (args, kwargs))
        flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result) if packet in flop_registry else 0
        self.add(read + bytes_of(result), flops)
        if name == "convolution":
            result = result.contiguous(memory_format=torch.channels_last)  # as cuDNN's results of such inputs are
            if args[2] is not None:
                self.add(2 * bytes_of(result))  # on a GPU PyTorch adds the bias in a pass of its own
        return result


def bytes_of(values: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _count(
    arguments: argparse.Namespace, with_kernels: bool, count: Callable[[Sequence[Kernel]], None] | None = None
) -> tuple[dict[str, Traffic], list[str]]:
    """What runs uncompiled, by stage. count: of a step that is compiled, called with generated kernels; their code."""
    # The compiler folds constants, which no tensor on a pretended GPU is good for.
    device, mode = pretend_gpu() if count is None else (torch.device("cpu"), FakeTensorMode())
    counter = TrafficCounter(arguments.bandwidth, arguments.rate)
    number, boxes = arguments.batch_size, arguments.boxes
    with mode, _kernels(counter) if with_kernels else contextlib.nullcontext():
        model = build_model(arguments.model).train()
        move(model, device)
        code = None if count is None else GeneratedCode(count, counter.call)
        if code is not None:
            model.fixed_shapes = True
            model.glue.compile(code.compiled)
            for name, part in model.dense_parts:
                code.compile(part, name)
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
            MaskBatch(
                torch.empty(number * boxes * 64 * 64, dtype=torch.uint8, device=device),
                torch.empty((number, boxes), dtype=torch.int64, device=device),
                torch.empty((number, boxes, 4), dtype=torch.int64, device=device),
            ),
        )
        with counter:
            with torch.autocast(device.type, torch.bfloat16):
                outputs = model.eval().fixed_outputs(images) if arguments.inference else model(images, targets)
            if not arguments.inference:
                torch.stack(list(outputs.values())).sum().backward()
    return dict(counter.found), [] if code is None else code.source


class _PooledFromTable(torch.autograd.Function):
    """The shapes, and the backward pass's passes over memory, of the kernel's own function."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, num_rois: int, size: int, gradient_sum: Callable[[], Tensor] | None) -> Tensor:
        ctx.shape, ctx.dtype, ctx.gradient_sum = table.shape, table.dtype, gradient_sum
        return table.new_empty((num_rois, table.shape[1], size, size))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient_sum is not None:
            ctx.gradient_sum()
            return None, None, None, None
        return gradient.new_zeros(ctx.shape, dtype=torch.float32).to(ctx.dtype), None, None, None


class _Finished(torch.autograd.Function):
    """As much as the kernels for the ends of convolutions read and write."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, count: Any) -> Tensor:
        ctx.mark_dirty(out)
        ctx.relu, ctx.count, ctx.has_residual = relu, count, residual is not None
        ctx.bias_shape = None if bias is None else bias.shape
        count(bytes_of((out, out, bias, residual)))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_input = torch.empty_like(gradient) if ctx.relu else gradient
        ctx.count(bytes_of((gradient, gradient, of_input) if ctx.relu else gradient))
        of_bias = gradient.new_empty(ctx.bias_shape, dtype=torch.float32) if ctx.bias_shape is not None else None
        return of_input, of_bias, of_input if ctx.has_residual else None, None, None


@contextlib.contextmanager
def _kernels(counter: TrafficCounter) -> Iterator[None]:
    """Stand-ins for the kernels that count what these read and write; of RoIAlign the table once, whatever its bins."""

    def finish_convolution(out: Tensor, bias: Tensor | None, residual: Tensor | None, *, relu: bool) -> Tensor:
        result: Tensor = _Finished.apply(out, bias, residual, relu, counter.add)
        return result

    def keep_best(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
        groups, number = valid.shape
        bits = groups * number * number // 8
        counter.add(bytes_of((boxes, valid)) + bits)
        counter.add(bits + 2 * bytes_of(valid))
        return torch.empty_like(valid)

    def best_matches(
        gt_boxes: Tensor, gt_valid: Tensor, candidates: Tensor, usable: Tensor | None, low_quality_iou: float | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        best_iou = torch.empty((len(gt_boxes), candidates.shape[1]), device=candidates.device)
        best_index = torch.empty_like(best_iou, dtype=torch.int64)
        counter.add(bytes_of((candidates, usable, best_iou, best_index)))
        if low_quality_iou is None:
            return best_iou, best_index, None
        counter.add(bytes_of((candidates, usable, best_index)))
        return best_iou, best_index, torch.empty_like(best_index)

    def pool_from_table(
        table: Tensor, *geometry: Any, output_size: int, gradient_sum: Callable[[], Tensor] | None, **settings: Any
    ) -> Tensor:
        levels = geometry[-1]
        pooled: Tensor = _PooledFromTable.apply(table, levels.numel(), output_size, gradient_sum)
        counter.add(bytes_of((table, pooled)))
        return pooled

    def crop_bitmaps(boxes: Tensor, bits: Tensor, *_: Any, size: int, aligned: bool) -> Tensor:
        covered = torch.empty((len(boxes), size, size), device=boxes.device)
        counter.add(bytes_of((bits, boxes, covered)))
        return covered

    modules = {
        f"detection.models.ops.triton.{name}": SimpleNamespace(**{function.__name__: function})
        for name, function in (
            ("epilogue", finish_convolution),
            ("nms", keep_best),
            ("matcher", best_matches),
            ("roi_align", pool_from_table),
            ("mask_crops", crop_bitmaps),
        )
    }
    with mock.patch.dict(sys.modules, modules), implementation(**TRITON):
        yield
