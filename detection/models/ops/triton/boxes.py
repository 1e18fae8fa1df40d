"""Arithmetic of boxes inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def pairwise_iou(a_x1, a_y1, a_x2, a_y2, b_x1, b_y1, b_x2, b_y2):
    """`boxes.pairwise_iou` to the last bit, where the kernel is compiled with enable_fp_fusion=False: the order of
    operations is the same. Coordinates are numbers or float32 blocks that broadcast."""
    width = tl.maximum(tl.minimum(a_x2, b_x2) - tl.maximum(a_x1, b_x1), 0.0)
    height = tl.maximum(tl.minimum(a_y2, b_y2) - tl.maximum(a_y1, b_y1), 0.0)
    intersection = width * height
    areas = (a_x2 - a_x1) * (a_y2 - a_y1) + (b_x2 - b_x1) * (b_y2 - b_y1)
    return tl.div_rn(intersection, tl.maximum(areas - intersection, 1e-6))


@triton.jit
def load_boxes(boxes, place, inside):
    """x1, y1, x2, y2 of the boxes float32 [..., 4] at `place`; zeros where not `inside`."""
    first = boxes + place * 4
    x1 = tl.load(first, mask=inside, other=0.0)
    y1 = tl.load(first + 1, mask=inside, other=0.0)
    x2 = tl.load(first + 2, mask=inside, other=0.0)
    y2 = tl.load(first + 3, mask=inside, other=0.0)
    return x1, y1, x2, y2
