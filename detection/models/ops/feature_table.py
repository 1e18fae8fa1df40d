"""The cells of all feature maps as the rows of one table, so that code can pick single cells of any image and level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_table(features: Sequence[Tensor]) -> Tensor:
    """Maps [B, C, H_l, W_l] to [cells + 1, C]: cells by level, image, row, column, and a row of zeros at the end.

    A level's rows stand together, so that their gradient is a channels-last map as it lies in memory.
    """
    channels = features[0].shape[1]
    rows = [feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features]
    return torch.cat([*rows, rows[0].new_zeros(1, channels)])


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
