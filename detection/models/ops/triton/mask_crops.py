"""RoIAlign of bitmaps, of each from its own: a Triton kernel that reads the samples of each RoI and no more.

Reference and fallback: `by_matrices` in `detection.models.ops.mask_crops`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from detection.models.ops.triton.roi_align import neighbors, roi_extent


@triton.jit(do_not_specialize=["height", "width"])
def crop(
    boxes, bits, offsets, rectangles, covered, height, width,
    SIZE: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each cell's mean of its samples of the whole bitmap, height x width; a program has a RoI and a row of its cells.

    boxes: float32 [R, 4] in pixels, finite. bits: uint8 [P]. offsets: int64 [R]. rectangles: int64 [R, 4]. covered:
    float32 [R, SIZE, SIZE].
    """
    roi = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, COLUMNS)
    row = tl.program_id(1) + tl.zeros_like(place)
    box = boxes + roi * 4
    y, bin_height, rows = roi_extent(tl.load(box + 1), tl.load(box + 3), 1.0, SIZE, ALIGNED, 0)
    x, bin_width, columns = roi_extent(tl.load(box), tl.load(box + 2), 1.0, SIZE, ALIGNED, 0)
    first_x, first_y = tl.load(rectangles + roi * 4), tl.load(rectangles + roi * 4 + 1)
    crop_width, crop_height = tl.load(rectangles + roi * 4 + 2), tl.load(rectangles + roi * 4 + 3)
    bitmap = bits + tl.load(offsets + roi)

    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for sample_row in range(0, rows):
        top, bottom, top_weight, bottom_weight, is_row = neighbors(y, bin_height, rows, row, sample_row, height)
        for sample_column in range(0, columns):
            left, right, left_weight, right_weight, is_column = neighbors(
                x, bin_width, columns, place, sample_column, width
            )
            for corner in tl.static_range(4):
                in_y, weight = (top - first_y, top_weight) if corner < 2 else (bottom - first_y, bottom_weight)
                in_x = (left if corner % 2 == 0 else right) - first_x
                weight = weight * (left_weight if corner % 2 == 0 else right_weight)
                # Outside of its crop a bitmap is zero.
                inside = (in_x >= 0) & (in_x < crop_width) & (in_y >= 0) & (in_y < crop_height) & is_column & is_row
                bit = tl.load(bitmap + in_y * crop_width + in_x, mask=inside & (place < SIZE), other=0)
                total += bit.to(tl.float32) * weight
    total = tl.div_rn(total, tl.maximum(rows * columns, 1).to(tl.float32))
    tl.store(covered + (roi * SIZE + row) * SIZE + place, total, mask=place < SIZE)


def crop_bitmaps(
    boxes_xyxy: Tensor,
    bits: Tensor,
    offsets: Tensor,
    rectangles: Tensor,
    image_size: tuple[int, int],
    *,
    size: int,
    aligned: bool,
) -> Tensor:
    """`MaskCrops`, within images of height and width `image_size`, to float32 [R, size, size]."""
    covered = torch.empty((len(offsets), size, size), device=bits.device)
    with torch.cuda.device_of(bits):
        crop[(len(offsets), size)](
            boxes_xyxy.contiguous(), bits, offsets.contiguous(), rectangles.contiguous(), covered, *image_size,
            SIZE=size, ALIGNED=aligned, COLUMNS=triton.next_power_of_2(size),
        )  # fmt: skip
    return covered
