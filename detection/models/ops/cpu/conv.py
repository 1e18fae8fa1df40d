"""Convolutions that take less time on the CPU than torch's own, with the same results.

They want channels-last memory, where a map [B, C, H, W] is a matrix [B * H * W, C] of cells. Elsewhere than on the CPU,
and inside torch.compile, they are plain convolutions: on a GPU the numbers of rows that the sparse one works with would
have to be waited for, and the compiler fuses what the other one fuses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from detection.models.ops.cpu import winograd as cpu_winograd

# Above this share of cells with a gradient (or beside one), gathering them costs more than the zeros do.
_LARGEST_SHARE = 0.7
# Windows of 3x3 cells that are gathered at a time: 10 MB for 256 channels in bfloat16, which stays in a cache.
_WINDOWS_AT_ONCE = 2048
# The operator that torch.compile takes on the CPU; PyTorch offers it under no public name, and builds without oneDNN
# (macOS on ARM) do not have it.
_IS_FUSED_KERNEL_BUILT = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding), then ReLU if that is asked for.

    One pass over the output instead of two; the gradient of a 1x1 weight is a matrix product; and large 3x3 ones in
    bfloat16 take fewer products.
    """
    if not (_applies(x) and _has_fused_kernel(x)):
        out = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), 1, groups)
        return F.relu_(out) if relu else out
    x, weight, bias = _in_autocasts_precision(x, weight, bias)
    fused: Tensor = _FusedConvolution.apply(x, weight, bias, list(stride), list(padding), groups, relu)
    return fused


def convolution_with_sparse_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding="same"), `weight` 1x1 or 3x3, where few cells of the output are learned from.

    The 3x3 convolution of the feature pyramid's finest map takes a tenth of a step's products, and its gradient is zero
    but in the sampled RoIs. Cells that have no gradient, or no neighbor with one, are left out of the backward pass.
    """
    padding = [weight.shape[-1] // 2] * 2
    if not (torch.is_grad_enabled() and weight.requires_grad and _applies(x)):
        if _applies(x) and cpu_winograd.pays(x, weight, [1, 1], padding, 1):
            return convolution(x, weight, bias, padding=padding)
        return F.conv2d(x, weight, bias, padding=padding)
    out: Tensor = _SparseGradientConvolution.apply(*_in_autocasts_precision(x, weight, bias))
    return out


def _applies(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _has_fused_kernel(x: Tensor) -> bool:
    if not _IS_FUSED_KERNEL_BUILT:
        return False
    dtype = _precision(x)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _precision(x: Tensor) -> torch.dtype:
    # Autocast looks into torch's own operators only.
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _in_autocasts_precision(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = _precision(x)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _as_rows(maps: Tensor) -> Tensor:
    """[B, C, H, W] as [B * H * W, C]: the same memory where it is channels-last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _as_maps(rows: Tensor, like: Tensor) -> Tensor:
    num_images, _, height, width = like.shape
    return rows.view(num_images, height, width, -1).permute(0, 3, 1, 2)


