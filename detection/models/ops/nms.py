"""Non-maximum suppression of a whole batch's proposals: fixed shapes in, fixed shapes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from detection.models.ops.backend import implementation_of
from detection.models.ops.boxes import pairwise_iou

# Rounds before the host is asked whether they were enough. The RPN's proposals need 5 to 15.
ROUNDS = 24
# Boxes on a CPU from which on groups are shared out among threads: some milliseconds of work.
WORTH_THREADS = 2000
# Pairs of boxes whose overlaps are computed at a time: 0.3 GB a matrix in float32.
PAIRS_AT_ONCE = 1 << 26


def suppress(
    boxes_xyxy: Tensor, scores: Tensor, valid: Tensor, per_level: Sequence[int], iou_threshold: float
) -> Tensor:
    """Greedy suppression within each image and level: which boxes are kept, bool [B, N].

    boxes_xyxy: float32 [B, N, 4], all coordinates at least 0; scores: float32 [B, N]; valid: bool [B, N], the others
    neither suppress nor are kept; per_level: how many of the N boxes belong to each level, in order. A box goes when
    its IoU with a better kept one is above iou_threshold.

    Boxes are first shifted by level * (largest coordinate of the image + 1) in float32, as mmcv's batched_nms does:
    the rounding of that shift decides pairs at the threshold.
    """
    largest = torch.where(valid[..., None], boxes_xyxy, 0.0).amax(dim=(1, 2))
    steps = (largest + 1)[:, None, None]
    levels = boxes_xyxy.split(list(per_level), dim=1)
    shifted = torch.cat([boxes + level * steps for level, boxes in enumerate(levels)], dim=1)
    ranking = torch.where(valid, scores, -torch.inf)
    run = {"per_level": level_by_level, "rounds": in_rounds, "triton": by_triton}
    keep = run[implementation_of("nms", boxes_xyxy.device)](shifted, ranking, per_level, iou_threshold)
    return keep & valid


# One operator with a result of fixed shape, so that compilers and profilers see a step without data-dependent shapes.
suppress_within_levels = torch.library.custom_op("detection::suppress_within_levels", suppress, mutates_args=())


@suppress_within_levels.register_fake
def _(boxes_xyxy: Tensor, scores: Tensor, valid: Tensor, per_level: Sequence[int], iou_threshold: float) -> Tensor:
    return torch.empty_like(valid)


def kept_within_levels(
    boxes_xyxy: Tensor, scores: Tensor, valid: Tensor, per_level: Sequence[int], iou_threshold: float
) -> Tensor:
    """As `suppress`, in a form that can be compiled."""
    if torch.compiler.is_compiling() and implementation_of("nms", boxes_xyxy.device) == "triton":
        # Whose shapes are fixed: what is around the kernels is compiled with the rest.
        return suppress(boxes_xyxy, scores, valid, per_level, iou_threshold)
    return suppress_within_levels(boxes_xyxy, scores, valid, per_level, iou_threshold)


def level_by_level(boxes: Tensor, ranking: Tensor, per_level: Sequence[int], iou_threshold: float) -> Tensor:
    """As `in_rounds`, but boxes of ranking -inf may be kept: a call of torchvision's operator a level, on a CPU."""
    # The operator's time grows with the square of its boxes (0.4 s for two images at once, 0.1 s for their
    # levels one by one), and on the CPU a call makes no one wait.
    keep = torch.zeros(ranking.shape, dtype=torch.bool, device=ranking.device)
    groups = [
        group
        for image in range(len(boxes))
        for group in zip(
            boxes[image].split(list(per_level)),
            ranking[image].split(list(per_level)),
            keep[image].split(list(per_level)),
            strict=True,
        )
    ]

    def kept(group: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torchvision.ops.nms(group[0], group[1], iou_threshold)

    num_threads = torch.get_num_threads() if boxes.device.type == "cpu" else 1
    if num_threads > 1 and ranking.numel() >= WORTH_THREADS:
        # The operator has one thread, and lets go of Python's lock.
        with ThreadPoolExecutor(num_threads) as pool:
            found = list(pool.map(kept, groups))
    else:
        found = [kept(group) for group in groups]
    for group, places in zip(groups, found, strict=True):
        group[2].index_fill_(0, places, True)
    return keep


def by_triton(boxes: Tensor, ranking: Tensor, per_level: Sequence[int], iou_threshold: float) -> Tensor:
    """As `in_rounds`, in two kernels that need no rounds, and without the question."""
    return _all_groups(boxes, ranking, per_level, iou_threshold, _keep_best_by_triton)


@torch.library.custom_op("detection::keep_best", mutates_args=())
def _keep_best_by_triton(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    from detection.models.ops.triton.nms import keep_best

    return keep_best(boxes, valid, threshold)


@_keep_best_by_triton.register_fake
def _(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(valid)


def in_rounds(boxes: Tensor, ranking: Tensor, per_level: Sequence[int], iou_threshold: float) -> Tensor:
    """Greedy suppression of all images and levels at once, on a device that should not be waited for: keep bool [B, N].

    boxes: float32 [B, N, 4]; ranking: float32 [B, N], -inf where a box takes no part.

    A box is kept where no better box that is kept overlaps it. Round after round that rule is applied to all boxes,
    beginning with all of them kept. After n rounds it holds for every box at the end of a chain of up to n boxes, each
    overlapping the next; when a round changes nothing the result is that of the greedy loop. Whether it did is the
    training step's one question to the device.
    """
    return _all_groups(boxes, ranking, per_level, iou_threshold, _rounds_until_settled)


def _all_groups(
    boxes: Tensor,
    ranking: Tensor,
    per_level: Sequence[int],
    iou_threshold: float,
    keep_best: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    longest = max(per_level)
    levels = zip(boxes.split(list(per_level), dim=1), ranking.split(list(per_level), dim=1), strict=True)
    padded_boxes, padded_ranking = [], []
    for level_boxes, level_ranking in levels:
        missing = longest - level_ranking.shape[1]
        padded_boxes.append(F.pad(level_boxes, (0, 0, 0, missing)))
        padded_ranking.append(F.pad(level_ranking, (0, missing), value=-torch.inf))
    # Groups of boxes that can suppress each other: [B * levels, longest].
    ranked, order = torch.stack(padded_ranking, dim=1).flatten(0, 1).sort(dim=1, descending=True, stable=True)
    grouped = torch.stack(padded_boxes, dim=1).flatten(0, 1).gather(1, order[..., None].expand(-1, -1, 4))
    # Not ">": a score that is not a number goes on, as with the operator.
    keep = keep_best(grouped, ranked != -torch.inf, _float32_not_above(iou_threshold))
    keep = torch.zeros_like(keep).scatter_(1, order, keep).view(len(boxes), len(per_level), longest)
    return torch.cat([keep[:, level, :count] for level, count in enumerate(per_level)], dim=1)


@torch.compiler.assume_constant_result
def _float32_not_above(threshold: float) -> float:
    """The largest float32 number up to a threshold: torchvision's operator compares overlaps with one in float64."""
    rounded = np.float32(threshold)
    return float(np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > threshold else rounded)


def _rounds_until_settled(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    rounds = ROUNDS
    while True:
        keep, is_settled = _rounds_of_all(boxes, valid, threshold, rounds)
        if is_settled:
            return keep
        rounds *= 4


def _rounds_of_all(boxes: Tensor, valid: Tensor, threshold: float, rounds: int) -> tuple[Tensor, Tensor]:
    """`rounds` rounds for groups of boxes [G, N, 4], best first: keep bool [G, N], and whether the last round changed
    nothing, a bool scalar."""
    num_groups = max(1, PAIRS_AT_ONCE // max(1, boxes.shape[1] ** 2))
    kept, is_settled = [], []
    for some_boxes, some_valid in zip(boxes.split(num_groups), valid.split(num_groups), strict=True):
        overlaps = pairwise_iou(some_boxes, some_boxes) > threshold
        # [G, i, j]: whether box i, where it is kept, suppresses the worse box j; as numbers, for a matrix product.
        suppresses = overlaps.triu_(1).to(torch.bfloat16)
        keep = before = some_valid
        for _ in range(rounds):
            before = keep
            is_suppressed = torch.bmm(keep[:, None].to(torch.bfloat16), suppresses)[:, 0] > 0
            keep = some_valid & ~is_suppressed
        kept.append(keep)
        is_settled.append((keep == before).all())
    return torch.cat(kept), torch.stack(is_settled).all()
