"""The cells of all feature maps as the rows of one table, so that code can pick single cells of any image and level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_table(features: Sequence[Tensor]) -> Tensor:
    """Maps [B, C, H_l, W_l] to [B, cells + 1, C]: cells by level, row, column, and a row of zeros at the end."""
    num_images, channels = features[0].shape[:2]
    rows = [feature.permute(0, 2, 3, 1).reshape(num_images, -1, channels) for feature in features]
    return torch.cat([*rows, rows[0].new_zeros(num_images, 1, channels)], dim=1)


def level_layout(map_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """First cell, height and width of each level in a table: int64 [L, 3], on the CPU."""
    starts = [0]
    for height, width in map_sizes:
        starts.append(starts[-1] + height * width)
    return torch.tensor([(start, *size) for start, size in zip(starts, map_sizes, strict=False)])


def windows_3x3(cells: Tensor, layout: Tensor, num_cells: int) -> Tensor:
    """Table rows of the 3x3 windows around `cells` int64 [...], row by row: int64 [..., 9].

    Outside its map a window sees the row of zeros, number `num_cells`. layout: `level_layout` on the cells' device.
    """
    level = (cells[..., None] >= layout[:, 0]).sum(dim=-1) - 1
    start, height, width = (each[..., None] for each in layout[level].unbind(-1))
    place = torch.arange(9, device=cells.device)
    y = (cells[..., None] - start) // width + (place // 3 - 1)
    x = (cells[..., None] - start) % width + (place % 3 - 1)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return torch.where(inside, start + y * width + x, num_cells)
