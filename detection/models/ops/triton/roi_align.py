"""RoIAlign from the table of all levels' cells, forward and backward a Triton kernel each.

With the channels last, a sample is four rows of the table: whole cache lines, read in the table's own precision. Stock
RoIAlign walks single channels of float32 maps with the channels first, which have to be made. Reference and fallback:
`RoIAlign` in `detection.models.ops.roi_align`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHANNELS = 32  # of a program, at most
_LEVELS = 4
# Cells; far above those of any map.
LONGEST_BIN = tl.constexpr(2.0**20)
# Sums in whole numbers do not depend on their order: so many of them are the largest gradient.
_LARGEST = 2.0**40
# Numbers that change with the size of a batch, for which nothing is to be compiled anew.
_GEOMETRY = [f"{name}_{level}" for name in ("start", "height", "width") for level in range(_LEVELS)]


@triton.jit
def of_level(level, first, second, third, fourth):
    """The value of four that belongs to the level."""
    return tl.where(level == 0, first, tl.where(level == 1, second, tl.where(level == 2, third, fourth)))


@triton.jit
def roi_extent(low, high, scale, size, ALIGNED: tl.constexpr, RATIO: tl.constexpr):
    """Along one axis, in cells of its map: where a RoI begins, the length of its bins, and their samples."""
    start = low * scale
    length = high * scale - start
    if ALIGNED:
        start = start - 0.5
    else:
        length = tl.maximum(length, 1.0)
    bin_length = tl.div_rn(length, size)
    samples = RATIO
    if RATIO == 0:
        # No loop over the samples of a box that is infinite or NaN; comparisons with NaN are false.
        samples = tl.where(bin_length < LONGEST_BIN, tl.ceil(bin_length), 0.0).to(tl.int32)
    return start, bin_length, samples


@triton.jit
def neighbors(start, bin_length, samples, bins, sample, map_length):
    """Along one axis, of a sample in each of the bins: the cells before and after it, their weights, and whether it is
    on the map."""
    place = start + bins * bin_length + tl.div_rn((sample + 0.5) * bin_length, samples.to(tl.float32))
    inside = (place >= -1.0) & (place <= map_length)
    place = tl.maximum(place, 0.0)
    before = tl.minimum(place.to(tl.int32), map_length - 1)
    after = tl.minimum(before + 1, map_length - 1)
    # Off the map a cell counts as zero, which a place that is NaN must not make NaN.
    fraction = tl.where(inside & (before < map_length - 1), place - before, 0.0)
    return before, after, 1.0 - fraction, fraction, inside


@triton.jit(do_not_specialize=[*_GEOMETRY, "num_rois"])
def pool(
    table, boxes, levels, pooled, unit, num_rois, num_channels,
    start_0, start_1, start_2, start_3, height_0, height_1, height_2, height_3, width_0, width_1, width_2, width_3,
    scale_0, scale_1, scale_2, scale_3,
    SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr,
    BINS: tl.constexpr, CHANNELS: tl.constexpr, BACKWARD: tl.constexpr, IN_UNITS: tl.constexpr,
):  # fmt: skip
    """Each bin's mean of its samples; BACKWARD adds the gradient of `pooled` into the table's instead.

    table: [cells, C]; BACKWARD: its gradient, float32, or with IN_UNITS int64, in units of 1 / unit (float32, one
    number). boxes: float32 [B, R, 4] in pixels. levels: int64 [B, R].
    pooled: [B * R, C, SIZE, SIZE]. start_l: the first row of a level; its maps have height_l x width_l cells, of 1 /
    scale_l pixels. A program has a RoI and a block of channels.
    """
    roi = tl.program_id(0).to(tl.int64)
    level = tl.load(levels + roi)
    height = of_level(level, height_0, height_1, height_2, height_3)
    width = of_level(level, width_0, width_1, width_2, width_3)
    scale = of_level(level, scale_0, scale_1, scale_2, scale_3)
    image = roi // num_rois
    first_row = of_level(level, start_0, start_1, start_2, start_3) + image * height * width
    box = boxes + roi * 4
    y, bin_height, rows = roi_extent(tl.load(box + 1), tl.load(box + 3), scale, SIZE, ALIGNED, RATIO)
    x, bin_width, columns = roi_extent(tl.load(box), tl.load(box + 2), scale, SIZE, ALIGNED, RATIO)
    share = 1.0 / tl.maximum(rows * columns, 1).to(tl.float32)

    place = tl.arange(0, BINS)
    is_bin = place < SIZE * SIZE
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = is_bin[:, None] & (channel < num_channels)[None, :]
    outputs = pooled + (roi * num_channels + channel)[None, :] * (SIZE * SIZE) + place[:, None]
    if BACKWARD:
        values = tl.load(outputs, mask=inside, other=0.0).to(tl.float32) * share
    else:
        values = tl.zeros([BINS, CHANNELS], dtype=tl.float32)
    for row in range(0, rows):
        top, bottom, top_weight, bottom_weight, is_row = neighbors(y, bin_height, rows, place // SIZE, row, height)
        for column in range(0, columns):
            left, right, left_weight, right_weight, is_column = neighbors(
                x, bin_width, columns, place % SIZE, column, width
            )
            on_map = inside & (is_row & is_column)[:, None]
            for corner in tl.static_range(4):
                cell_row, weight = (top, top_weight) if corner < 2 else (bottom, bottom_weight)
                cell = first_row + cell_row * width + (left if corner % 2 == 0 else right)
                weight = weight * (left_weight if corner % 2 == 0 else right_weight)
                cells = table + cell[:, None] * num_channels + channel[None, :]
                if IN_UNITS:
                    units = (values * weight[:, None] * tl.load(unit)).to(tl.int64)
                    tl.atomic_add(cells, units, mask=on_map, sem="relaxed")
                elif BACKWARD:
                    tl.atomic_add(cells, values * weight[:, None], mask=on_map, sem="relaxed")
                else:
                    values += tl.load(cells, mask=on_map, other=0.0).to(tl.float32) * weight[:, None]
    if not BACKWARD:
        tl.store(outputs, (values * share).to(pooled.dtype.element_ty), mask=inside)


def pool_from_table(
    table: Tensor,
    map_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    boxes_xyxy: Tensor,
    levels: Tensor,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    gradient_sum: Callable[[], Tensor] | None = None,
) -> Tensor:
    """RoIs pooled to [B * R, C, output_size, output_size] in the table's dtype, differentiable by the table.

    table: `cell_table` of maps with `map_sizes` (height, width); strides: of those that RoIs come from, four at most.
    boxes_xyxy: float32 [B, R, 4] in pixels; levels: int64 [B, R]. Settings as in `RoIAlign`. gradient_sum: gives the
    float32 tensor to which the gradient of the table is added; then autograd gets none. The sums of the gradient are
    taken in no fixed order, unless algorithms are to be deterministic: then in whole numbers, which needs twice the
    memory for them.
    """
    num_images, num_rois = levels.shape
    starts = [0]
    for height, width in map_sizes:
        starts.append(starts[-1] + num_images * height * width)
    last = len(strides) - 1
    used = [min(level, last) for level in range(_LEVELS)]
    geometry = (
        *(starts[level] for level in used),
        *(map_sizes[level][0] for level in used),
        *(map_sizes[level][1] for level in used),
        *(1 / strides[level] for level in used),
    )
    boxes, levels = boxes_xyxy.detach().contiguous(), levels.contiguous()
    settings = output_size, sampling_ratio, aligned
    return _PoolFromTable.apply(table, boxes, levels, num_rois, geometry, settings, gradient_sum)


class _PoolFromTable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        boxes: Tensor,
        levels: Tensor,
        num_rois: int,
        geometry: Any,
        settings: Any,
        gradient_sum: Callable[[], Tensor] | None,
    ) -> Tensor:
        table = table.contiguous()
        ctx.save_for_backward(boxes, levels)
        ctx.arguments, ctx.shape, ctx.dtype = (num_rois, geometry, settings), table.shape, table.dtype
        ctx.gradient_sum = gradient_sum
        size = settings[0]
        pooled = table.new_empty((levels.numel(), table.shape[1], size, size))
        _launch(table, boxes, levels, pooled, None, *ctx.arguments)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        boxes, levels = ctx.saved_tensors
        gradient = gradient.contiguous()
        total = None if ctx.gradient_sum is None else ctx.gradient_sum()
        if not torch.are_deterministic_algorithms_enabled():
            of_table = gradient.new_zeros(ctx.shape, dtype=torch.float32) if total is None else total
            _launch(of_table, boxes, levels, gradient, None, *ctx.arguments, backward=True)
        else:
            # Of a gradient that is not finite nothing finite comes back.
            unit = _LARGEST / gradient.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
            in_units = gradient.new_zeros(ctx.shape, dtype=torch.int64)
            _launch(in_units, boxes, levels, gradient, unit, *ctx.arguments, backward=True)
            of_table = in_units / unit if total is None else total.add_(in_units / unit)
        return None if total is not None else of_table.to(ctx.dtype), None, None, None, None, None, None


def _launch(
    table: Tensor,
    boxes: Tensor,
    levels: Tensor,
    pooled: Tensor,
    unit: Tensor | None,
    num_rois: int,
    geometry: Sequence[float],
    settings: tuple[int, int, bool],
    *,
    backward: bool = False,
) -> None:
    size, ratio, aligned = settings
    num_channels = table.shape[1]
    channels = min(_CHANNELS, triton.next_power_of_2(num_channels))
    programs = (levels.numel(), triton.cdiv(num_channels, channels))
    with torch.cuda.device_of(table):
        pool[programs](
            table, boxes, levels, pooled, unit, num_rois, num_channels, *geometry,
            SIZE=size, RATIO=ratio, ALIGNED=aligned, BINS=triton.next_power_of_2(size * size), CHANNELS=channels,
            BACKWARD=backward, IN_UNITS=unit is not None,
        )  # fmt: skip
