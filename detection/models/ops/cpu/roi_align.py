"""RoIAlign as the product of a sparse matrix with the feature maps, for the CPU.

A bin's value is a weighted sum of feature cells. With the channels last in memory, each cell is one contiguous row of
a table of all maps, and the whole operation is torch's embedding_bag, which is vectorized over channels and runs in
parallel over bins. The backward pass is the product with the transposed matrix, the same operation again, so it is
deterministic. torchvision's operator walks single channels and takes some thirty times longer.

Bilinear sampling separates into rows and columns: the samples of a bin fall into at most (samples + 1) cells along
each axis, so their weights are added up along each axis first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FAR_OUTSIDE = -1e6
"""Pixels or cells: samples more than one cell outside a map count as zero and receive no gradient."""


class Sampling(NamedTuple):
    """The three settings of RoIAlign: bins per axis, samples per bin and axis (0: one a cell), half-cell shift."""

    output_size: int
    sampling_ratio: int
    aligned: bool


class PoolingMatrix(NamedTuple):
    """A sparse matrix of bins by feature cells.

    cells: int32 [E] column of each entry. weights: float32 [E]. bin_starts: int32 [R * S * S], the first entry of
    each bin. order: int64 [R], the RoI whose bins stand at each place (RoIs with equally many cells stand together).
    """

    cells: Tensor
    weights: Tensor
    bin_starts: Tensor
    order: Tensor


class _AxisCells(NamedTuple):
    """Cells of each bin along one axis: how many int64 [R], where int64 [R, S, T], float32 weights [R, S, T]."""

    counts: Tensor
    cells: Tensor
    weights: Tensor


@torch.no_grad()
def pooling_matrix(
    sampling: Sampling,
    map_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    boxes_xyxy: Tensor,
    levels: Tensor,
) -> PoolingMatrix:
    """The matrix for boxes [B, R, 4] in pixels at `levels` [B, R], over the rows of `cell_table`.

    map_sizes (height, width) are those of all maps in the table.
    """
    num_images, num_rois = levels.shape
    level = levels.view(-1)
    image = torch.arange(num_images).repeat_interleave(num_rois, output_size=level.numel())
    heights, widths = torch.tensor(map_sizes)[level].unbind(-1)
    areas = torch.tensor([height * width for height, width in map_sizes])
    level_starts = num_images * (areas.cumsum(0) - areas)
    first_cell = level_starts[level] + image * areas[level]

    scale = 1 / torch.tensor(strides, dtype=torch.float32)[level]
    shift = 0.5 if sampling.aligned else 0.0
    corners = boxes_xyxy.view(-1, 4) * scale[:, None] - shift
    # No cell can be told of a box that is infinite or NaN. Far outside of the map all samples count as zero.
    x1, y1, x2, y2 = torch.where(corners.isfinite().all(dim=1, keepdim=True), corners, FAR_OUTSIDE).unbind(-1)
    rows = _axis_cells(sampling, y1, y2 - y1, heights)
    columns = _axis_cells(sampling, x1, x2 - x1, widths)
    row_starts = first_cell[:, None, None] + rows.cells * widths[:, None, None]
    return _cross(rows, columns, row_starts)


def _axis_cells(sampling: Sampling, starts: Tensor, lengths: Tensor, map_lengths: Tensor) -> _AxisCells:
    """Cells and weights along one axis, for RoIs that start at `starts` [R]; all in cells of the RoI's map."""
    size = sampling.output_size
    if not sampling.aligned:
        lengths = lengths.clamp(min=1)
    bin_lengths = (lengths / size)[:, None, None]
    if sampling.sampling_ratio:
        num_samples = torch.full_like(starts, sampling.sampling_ratio, dtype=torch.int64)
    else:
        num_samples = (lengths / size).ceil().long()
    # An empty RoI has no samples; it keeps one of weight zero.
    divisors = num_samples.clamp(min=1)
    # The largest number shapes what follows. numpy reads it from host memory, where CPU tensors are.
    most = int(divisors.numpy().max())

    # The sample's coordinate in the reference kernels' order of operations.
    samples = torch.arange(most)
    bins = torch.arange(size)[:, None]
    coordinates = starts[:, None, None] + bins * bin_lengths
    coordinates = coordinates + (samples + 0.5) * bin_lengths / divisors[:, None, None]
    last = (map_lengths - 1)[:, None, None]
    inside = (coordinates >= -1) & (coordinates <= map_lengths[:, None, None])
    used = inside & (samples < num_samples[:, None, None])
    weights = used / divisors[:, None, None]

    coordinates = coordinates.clamp_(min=0)
    lower = torch.minimum(coordinates.floor().long(), last)
    fractions = torch.where(lower < last, coordinates - lower, 0.0)
    if sampling.sampling_ratio:
        cells = torch.cat((lower, torch.minimum(lower + 1, last)), dim=2)
        return _AxisCells(2 * num_samples, cells, torch.cat((weights * (1 - fractions), weights * fractions), dim=2))
    # One sample a cell: they are at most one cell apart, so the n-th lies at most n cells behind the first.
    first = lower[:, :, :1]
    place = (lower - first).clamp_(0, most - 1)
    summed = torch.zeros(len(starts), size, most + 1)
    summed.scatter_add_(2, place, weights * (1 - fractions))
    summed.scatter_add_(2, place + 1, weights * fractions)
    cells = torch.minimum(first + torch.arange(most + 1), last)
    return _AxisCells(divisors + 1, cells, summed)