def _dense_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, as far as they are wanted."""
    of_x, of_weight, of_bias = wanted
    if cpu_winograd.pays(x, weight, stride, padding, groups) and _has_fused_kernel(x):
        return cpu_winograd.gradients(gradient, x, cpu_winograd.transformed(weight), wanted)
    is_product = weight.shape[2:] == (1, 1) and not any(padding) and groups == 1
    by_convolution = [of_x, of_weight and not is_product, of_bias and not is_product]
    x_gradient = weight_gradient = bias_gradient = None
    if any(by_convolution):
        x_gradient, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            gradient, x, weight, [len(weight)], stride, padding, [1, 1], False, [0, 0], groups, by_convolution
        )
    rows = _as_rows(gradient)
    if of_weight and is_product:
        weight_gradient = (rows.t() @ _as_rows(x[:, :, :: stride[0], :: stride[1]]))[:, :, None, None]
    if of_bias and is_product:
        bias_gradient = _sum_of_rows(rows)
    return x_gradient, weight_gradient, bias_gradient


def _sum_of_rows(rows: Tensor) -> Tensor:
    # A product of bfloat16 adds up in float32 as sum() does, and takes a third of its time.
    return (rows.new_ones(1, len(rows)) @ rows)[0]


class _FusedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        groups: int,
        relu: bool,
    ) -> Tensor:
        if cpu_winograd.pays(x, weight, stride, padding, groups):
            out = cpu_winograd.convolve(x, cpu_winograd.transformed(weight), bias)
            out = out.relu_() if relu else out
        else:
            activation = "relu" if relu else "none"
            out = torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, padding, stride, [1, 1], groups, activation, [], ""
            )
        ctx.save_for_backward(x, weight, out if relu else None)
        ctx.places = stride, padding, groups
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        if out is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
        stride, padding, groups = ctx.places
        found = _dense_backward(gradient, x, weight, stride, padding, groups, ctx.needs_input_grad[:3])
        return *found, None, None, None, None


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **out: Any) -> int:
    images, channels, height, width = out["out_shape"]
    return 2 * images * channels * height * width * math.prod(weight[1:])


if _IS_FUSED_KERNEL_BUILT:
    register_flop_formula(torch.ops.mkldnn._convolution_pointwise)(_flops)


class _SparseGradientConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        padding = [weight.shape[-1] // 2] * 2
        if cpu_winograd.pays(x, weight, [1, 1], padding, 1) and _has_fused_kernel(x):
            return cpu_winograd.convolve(x, cpu_winograd.transformed(weight), bias)
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        num_outputs, num_inputs, side, _ = weight.shape
        num_images, _, height, width = gradient.shape
        gradient_rows = _as_rows(gradient)
        # Not "> 0": a gradient that is not a number must go on.
        learned = gradient_rows.abs().sum(dim=1) != 0
        maps = learned.view(num_images, 1, height, width).float()
        reached = F.max_pool2d(maps, kernel_size=side, stride=1, padding=side // 2).view(-1).nonzero()[:, 0]
        if len(reached) > _LARGEST_SHARE * len(gradient_rows):
            padding = [side // 2, side // 2]
            return _dense_backward(gradient, x, weight, [1, 1], padding, 1, ctx.needs_input_grad)
        x_gradient = weight_gradient = bias_gradient = None
        cells = learned.nonzero()[:, 0]
        if of_weight:
            x_rows = _as_rows(x)
            sums = torch.promote_types(weight.dtype, torch.float32)
            total = torch.zeros(num_outputs, side * side * num_inputs, dtype=sums)
            for some in cells.split(_WINDOWS_AT_ONCE):
                total += gradient_rows.index_select(0, some).t() @ _windows(x_rows, some, height, width, side)
            by_place = total.to(weight.dtype).view(num_outputs, side, side, num_inputs)
            weight_gradient = by_place.permute(0, 3, 1, 2)
        if of_bias:
            bias_gradient = _sum_of_rows(gradient_rows.index_select(0, cells))
        if of_x:
            mirrored = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, num_inputs)
            rows = gradient_rows.new_zeros(len(gradient_rows), num_inputs)
            for some in reached.split(_WINDOWS_AT_ONCE):
                rows.index_copy_(0, some, _windows(gradient_rows, some, height, width, side) @ mirrored)
            x_gradient = _as_maps(rows, x)
        return x_gradient, weight_gradient, bias_gradient


def _windows(rows: Tensor, cells: Tensor, height: int, width: int, side: int) -> Tensor:
    """The side x side windows around `cells` int64 [N] in maps of height x width given as rows [M, C]:
    [N, side * side * C]."""
    if side == 1:
        return rows.index_select(0, cells)
    place = torch.arange(side * side)
    down, right = place // side - side // 2, place % side - side // 2
    x = cells[:, None] % width + right
    y = (cells[:, None] // width) % height + down
    outside = ((x < 0) | (x >= width) | (y < 0) | (y >= height)).view(-1)
    neighbors = (cells[:, None] + down * width + right).view(-1)
    windows = rows.index_select(0, neighbors.clamp_(0, len(rows) - 1))
    # Few: those of the cells at the border.
    windows.index_fill_(0, outside.nonzero()[:, 0], 0)
    return windows.view(len(cells), side * side * rows.shape[1])
