"""Anchors of the region proposal network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detection.models.config import FasterRCNNConfig
from detection.models.ops.feature_table import level_layout
from detection.models.structures import SIZE_DIVISOR

# Distinct padded sizes whose anchors stay in memory, 3.5 MB each at 800x1088. COCO at 800 by 1333 has some forty.
_GRIDS_KEPT = 64


class AnchorGrid(NamedTuple):
    """Anchors of all levels for one padded size, ordered by level, row, column, ratio.

    boxes_xyxy: float32 [A, 4]. per_level: the number of anchors of each level, which add up to A. map_sizes: (height,
    width) of the levels' feature maps. strides: (vertical, horizontal) distance of each level's anchors in pixels.
    layout: int64 [L, 3], `level_layout` of the maps.
    """

    boxes_xyxy: Tensor
    per_level: tuple[int, ...]
    map_sizes: tuple[tuple[int, int], ...]
    strides: tuple[tuple[int, int], ...]
    layout: Tensor


class AnchorGenerator:
    """Makes anchor grids, and keeps those of the most recent padded sizes."""

    def __init__(self, config: FasterRCNNConfig) -> None:
        self._config = config
        self._grids: OrderedDict[tuple[object, ...], AnchorGrid] = OrderedDict()
        self._recorded: list[AnchorGrid] = []

    def __call__(
        self, padded_size: tuple[int, int], map_sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> AnchorGrid:
        """Anchors for images of `padded_size` whose maps P2..P6 have `map_sizes`, all (height, width)."""
        key = (padded_size, tuple(map_sizes), device)
        if key in self._grids:
            self._grids.move_to_end(key)
        else:
            # Made under inference mode, a kept grid could not be used in training.
            with torch.inference_mode(False):
                self._grids[key] = self._make(padded_size, map_sizes, device)
            if len(self._grids) > _GRIDS_KEPT:
                self._grids.popitem(last=False)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A CUDA graph reads them where they are, for as long as it is replayed.
            self._recorded.append(self._grids[key])
        return self._grids[key]

    def _make(
        self, padded_size: tuple[int, int], map_sizes: Sequence[tuple[int, int]], device: torch.device
    ) -> AnchorGrid:
        config = self._config
        boxes, strides = [], []
        for level, (height, width) in enumerate(map_sizes):
            if config.anchor_stride_from_grid:
                stride_y, stride_x = padded_size[0] // height, padded_size[1] // width
            else:
                stride_y = stride_x = config.anchor_strides[level]
            ratios, rounded = config.anchor_ratios, config.round_anchors
            of_sizes = [base_anchors(size, ratios, rounded=rounded) for size in config.anchor_sizes_of(level)]
            base = torch.stack(of_sizes, dim=1).view(-1, 4)  # by ratio, then size
            boxes.append(anchors_of_map(base, (height, width), (stride_y, stride_x)))
            strides.append((stride_y, stride_x))
        return AnchorGrid(
            torch.cat(boxes).to(device),
            tuple(len(level) for level in boxes),
            tuple(map_sizes),
            tuple(strides),
            level_layout(map_sizes).to(device),
        )


def base_anchors(size: float, ratios: Sequence[float], *, rounded: bool) -> Tensor:
    """Anchors of area size**2 around the origin, one a ratio of height to width: float32 [len(ratios), 4]."""
    height_factors = torch.sqrt(torch.tensor(ratios))
    heights, widths = size * height_factors, size * (1 / height_factors)
    boxes = torch.stack((-widths, -heights, widths, heights), dim=1) * 0.5
    return boxes.round() if rounded else boxes


def anchors_of_map(base: Tensor, size: tuple[int, int], strides: tuple[int, int]) -> Tensor:
    """Base anchors [R, 4] at every cell of a map of `size` (height, width), by row, column, ratio: float32 [A, 4]."""
    y, x = torch.meshgrid(
        *(torch.arange(n, device=base.device) * stride for n, stride in zip(size, strides, strict=True)), indexing="ij"
    )
    return (torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4).float() + base).reshape(-1, 4)


def anchors_inside_image(grid: AnchorGrid, sizes: Tensor) -> Tensor:
    """Which anchors lie inside each image, `sizes` [B, 2] (height, width), as a whole: bool [B, A]."""
    x1, y1, x2, y2 = grid.boxes_xyxy.unbind(1)
    return (x1 >= 0) & (y1 >= 0) & (x2 < sizes[:, 1:]) & (y2 < sizes[:, :1])


def anchors_inside_padding(grid: AnchorGrid, sizes: Tensor) -> Tensor:
    """Which anchors' cells begin inside each image's own padded size, `sizes` [B, 2] rounded up to 32: bool [B, A]."""
    own_heights, own_widths = ((sizes + (SIZE_DIVISOR - 1)) // SIZE_DIVISOR * SIZE_DIVISOR)[..., None].unbind(1)
    levels = []
    for (height, width), (stride_y, stride_x), count in zip(grid.map_sizes, grid.strides, grid.per_level, strict=True):
        rows = torch.arange(height, device=sizes.device) * stride_y < own_heights
        columns = torch.arange(width, device=sizes.device) * stride_x < own_widths
        cells = (rows[:, :, None] & columns[:, None, :])[..., None]
        anchors_per_cell = count // (height * width)
        levels.append(cells.expand(-1, -1, -1, anchors_per_cell).reshape(len(sizes), count))
    return torch.cat(levels, dim=1)