def _cross(rows: _AxisCells, columns: _AxisCells, row_starts: Tensor) -> PoolingMatrix:
    """All pairs of a bin's rows and columns. RoIs with equally many of both are done together."""
    size = rows.cells.shape[1]
    code = (rows.counts << 32 | columns.counts).numpy()
    order = np.argsort(code, kind="stable")
    codes, num_rois = np.unique(code[order], return_counts=True)
    groups = [
        (int(code >> 32), int(code & 0xFFFFFFFF), int(count)) for code, count in zip(codes, num_rois, strict=True)
    ]

    num_entries = sum(num_rows * num_columns * count for num_rows, num_columns, count in groups) * size**2
    cells = torch.empty(num_entries, dtype=torch.int32)
    weights = torch.empty(num_entries)
    bin_starts = []
    by_group = torch.from_numpy(order)
    row_starts, row_weights = row_starts.int()[by_group], rows.weights[by_group]
    column_cells, column_weights = columns.cells.int()[by_group], columns.weights[by_group]
    roi, entry = 0, 0
    for num_rows, num_columns, count in groups:
        of_group = slice(roi, roi + count)
        shape = (count, size, size, num_rows, num_columns)
        stop = entry + count * size**2 * num_rows * num_columns
        torch.add(
            row_starts[of_group, :, None, :num_rows, None],
            column_cells[of_group, None, :, None, :num_columns],
            out=cells[entry:stop].view(shape),
        )
        torch.mul(
            row_weights[of_group, :, None, :num_rows, None],
            column_weights[of_group, None, :, None, :num_columns],
            out=weights[entry:stop].view(shape),
        )
        bin_starts.append(torch.arange(entry, stop, num_rows * num_columns, dtype=torch.int32))
        roi, entry = roi + count, stop
    return PoolingMatrix(cells, weights, torch.cat(bin_starts), by_group)


def weighted_row_sums(matrix: PoolingMatrix, table: Tensor) -> Tensor:
    """The matrix times a table of cells [N, C]: [R, C, S * S], bins by row, column; differentiable by the table."""
    return _WeightedRowSums.apply(table, matrix)


class _WeightedRowSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, matrix: PoolingMatrix) -> Tensor:
        ctx.matrix, ctx.num_cells = matrix, len(table)
        sums = F.embedding_bag(
            matrix.cells, table, matrix.bin_starts, mode="sum", per_sample_weights=matrix.weights.to(table.dtype)
        )
        by_roi = sums.view(len(matrix.order), -1, table.shape[1]).transpose(1, 2)
        # One pass puts the RoIs into their order and the channels first, as the box head's weights have them.
        return sums.new_empty(by_roi.shape).index_copy_(0, matrix.order, by_roi)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        matrix = ctx.matrix
        bins_per_roi = len(matrix.bin_starts) // len(matrix.order)
        bins = matrix.order.int()[:, None] * bins_per_roi + torch.arange(bins_per_roi, dtype=torch.int32)
        ends = F.pad(matrix.bin_starts[1:], (0, 1), value=len(matrix.cells))
        bin_of_entry = bins.view(-1).repeat_interleave(ends - matrix.bin_starts, output_size=len(matrix.cells))
        # Entries sorted by cell are the rows of the transposed matrix.
        cells, by_cell = matrix.cells.sort(stable=True)
        cell_starts = torch.searchsorted(cells, torch.arange(ctx.num_cells, dtype=torch.int32), out_int32=True)
        return F.embedding_bag(
            bin_of_entry[by_cell],
            gradient.transpose(1, 2).reshape(-1, gradient.shape[1]),
            cell_starts,
            mode="sum",
            per_sample_weights=matrix.weights[by_cell].to(gradient.dtype),
        ), None
