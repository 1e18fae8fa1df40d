"""What follows a convolution in one pass over its output: bias, residual, ReLU; and their gradients in one pass too.

PyTorch adds the bias of a convolution on a GPU in a pass of its own, which for bfloat16 maps takes as long as a fast
convolution, and ReLU, a residual and the sum that is the bias's gradient are more of them. Reference and fallback: the
same written out, in `detection.models.ops.conv`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of a program's tile
_CHANNELS = 128  # of it, at most
# Programs that each sum up rows for the bias's gradient; their sums are added up after.
MOST_SUMS = 528


@triton.jit(do_not_specialize=["num_rows"])
def finish(
    out, bias, residual, num_rows, num_channels,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out [rows, C] becomes relu(out + bias [C] + residual [rows, C]), rounded once."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row.to(tl.int64)[:, None] * num_channels + channel[None, :]
    inside = (row < num_rows)[:, None] & (channel < num_channels)[None, :]
    value = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + channel, mask=channel < num_channels, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        # Not the larger one of two: a value that is not a number stays one.
        value = tl.where(value < 0.0, 0.0, value)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "rows_of_program"])
def finish_backward(
    gradient, out, of_input, sums, num_rows, num_channels, rows_of_program,
    RELU: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """of_input [rows, C]: the gradient [rows, C] where out is above zero (RELU); sums [programs, C]: its sums over the
    rows of each program (SUM)."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < num_channels
    first = tl.program_id(0) * rows_of_program
    total = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(0, rows_of_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * num_channels + channel[None, :]
        inside = (row < num_rows)[:, None] & is_channel[None, :]
        value = tl.load(gradient + place, mask=inside, other=0.0)
        if RELU:
            value = tl.where(tl.load(out + place, mask=inside, other=0.0) > 0, value, 0.0)
            tl.store(of_input + place, value, mask=inside)
        if SUM:
            total += tl.sum(value.to(tl.float32), axis=0)
    if SUM:
        tl.store(sums + tl.program_id(0).to(tl.int64) * num_channels + channel, total, mask=is_channel)


def finish_convolution(out: Tensor, bias: Tensor | None, residual: Tensor | None, *, relu: bool) -> Tensor:
    """relu(out + bias + residual), as far as they are given and asked for, in the memory of `out`.

    out, residual: [B, C, H, W], channels last, of one dtype (the residual is brought to it). bias: [C].
    """
    if residual is not None:
        residual = residual.to(out.dtype, memory_format=torch.channels_last)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (out, bias, residual)):
        return _Finish.apply(out, bias, residual, relu)
    return _finish(out, bias, residual, relu=relu)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
        ctx.mark_dirty(out)
        _finish(out, bias, residual, relu=relu)
        ctx.relu, ctx.bias_dtype = relu, None if bias is None else bias.dtype
        ctx.save_for_backward(out if relu else None)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sums_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
        of_input, of_bias = _finish_backward(gradient, out, sums=sums_bias)
        return (
            of_input if ctx.needs_input_grad[0] else None,
            of_bias.to(ctx.bias_dtype) if of_bias is not None else None,
            of_input if ctx.needs_input_grad[2] else None,
            None,
        )


def _finish(out: Tensor, bias: Tensor | None, residual: Tensor | None, *, relu: bool) -> Tensor:
    num_rows, num_channels, channels, rows = _tiles(out)
    programs = (triton.cdiv(num_rows, rows), triton.cdiv(num_channels, channels))
    with torch.cuda.device_of(out):
        finish[programs](
            out, bias, residual, num_rows, num_channels,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, RELU=relu, ROWS=rows, CHANNELS=channels,
        )  # fmt: skip
    return out


def _finish_backward(gradient: Tensor, out: Tensor | None, *, sums: bool) -> tuple[Tensor, Tensor | None]:
    if out is None and not sums:
        return gradient, None
    num_rows, num_channels, channels, rows = _tiles(gradient)
    blocks = triton.cdiv(num_rows, rows)
    blocks_of_program = triton.cdiv(blocks, MOST_SUMS) if sums else 1
    num_programs = triton.cdiv(blocks, blocks_of_program)
    of_input = torch.empty_like(gradient) if out is not None else gradient
    totals = gradient.new_empty((num_programs, num_channels), dtype=torch.float32) if sums else None
    with torch.cuda.device_of(gradient):
        finish_backward[(num_programs, triton.cdiv(num_channels, channels))](
            gradient, out, of_input, totals, num_rows, num_channels, blocks_of_program * rows,
            RELU=out is not None, SUM=sums, ROWS=rows, CHANNELS=channels,
        )  # fmt: skip
    return of_input, totals.sum(dim=0) if totals is not None else None


def _tiles(maps: Tensor) -> tuple[int, int, int, int]:
    """Cells and channels of maps [B, C, H, W], and how many channels and cells a tile has."""
    num_images, num_channels, height, width = maps.shape
    channels = min(_CHANNELS, triton.next_power_of_2(num_channels))
    return num_images * height * width, num_channels, channels, _ELEMENTS // channels
