"""Greedy suppression in many groups of boxes at once, in two Triton kernels and without a wait for the host.

The first writes as a matrix of bits which better box overlaps which worse one, the second walks down the rows of each
group. Reference and fallback: the rounds in `detection.models.ops.nms`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from detection.models.ops.triton.boxes import load_boxes, pairwise_iou

_WORD = 32  # bits
# A program's part of the matrix.
_ROWS, _WORDS = 128, 4


@triton.jit
def overlap_bits(boxes, bits, num_boxes, num_words, row_words, threshold, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Bit j of row i: whether box i comes before box j in its group, and their IoU is above the threshold.

    boxes: float32 [G, N, 4], best first. bits: int32 [G, 32 * num_words, row_words]; words before a row's own are left
    as they are.
    """
    group = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(1) * ROWS
    first_word = tl.program_id(2) * WORDS
    row = first_row + tl.arange(0, ROWS)
    lane = tl.arange(0, 32)
    of_group = boxes + group * num_boxes * 4
    a_x1, a_y1, a_x2, a_y2 = load_boxes(of_group, row, row < num_boxes)
    # A word that ends before the first row holds no worse box.
    for word in range(tl.maximum(first_word, first_row // 32), tl.minimum(first_word + WORDS, num_words)):
        column = word * 32 + lane
        b_x1, b_y1, b_x2, b_y2 = load_boxes(of_group, column, column < num_boxes)
        iou = pairwise_iou(
            a_x1[:, None], a_y1[:, None], a_x2[:, None], a_y2[:, None],
            b_x1[None, :], b_y1[None, :], b_x2[None, :], b_y2[None, :],
        )  # fmt: skip
        overlaps = (iou > threshold) & (row[:, None] < column[None, :])
        packed = tl.sum(overlaps.to(tl.int32) << lane[None, :], axis=1)
        place = (group * num_words * 32 + row) * row_words + word
        tl.store(bits + place, packed, mask=row < num_words * 32)


@triton.jit
def walk_down(bits, valid, keep, num_boxes, num_words, ROW_WORDS: tl.constexpr):
    """Which boxes of a group are kept: those that are valid, and that no kept box before them overlaps.

    valid, keep: bool [G, N]. A program has a group.
    """
    group = tl.program_id(0).to(tl.int64)
    rows = bits + group * num_words * 32 * ROW_WORDS
    lane = tl.arange(0, 32)
    words = tl.arange(0, ROW_WORDS)
    removed = tl.zeros([ROW_WORDS], dtype=tl.int32)
    for word in range(0, num_words):
        place = word * 32 + lane
        usable = tl.load(valid + group * num_boxes + place, mask=place < num_boxes, other=0).to(tl.int32)
        # The decisions on 32 boxes, each with the bits of those before it.
        gone = tl.sum(tl.where(words == word, removed, 0), axis=0) | tl.sum((1 - usable) << lane, axis=0)
        for number in tl.static_range(32):
            row = rows + (word * 32 + number) * ROW_WORDS
            stays = 1 - ((gone >> number) & 1)
            gone = gone | (tl.load(row + word) * stays)
            removed = removed | (tl.load(row + words) * stays)
        tl.store(keep + group * num_boxes + place, (1 - ((gone >> lane) & 1)).to(tl.int8), mask=place < num_boxes)


def keep_best(boxes_xyxy: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Which of each group's boxes [G, N, 4], float32, best first, are kept: bool [G, N]. `valid` bool [G, N]: the
    others neither suppress nor are kept. iou_threshold: a float32 number.
    """
    num_groups, num_boxes = valid.shape
    num_words = triton.cdiv(num_boxes, _WORD)
    row_words = triton.next_power_of_2(num_words)
    # Words that are not written hold any bits; they stand for boxes on which is decided already.
    bits = torch.empty((num_groups, _WORD * num_words, row_words), dtype=torch.int32, device=valid.device)
    keep = torch.empty_like(valid)
    tiles = (num_groups, triton.cdiv(_WORD * num_words, _ROWS), triton.cdiv(num_words, _WORDS))
    with torch.cuda.device_of(boxes_xyxy):
        # Without fused multiply-adds: an overlap at the threshold is decided by its rounding.
        overlap_bits[tiles](
            boxes_xyxy.contiguous(), bits, num_boxes, num_words, row_words, iou_threshold,
            ROWS=_ROWS, WORDS=_WORDS, enable_fp_fusion=False,
        )  # fmt: skip
        walk_down[(num_groups,)](
            bits, valid.contiguous().view(torch.uint8), keep.view(torch.uint8), num_boxes, num_words,
            ROW_WORDS=row_words, num_warps=1,
        )  # fmt: skip
    return keep
