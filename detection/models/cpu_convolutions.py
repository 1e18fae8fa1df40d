"""A convolution whose backward pass takes less time on the CPU than torch's own, with the same results.

It wants channels-last memory, where a map [B, C, H, W] is a matrix [B * H * W, C] of cells. Elsewhere than on the CPU,
and inside torch.compile, it is a plain convolution: on a GPU the numbers of rows that it works with would have to be
waited for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this share of cells with a gradient (or beside one), gathering them costs more than the zeros do.
_LARGEST_SHARE = 0.7


def convolution_3x3_with_sparse_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) for a 3x3 `weight`, where few cells of the output are learnt from.

    The feature pyramid's finest map takes a tenth of a step's products, and its gradient is zero but in the sampled
    RoIs. Cells that have no gradient, or no neighbour with one, are left out of the backward pass.
    """
    if not _applies(x, weight):
        return F.conv2d(x, weight, bias, padding=1)
    return _SparseGradientConvolution.apply(*_in_autocasts_precision(x, weight, bias))


def _applies(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and weight.requires_grad
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _in_autocasts_precision(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    # Autocast looks into torch's own operators only.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _as_rows(maps: Tensor) -> Tensor:
    """[B, C, H, W] as [B * H * W, C]: the same memory where it is channels-last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _as_maps(rows: Tensor, like: Tensor) -> Tensor:
    num_images, _, height, width = like.shape
    return rows.view(num_images, height, width, -1).permute(0, 3, 1, 2)


def _dense_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )


class _SparseGradientConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        num_outputs, num_inputs = weight.shape[:2]
        num_images, _, height, width = gradient.shape
        gradient_rows = _as_rows(gradient)
        # Not "> 0": a gradient that is not a number must go on.
        learnt = gradient_rows.abs().sum(dim=1) != 0
        maps = learnt.view(num_images, 1, height, width).float()
        reached = F.max_pool2d(maps, kernel_size=3, stride=1, padding=1).view(-1).nonzero()[:, 0]
        if len(reached) > _LARGEST_SHARE * len(gradient_rows):
            return _dense_backward(gradient, x, weight, [of_x, of_weight, of_bias])
        x_gradient = weight_gradient = bias_gradient = None
        cells = learnt.nonzero()[:, 0]
        of_cells = gradient_rows.index_select(0, cells)
        if of_weight:
            patches = _patches_3x3(_as_rows(x), cells, height, width)
            weight_gradient = (of_cells.t() @ patches).view(num_outputs, 3, 3, num_inputs).permute(0, 3, 1, 2)
            del patches  # up to four and a half times the map itself
        if of_bias:
            bias_gradient = _sum_of_rows(of_cells)
        if of_x:
            patches = _patches_3x3(gradient_rows, reached, height, width)
            mirrored = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, num_inputs)
            rows = gradient_rows.new_zeros(len(gradient_rows), num_inputs)
            x_gradient = _as_maps(rows.index_copy_(0, reached, patches @ mirrored), x)
        return x_gradient, weight_gradient, bias_gradient


def _sum_of_rows(rows: Tensor) -> Tensor:
    # A product of bfloat16 adds up in float32 as sum() does, and takes a third of its time.
    return (rows.new_ones(1, len(rows)) @ rows)[0]


def _patches_3x3(rows: Tensor, cells: Tensor, height: int, width: int) -> Tensor:
    """The 3x3 windows around `cells` int64 [N] in maps of height x width given as rows [M, C]: [N, 9 * C]."""
    place = torch.arange(9)
    down, right = place // 3 - 1, place % 3 - 1
    x = cells[:, None] % width + right
    y = (cells[:, None] // width) % height + down
    outside = ((x < 0) | (x >= width) | (y < 0) | (y >= height)).view(-1)
    neighbours = (cells[:, None] + down * width + right).view(-1)
    patches = rows.index_select(0, neighbours.clamp_(0, len(rows) - 1))
    # Few: those of the cells at the border.
    patches.index_fill_(0, outside.nonzero()[:, 0], 0)
    return patches.view(len(cells), 9 * rows.shape[1])
