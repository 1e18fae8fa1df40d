"""The feature pyramid's convolutions on the CPU, without backward work for cells that have no gradient.

They want channels-last memory, where a map [B, C, H, W] is a matrix [B * H * W, C] of cells. On a GPU the host would
have to wait for the numbers of rows that they work with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this share of cells with a gradient (or beside one), gathering them costs more than the zeros do.
_LARGEST_SHARE = 0.7
# Windows of 3x3 cells that are gathered at a time: 10 MB for 256 channels in bfloat16, which stays in a cache.
WINDOWS_AT_ONCE = 2048


def convolution_with_sparse_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding="same"), `weight` 1x1 or 3x3, where few cells of the output are learned from.

    The 3x3 convolution of the feature pyramid's finest map takes a tenth of a step's products, and its gradient is zero
    but in the sampled RoIs. Cells that have no gradient, or no neighbor with one, are left out of the backward pass.
    """
    is_trained = torch.is_grad_enabled() and weight.requires_grad
    if not (is_trained and x.is_contiguous(memory_format=torch.channels_last)):
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    # Autocast looks into torch's own operators only.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    bias = None if bias is None else bias.to(dtype)
    out: Tensor = _SparseGradientConvolution.apply(x.to(dtype), weight.to(dtype), bias)
    return out


def _as_rows(maps: Tensor) -> Tensor:
    """[B, C, H, W] as [B * H * W, C]: the same memory where it is channels-last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


class _SparseGradientConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

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
            found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
                gradient, x, weight, [num_outputs], [1, 1], padding, [1, 1], False, [0, 0], 1, ctx.needs_input_grad
            )
            return found
        x_gradient = weight_gradient = bias_gradient = None
        cells = learned.nonzero()[:, 0]
        if of_weight:
            x_rows = _as_rows(x)
            sums = torch.promote_types(weight.dtype, torch.float32)
            total = torch.zeros(num_outputs, side * side * num_inputs, dtype=sums)
            for some in cells.split(WINDOWS_AT_ONCE):
                total += gradient_rows.index_select(0, some).t() @ _windows(x_rows, some, height, width, side)
            by_place = total.to(weight.dtype).view(num_outputs, side, side, num_inputs)
            weight_gradient = by_place.permute(0, 3, 1, 2)
        if of_bias:
            bias_gradient = gradient_rows.index_select(0, cells).sum(dim=0)
        if of_x:
            mirrored = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, num_inputs)
            rows = gradient_rows.new_zeros(len(gradient_rows), num_inputs)
            for some in reached.split(WINDOWS_AT_ONCE):
                rows.index_copy_(0, some, _windows(gradient_rows, some, height, width, side) @ mirrored)
            x_gradient = rows.view(num_images, height, width, num_inputs).permute(0, 3, 1, 2)
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
