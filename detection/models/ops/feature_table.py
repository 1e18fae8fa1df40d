"""The cells of all feature maps as the rows of one table, so that code can pick single cells of any image and level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detection.models.ops.backend import implementation_of


class TableGradient:
    """The gradient of one table of cells in float32. All readers of the table add to it; it is rounded once.

    Autograd would write a gradient of the whole table for each reader, and their sum as one more.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._sum: Tensor | None = None

    def sum(self) -> Tensor:
        """The sum so far, float32 [cells + 1, C], to be added to in place."""
        if self._sum is None:
            self._sum = torch.zeros_like(self._table, dtype=torch.float32, memory_format=torch.contiguous_format)
        return self._sum

    def take(self) -> Tensor:
        """The sum in the table's dtype. The next backward pass starts at zero."""
        total, self._sum = self.sum().to(self._table.dtype), None
        return total


def shared_table(table: Tensor) -> tuple[Tensor, TableGradient | None]:
    """The table for its readers, and the gradient that they add to.

    No such gradient where the table needs none, for float64, which float32 would round, and where `backend` leaves the
    sum to autograd.
    """
    is_shared = implementation_of("table_gradient", table.device) == "shared"
    if not is_shared or not table.requires_grad or table.dtype == torch.float64:
        return table, None
    gradient = TableGradient(table.detach())
    shared: Tensor = _Shared.apply(table, gradient)
    return shared, gradient


def rows_of_table(table: Tensor, rows: Tensor, gradient: TableGradient | None) -> Tensor:
    """table[rows], rows int64 [N]: [N, C]. gradient: what the table's is added to; without one it goes to autograd."""
    if gradient is None:
        return table.index_select(0, rows)
    found: Tensor = _Rows.apply(table, rows, gradient)
    return found


class _Shared(torch.autograd.Function):
    """Autograd calls its backward pass when those of all readers are done."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, gradient: TableGradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return table.view_as(table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is not None:  # of readers that leave theirs to autograd
            ctx.gradient.sum().add_(gradient)
        return ctx.gradient.take(), None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, gradient: TableGradient) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(rows)
        return table.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        ctx.gradient.sum().index_add_(0, rows, gradient.float())
        return None, None, None


def cell_table(features: Sequence[Tensor]) -> Tensor:
    """Maps [B, C, H_l, W_l] to [cells + 1, C]: cells by level, image, row, column, and a row of zeros at the end.

    A level's rows stand together, so that their gradient is a channels-last map as it lies in memory.
    """
    channels = features[0].shape[1]
    rows = [feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features]
    return torch.cat([*rows, rows[0].new_zeros(1, channels)])


def maps_of_table(table: Tensor, num_images: int, map_sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """The maps [B, C, H_l, W_l] that a `cell_table` holds, as views of it."""
    counts = [num_images * height * width for height, width in map_sizes]
    levels = table[: sum(counts)].split(counts)
    return tuple(
        level.view(num_images, *size, -1).permute(0, 3, 1, 2) for level, size in zip(levels, map_sizes, strict=True)
    )


def level_layout(map_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """First cell (of one image), height and width of each level: int64 [L, 3], on the CPU."""
    starts = [0]
    for height, width in map_sizes:
        starts.append(starts[-1] + height * width)
    return torch.tensor([(start, *size) for start, size in zip(starts, map_sizes, strict=False)])


def windows_3x3(cells: Tensor, layout: Tensor) -> Tensor:
    """Table rows of the 3x3 windows around `cells` of each image, int64 [B, N] by level, row, column: int64 [B, N, 9],
    row by row.

    Outside its map a window sees the table's last row, of zeros. layout: `level_layout` on the cells' device.
    """
    num_images = len(cells)
    level = (cells[..., None] >= layout[:, 0]).sum(dim=-1) - 1
    start, height, width = (each[..., None] for each in layout[level].unbind(-1))
    place = torch.arange(9, device=cells.device)
    y = (cells[..., None] - start) // width + (place // 3 - 1)
    x = (cells[..., None] - start) % width + (place % 3 - 1)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    image = torch.arange(num_images, device=cells.device)[:, None, None]
    cells_of_level = height * width
    zeros = num_images * (layout[-1, 0] + layout[-1, 1] * layout[-1, 2])
    return torch.where(inside, num_images * start + image * cells_of_level + y * width + x, zeros)
