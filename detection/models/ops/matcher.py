"""Which ground-truth box each anchor or proposal is to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detection.models.ops.backend import implementation_of
from detection.models.ops.boxes import pairwise_iou

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1

# Elements of one overlap matrix. On the CPU blocks that stay in the cache are faster.
BLOCK_ON_CPU = 1 << 21
BLOCK_ON_DEVICE = 1 << 25


class Assignment(NamedTuple):
    """kind: int64 [B, N], POSITIVE, NEGATIVE or IGNORED. gt_index: int64 [B, N], a positive's box."""

    kind: Tensor
    gt_index: Tensor


class Matches(NamedTuple):
    """What an assignment is decided by.

    best_iou: float32 [B, N], a candidate's best IoU, -1 without a usable box. best_index: int64 [B, N], the first box
    that it has it with. low_quality_index: int64 [B, N], the last box whose best IoU (of at least low_quality_iou) the
    candidate has, -1 where there is none; None where low quality does not count.
    """

    best_iou: Tensor
    best_index: Tensor
    low_quality_index: Tensor | None


@dataclass(frozen=True)
class MaxIoUAssigner:
    """Positive from `positive_iou` on, negative below `negative_iou`, ignored between; the box is the one of
    best IoU, the first of equal ones.

    With `low_quality_iou`, every candidate that ties for a box's best IoU is positive too if that is at least
    low_quality_iou: for that box (the last one of several) with `low_quality_takes_own_box`, as in
    MMDetection, else for the box of the candidate's own best IoU, as in torchvision.
    """

    positive_iou: float
    negative_iou: float
    low_quality_iou: float | None = None
    low_quality_takes_own_box: bool = True

    @torch.no_grad()
    def __call__(
        self, gt_boxes_xyxy: Tensor, gt_valid: Tensor, candidates_xyxy: Tensor, candidate_valid: Tensor | None
    ) -> Assignment:
        """Assigns a whole batch.

        gt_boxes_xyxy: float32 [B, G, 4]; gt_valid: bool [B, G]; candidates_xyxy: float32 [B, N, 4] or, the
        same for every image, [1, N, 4]; candidate_valid: bool [B, N], the others are ignored (None: all are
        valid).
        """
        name = implementation_of("assignment", gt_valid.device)
        if name == "trimmed":
            # What the host can see without waiting spares passes over rows of padding and masks without effect.
            gt_valid = gt_valid[:, : _used_rows(gt_valid)]
            if candidate_valid is not None and candidate_valid.numpy().all():
                candidate_valid = None
        find = self.best_by_triton if name == "triton" else self.best_in_blocks
        best_iou, best_index, low_quality_index = find(gt_boxes_xyxy, gt_valid, candidates_xyxy, candidate_valid)
        kind = torch.full_like(best_index, IGNORED)
        kind.masked_fill_(best_iou < self.negative_iou, NEGATIVE)
        kind.masked_fill_(best_iou >= self.positive_iou, POSITIVE)
        if low_quality_index is not None:
            is_low_quality = low_quality_index >= 0
            kind.masked_fill_(is_low_quality, POSITIVE)
            if self.low_quality_takes_own_box:
                best_index = torch.where(is_low_quality, low_quality_index, best_index)
        if candidate_valid is not None:
            kind.masked_fill_(~candidate_valid, IGNORED)
        return Assignment(kind, best_index)

    def best_by_triton(
        self, gt_boxes_xyxy: Tensor, gt_valid: Tensor, candidates_xyxy: Tensor, candidate_valid: Tensor | None
    ) -> Matches:
        """As `best_in_blocks`, to the last bit, on a GPU."""
        from detection.models.ops.triton.matcher import best_matches

        return Matches(*best_matches(gt_boxes_xyxy, gt_valid, candidates_xyxy, candidate_valid, self.low_quality_iou))

    def best_in_blocks(
        self, gt_boxes_xyxy: Tensor, gt_valid: Tensor, candidates_xyxy: Tensor, candidate_valid: Tensor | None
    ) -> Matches:
        """The matches of a batch, a block of boxes at a time; arguments as above."""
        num_images, num_gt = gt_valid.shape
        num_candidates = candidates_xyxy.shape[1]
        device = gt_boxes_xyxy.device
        shape = (num_images, num_candidates)
        best_iou = torch.full(shape, -1.0, device=device)
        best_index = torch.zeros(shape, dtype=torch.int64, device=device)
        low_quality_index = None
        if self.low_quality_iou is not None:
            low_quality_index = torch.full(shape, -1, dtype=torch.int64, device=device)

        budget = BLOCK_ON_CPU if device.type == "cpu" else BLOCK_ON_DEVICE
        block = min(max(1, budget // max(1, num_images * num_candidates)), torch.iinfo(torch.int16).max)
        for start in range(0, num_gt, block):
            stop = min(start + block, num_gt)
            usable = gt_valid[:, start:stop, None]
            if candidate_valid is not None:
                usable = usable & candidate_valid[:, None]
            iou = pairwise_iou(gt_boxes_xyxy[:, start:stop], candidates_xyxy)
            iou.masked_fill_(~usable, -1.0)
            block_iou, block_index = iou.max(dim=1)
            better = block_iou > best_iou
            best_iou = torch.where(better, block_iou, best_iou)
            best_index = torch.where(better, block_index + start, best_index)
            if low_quality_index is not None and self.low_quality_iou is not None:
                best_of_box = iou.amax(dim=2, keepdim=True)
                # A box without any usable candidate has -1 everywhere, below every threshold.
                is_best = (iou == best_of_box) & (best_of_box >= self.low_quality_iou)
                # Of several boxes the last one counts. Numbers of two bytes make this pass a quarter as long.
                places = torch.arange(stop - start, device=device, dtype=torch.int16)[:, None]
                last = places.where(is_best, -1).amax(dim=1).long()
                low_quality_index = torch.where(last >= 0, last + start, low_quality_index)
        return Matches(best_iou, best_index, low_quality_index)


def _used_rows(gt_valid: Tensor) -> int:
    """Rows up to the last valid one of any image, at least one."""
    used = np.flatnonzero(gt_valid.numpy().any(axis=0))
    return int(used[-1]) + 1 if len(used) else 1
