"""The cells of all feature maps as the rows of one table, so that code can pick single cells of any image and level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cell_table(features: Sequence[Tensor]) -> Tensor:
    """Maps [B, C, H_l, W_l] to [B, cells + 1, C]: cells by level, row, column, and a row of zeros at the end."""
    num_images, channels = features[0].shape[:2]
    rows = [feature.permute(0, 2, 3, 1).reshape(num_images, -1, channels) for feature in features]
    return torch.cat([*rows, rows[0].new_zeros(num_images, 1, channels)], dim=1)


def neighbours_3x3(map_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Table rows under a 3x3 window around each cell: int64 [cells, 9], row by row.

    Outside its map a window sees the table's row of zeros.
    """
    zero_row = sum(height * width for height, width in map_sizes)
    windows = []
    start = 0
    for height, width in map_sizes:
        own = torch.arange(start, start + height * width).view(height, width)
        framed = F.pad(own, (1, 1, 1, 1), value=zero_row)
        shifted = [framed[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
        windows.append(torch.stack(shifted, dim=-1).view(-1, 9))
        start += height * width
    return torch.cat(windows)
