"""RoIAlign over the levels of a feature pyramid (He et al. 2017, section 3; Lin et al. 2017 for the levels)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor

from detection.models.ops.backend import implementation_of
from detection.models.ops.cpu.roi_align import FAR_OUTSIDE, Sampling, pooling_matrix, weighted_row_sums
from detection.models.ops.feature_table import TableGradient, cell_table

ROI_LEVELS = 4  # P2..P5; P6 serves the RPN only
_EPS = 1e-6


def roi_levels(boxes_xyxy: Tensor, *, finest_scale: float, eps_inside_log: bool) -> Tensor:
    """Pyramid level of each RoI, 0 (P2) to 3 (P5): int64 [...] for boxes [..., 4].

    floor(log2(sqrt(area) / finest_scale)), Lin et al. 2017, equation 1. An eps lets sizes at a boundary go up: inside
    the logarithm (MMDetection) or outside (torchvision). A box that is not a number counts as empty: P2.
    """
    sides = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    relative = (sides[..., 0] * sides[..., 1]).sqrt() / finest_scale
    exponent = torch.log2(relative + _EPS) if eps_inside_log else torch.log2(relative) + _EPS
    return exponent.floor().nan_to_num(nan=0.0).clamp(0, ROI_LEVELS - 1).long()


@dataclass(frozen=True)
class RoIAlign:
    """Pools RoIs to output_size x output_size bins.

    sampling_ratio: samples per bin and axis, 0 for one a feature cell. aligned: RoIs are shifted by half a cell;
    otherwise they are at least one cell large. strides: of the maps, from P2 on.
    """

    output_size: int
    sampling_ratio: int
    aligned: bool
    strides: Sequence[int]

    def __call__(
        self,
        features: Sequence[Tensor],
        boxes_xyxy: Tensor,
        levels: Tensor,
        table: Tensor | None = None,
        gradient: TableGradient | None = None,
    ) -> Tensor:
        """Boxes [B, R, 4] in pixels, each from the map of its level [B, R] among [B, C, H_l, W_l], P2 first.

        table: `cell_table(features)` where it exists already; gradient: what its readers add theirs to. Gives
        [B * R, C, output_size, output_size] in the features' dtype on the CPU and through Triton, float32 elsewhere. A
        box that is infinite or NaN gives zeros.
        """
        name = implementation_of("roi_align", boxes_xyxy.device)
        if name == "sparse_matrix":
            return self.by_sparse_matrix(features, boxes_xyxy, levels, table)
        if name == "triton" and features[0].dtype != torch.float64:
            return self.by_triton(features, boxes_xyxy, levels, table, gradient)
        return self.by_operator(features, boxes_xyxy, levels)

    def by_triton(
        self,
        features: Sequence[Tensor],
        boxes_xyxy: Tensor,
        levels: Tensor,
        table: Tensor | None = None,
        gradient: TableGradient | None = None,
    ) -> Tensor:
        """From the table of cells, on a GPU."""
        from detection.models.ops.triton.roi_align import pool_from_table

        return pool_from_table(
            cell_table(features) if table is None else table,
            [(feature.shape[2], feature.shape[3]) for feature in features],
            self.strides[:ROI_LEVELS],
            boxes_xyxy,
            levels,
            output_size=self.output_size,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
            gradient_sum=None if gradient is None else gradient.sum,
        )

    def by_operator(self, features: Sequence[Tensor], boxes_xyxy: Tensor, levels: Tensor) -> Tensor:
        """One call of torchvision's operator a level, over all RoIs, because to find a level's own RoIs would wait
        for the device. RoIs of other levels are moved far outside the map, where they cost and contribute nothing.
        """
        num_images, num_rois = levels.shape
        images = torch.arange(num_images, device=levels.device, dtype=boxes_xyxy.dtype)
        images = images[:, None, None].expand(-1, num_rois, 1)
        # The operator would take the size of an infinite box for a number of samples.
        is_finite = boxes_xyxy.isfinite().all(dim=-1)
        pooled: Tensor | None = None
        for level, (feature, stride) in enumerate(zip(features[:ROI_LEVELS], self.strides, strict=False)):
            here = torch.where((is_finite & (levels == level))[..., None], boxes_xyxy, FAR_OUTSIDE)
            rois = torch.cat((images, here), dim=2).view(-1, 5)
            of_level = torchvision.ops.roi_align(
                feature.to(torch.float32, memory_format=torch.contiguous_format),
                rois,
                self.output_size,
                1 / stride,
                self.sampling_ratio,
                self.aligned,
            )
            pooled = of_level if pooled is None else pooled + of_level
        assert pooled is not None
        return pooled

    def by_sparse_matrix(
        self, features: Sequence[Tensor], boxes_xyxy: Tensor, levels: Tensor, table: Tensor | None = None
    ) -> Tensor:
        """From the table of cells, as a product with a sparse matrix, on the CPU."""
        table = cell_table(features) if table is None else table
        sampling = Sampling(self.output_size, self.sampling_ratio, self.aligned)
        map_sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
        matrix = pooling_matrix(sampling, map_sizes, self.strides, boxes_xyxy, levels)
        return weighted_row_sums(matrix, table).unflatten(2, (self.output_size, self.output_size))
