"""Anchors of the region proposal network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detection.models.batch import SIZE_DIVISOR
from detection.models.feature_cells import neighbours_3x3
from detection.models.recipes import FasterRCNNConfig

_GRIDS_KEPT = 32  # distinct padded sizes whose anchors stay in memory, about 10 MB each at 800x1088


class AnchorGrid(NamedTuple):
    """Anchors of all levels for one padded size, ordered by level, row, column, ratio.

    boxes_xyxy: float32 [A, 4]. cells_yx: float32 [A, 2], upper left corner of the feature cell that an anchor belongs
    to. per_level: the number of anchors of each level, which add up to A. neighbours: int64 [A / ratios, 9],
    `neighbours_3x3` of the levels' cells.
    """

    boxes_xyxy: Tensor
    cells_yx: Tensor
    per_level: tuple[int, ...]
    neighbours: Tensor


class AnchorGenerator:
    """Makes anchor grids, and keeps those of the most recent padded sizes."""

    def __init__(self, config: FasterRCNNConfig) -> None:
        self._config = config
        self._grids: OrderedDict[tuple[object, ...], AnchorGrid] = OrderedDict()

    def __call__(
        self, padded_size: tuple[int, int], feature_sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> AnchorGrid:
        """Anchors for images of `padded_size` whose maps P2..P6 have `feature_sizes` (height, width)."""
        key = (padded_size, tuple(feature_sizes), device)
        if key in self._grids:
            self._grids.move_to_end(key)
        else:
            # Made under inference mode, a kept grid could not be used in training.
            with torch.inference_mode(False):
                self._grids[key] = self._make(padded_size, feature_sizes, device)
            if len(self._grids) > _GRIDS_KEPT:
                self._grids.popitem(last=False)
        return self._grids[key]

    def _make(
        self, padded_size: tuple[int, int], feature_sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> AnchorGrid:
        config = self._config
        boxes, cells = [], []
        for level, (height, width) in enumerate(feature_sizes):
            if config.anchor_stride_from_grid:
                stride_y, stride_x = padded_size[0] // height, padded_size[1] // width
            else:
                stride_y = stride_x = config.anchor_strides[level]
            y, x = torch.meshgrid(torch.arange(height) * stride_y, torch.arange(width) * stride_x, indexing="ij")
            base = base_anchors(config.anchor_sizes[level], config.anchor_ratios, rounded=config.round_anchors)
            corners = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4).float()
            boxes.append((corners + base).reshape(-1, 4))
            cells.append(torch.stack((y, x), dim=-1).reshape(-1, 1, 2).float().expand(-1, len(base), 2).reshape(-1, 2))
        return AnchorGrid(
            torch.cat(boxes).to(device),
            torch.cat(cells).to(device),
            tuple(len(level) for level in boxes),
            neighbours_3x3(feature_sizes).to(device),
        )


def base_anchors(size: float, ratios: Sequence[float], *, rounded: bool) -> Tensor:
    """Anchors of area size**2 around the origin, one a ratio of height to width: float32 [len(ratios), 4]."""
    height_factors = torch.sqrt(torch.tensor(ratios))
    heights, widths = size * height_factors, size * (1 / height_factors)
    boxes = torch.stack((-widths, -heights, widths, heights), dim=1) * 0.5
    return boxes.round() if rounded else boxes


def anchors_inside_padding(grid: AnchorGrid, sizes: Tensor) -> Tensor:
    """Which anchors' cells lie inside each image's own padded size, `sizes` [B, 2] rounded up to 32: bool [B,
    A].
    """
    own_padded_sizes = (sizes + (SIZE_DIVISOR - 1)) // SIZE_DIVISOR * SIZE_DIVISOR
    y, x = grid.cells_yx.unbind(-1)
    return (y < own_padded_sizes[:, :1]) & (x < own_padded_sizes[:, 1:])
