"""The best matches among boxes and candidates, in two Triton kernels that keep no overlap in memory.

Written out, the overlaps of 16 images with 268,000 anchors and 40 boxes each are 0.7 GB, and the plain code goes
through them some twenty times. Reference and fallback: `MaxIoUAssigner` in `detection.models.ops.matcher`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from detection.models.ops.triton.boxes import load_boxes, pairwise_iou

_BLOCK = 512  # candidates of a program
_BITS_OF_MINUS_ONE = -0x40800000  # of a float32, as int32


@triton.jit
def best_of_candidates(
    gt_boxes, gt_valid, candidates, candidate_valid, best_iou, best_index, best_of_gt,
    num_gt, num_candidates, image_stride,
    HAS_VALID: tl.constexpr, LOW_QUALITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each candidate's best IoU (-1 without a usable box) and the first box that has it; with LOW_QUALITY also each
    box's best IoU with a usable candidate, as the bits of a float32.

    gt_boxes: float32 [B, G, 4]. candidates: float32 [B or 1, N, 4], with image_stride numbers an image. best_of_gt:
    int32 [B, G], the bits of -1 before.
    """
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_candidates
    x1, y1, x2, y2 = load_boxes(candidates + image * image_stride, place, inside)
    usable = inside
    if HAS_VALID:
        usable = tl.load(candidate_valid + image * num_candidates + place, mask=inside, other=0) != 0
    best = tl.full([BLOCK], -1.0, dtype=tl.float32)
    index = tl.zeros([BLOCK], dtype=tl.int32)
    for number in range(0, num_gt):
        if tl.load(gt_valid + image * num_gt + number) != 0:
            gt_x1, gt_y1, gt_x2, gt_y2 = load_boxes(gt_boxes + image * num_gt * 4, number, True)
            iou = pairwise_iou(gt_x1, gt_y1, gt_x2, gt_y2, x1, y1, x2, y2)
            iou = tl.where(usable, iou, -1.0)
            index = tl.where(iou > best, number, index)
            best = tl.where(iou > best, iou, best)
            if LOW_QUALITY:
                # No overlap is below zero, and such floats are ordered as the integers that their bits are.
                largest = tl.max(iou.to(tl.int32, bitcast=True), axis=0)
                tl.atomic_max(best_of_gt + image * num_gt + number, largest, sem="relaxed")
    tl.store(best_iou + image * num_candidates + place, best, mask=inside)
    tl.store(best_index + image * num_candidates + place, index.to(tl.int64), mask=inside)


@triton.jit
def last_gt_with_its_best(
    gt_boxes, candidates, candidate_valid, best_of_gt, found,
    num_gt, num_candidates, image_stride, low_quality_iou,
    HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each candidate the last box that has its best IoU with it, if that is at least low_quality_iou (above -1);
    -1 where there is none. Shapes as above; found: int64 [B, N]."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_candidates
    x1, y1, x2, y2 = load_boxes(candidates + image * image_stride, place, inside)
    usable = inside
    if HAS_VALID:
        usable = tl.load(candidate_valid + image * num_candidates + place, mask=inside, other=0) != 0
    index = tl.full([BLOCK], -1, dtype=tl.int32)
    for number in range(0, num_gt):
        best = tl.load(best_of_gt + image * num_gt + number).to(tl.float32, bitcast=True)
        if best >= low_quality_iou:
            gt_x1, gt_y1, gt_x2, gt_y2 = load_boxes(gt_boxes + image * num_gt * 4, number, True)
            iou = pairwise_iou(gt_x1, gt_y1, gt_x2, gt_y2, x1, y1, x2, y2)
            index = tl.where(usable & (iou == best), number, index)
    tl.store(found + image * num_candidates + place, index.to(tl.int64), mask=inside)


def best_matches(
    gt_boxes_xyxy: Tensor,
    gt_valid: Tensor,
    candidates_xyxy: Tensor,
    candidate_valid: Tensor | None,
    low_quality_iou: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a `MaxIoUAssigner` decides by; arguments as it takes them.

    Gives best_iou float32 [B, N], -1 where a candidate has no usable box; best_index int64 [B, N], the first box of
    that IoU; and, where low_quality_iou is given, int64 [B, N], the last box whose best IoU of at least that the
    candidate has, or -1.
    """
    num_images, num_gt = gt_valid.shape
    num_candidates = candidates_xyxy.shape[1]
    device = gt_boxes_xyxy.device
    gt_boxes, gt_valid = gt_boxes_xyxy.contiguous(), gt_valid.contiguous().view(torch.uint8)
    candidates = candidates_xyxy.contiguous()
    image_stride = 4 * num_candidates if len(candidates) > 1 else 0
    valid = None if candidate_valid is None else candidate_valid.contiguous().view(torch.uint8)
    best_iou = torch.empty((num_images, num_candidates), device=device)
    best_index = torch.empty((num_images, num_candidates), dtype=torch.int64, device=device)
    best_of_gt = torch.full((num_images, num_gt), _BITS_OF_MINUS_ONE, dtype=torch.int32, device=device)
    programs = (num_images, triton.cdiv(num_candidates, _BLOCK))
    low_quality_index = None
    # Without fused multiply-adds, which would make a candidate's IoU another number in each of the two kernels.
    with torch.cuda.device_of(gt_boxes):
        best_of_candidates[programs](
            gt_boxes, gt_valid, candidates, valid, best_iou, best_index, best_of_gt,
            num_gt, num_candidates, image_stride,
            HAS_VALID=valid is not None, LOW_QUALITY=low_quality_iou is not None, BLOCK=_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
        if low_quality_iou is not None:
            low_quality_index = torch.empty_like(best_index)
            last_gt_with_its_best[programs](
                gt_boxes, candidates, valid, best_of_gt, low_quality_index,
                num_gt, num_candidates, image_stride, low_quality_iou,
                HAS_VALID=valid is not None, BLOCK=_BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
    return best_iou, best_index, low_quality_index
