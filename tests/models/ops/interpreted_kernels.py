"""What the Triton kernels compute, in Triton's interpreter: run by test_kernels.py, which reads the answers as JSON.

A process of its own, because TRITON_INTERPRET=1 has to be set before Triton is imported.
"""

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models import ImageBatch, TargetBatch, build_model
from detection.models.ops import nms, selfcheck
from detection.models.ops.backend import TRITON, implementation
from detection.models.ops.feature_table import cell_table, rows_of_table, shared_table
from detection.models.ops.roi_align import RoIAlign, roi_levels
from detection.models.ops.triton import epilogue
from detection.models.ops.triton import mask_crops as mask_kernels
from detection.models.ops.triton import matcher as matcher_kernels
from detection.models.ops.triton import nms as nms_kernels
from detection.models.ops.triton import roi_align as roi_kernels

CPU = torch.device("cpu")


def boxes(seed: int, *shape: int, side: int = 12, place: int = 30) -> Tensor:
    """Boxes at whole pixels among few places: many overlap, are equal, or meet a threshold exactly."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, place, (*shape, 2), generator=generator)
    return torch.cat((corners, corners + torch.randint(0, side, (*shape, 2), generator=generator)), dim=-1).float()


# The interpreter takes its time.
selfcheck.NUM_BOXES, selfcheck.NUM_CHANNELS = 110, 8


def kernels_that_differ() -> list[str]:
    return selfcheck.kernels_that_differ(CPU)


def broken_kernels_are_found() -> list[str]:
    """Each kernel's result is spoilt in one place."""

    def spoilt(function: Callable[..., Any], spoil: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: spoil(function(*args, **kwargs))

    def other_index(found: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        found[1][0, 0] += 1
        return found

    def other_bit(keep: Tensor) -> Tensor:
        keep[0, 0] = ~keep[0, 0]
        return keep

    with (
        mock.patch.object(nms_kernels, "keep_best", spoilt(nms_kernels.keep_best, other_bit)),
        mock.patch.object(matcher_kernels, "best_matches", spoilt(matcher_kernels.best_matches, other_index)),
        mock.patch.object(
            roi_kernels, "pool_from_table", spoilt(roi_kernels.pool_from_table, lambda pooled: pooled * 1.01)
        ),
        mock.patch.object(epilogue, "finish_convolution", spoilt(epilogue.finish_convolution, lambda out: out + 0.1)),
        mock.patch.object(
            mask_kernels, "crop_bitmaps", spoilt(mask_kernels.crop_bitmaps, lambda covered: covered + 0.01)
        ),
    ):
        return selfcheck.kernels_that_differ(CPU)


def suppression() -> dict[str, bool]:
    """Whether each case gives what torchvision's operator gives."""
    found = {}
    for number in (1, 31, 32, 33, 70):
        for threshold in (0.3, 0.5, 0.7):
            group = boxes(number, 2, number)
            ranking = torch.randint(0, 50, (2, number), generator=torch.Generator().manual_seed(1)).float()
            ranking[:, ::7] = -torch.inf
            expected = nms.level_by_level(group, ranking, [number], threshold) & (ranking != -torch.inf)
            found[f"{number} boxes, {threshold}"] = torch.equal(
                nms.by_triton(group, ranking, [number], threshold), expected
            )
    nobody = torch.full((2, 40), -torch.inf)
    found["none valid"] = not nms.by_triton(boxes(0, 2, 40), nobody, [30, 10], 0.5).any()
    return found


def pooled() -> dict[str, list[float]]:
    """Largest differences of values and of gradients, from the product with a sparse matrix."""
    generator = torch.Generator().manual_seed(2)
    strides = (4, 8, 16, 32)
    # A number of channels that is no power of two, and more than a program takes.
    maps = [torch.randn(2, 36, 128 // stride, 160 // stride, generator=generator) for stride in strides]
    maps.append(torch.randn(2, 36, 2, 3, generator=generator))
    rois = boxes(3, 2, 6, side=120, place=100)
    rois[0, 0] = 0.0  # as empty slots are
    rois[0, 1] = torch.tensor([0.0, 50, 160, 51])
    rois[1, 3] = torch.tensor([0.0, 0, 400, 320])  # beyond the map: its samples there count as zero
    rois[0, 4] = torch.tensor([12.0, 7, 110, 115])
    rois[0, 2:4] = torch.tensor([[0.0, 0, torch.inf, 50], [-torch.inf, -torch.inf, torch.inf, torch.inf]])
    rois[1, 4:6] = torch.tensor([[torch.nan] * 4, [9.0, torch.nan, 50, 60]])
    levels = roi_levels(rois, finest_scale=20, eps_inside_log=True)
    found = {"levels": levels.unique().tolist()}
    for ratio, aligned in ((0, True), (2, False), (3, True)):
        pool = RoIAlign(7, ratio, aligned, (*strides, 64))
        results = []
        for by in (pool.by_sparse_matrix, pool.by_triton):
            table = cell_table(maps).requires_grad_()
            values = by(maps, rois, levels, table)
            weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(4))
            (gradient,) = torch.autograd.grad((values * weights).sum(), table)
            results.append((values.detach(), gradient))
        (values, gradient), (other_values, other_gradient) = results
        more = ((False, True), (True, True)) if aligned else ()
        for is_deterministic, is_shared in ((True, False), *more):
            torch.use_deterministic_algorithms(is_deterministic)
            table = cell_table(maps).requires_grad_()
            with implementation(table_gradient="shared" if is_shared else "autograd"):
                cells, of_table = shared_table(table)
            pooled_sum = (pool.by_triton(maps, rois, levels, cells, of_table) * weights).sum()
            others_sum = (rows_of_table(cells, torch.arange(9), of_table) * 3).sum()
            (of_both,) = torch.autograd.grad(pooled_sum + others_sum, table)
            torch.use_deterministic_algorithms(False)
            of_both[:9] -= 3
            key = f"in units {is_deterministic}, shared {is_shared}, {ratio}, {aligned}"
            found[key] = [0.0, float((of_both - other_gradient).abs().max())]
        found[f"{ratio}, {aligned}"] = [
            float((values - other_values).abs().max()),
            float((gradient - other_gradient).abs().max()),
        ]
    return found


def ends() -> dict[str, float]:
    """Largest differences of outputs and gradients from the same written out, for more cells than programs."""
    epilogue.MOST_SUMS = 3
    generator = torch.Generator().manual_seed(5)
    found = {}
    for channels, height, width in ((130, 21, 18), (5, 40, 50), (64, 16, 9)):
        shape = (2, channels, height, width)
        out, residual, weights = (torch.randn(shape, generator=generator) for _ in range(3))
        bias = torch.randn(channels, generator=generator)
        for has_bias, has_residual, relu in ((1, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 0, 1)):
            leaves = [
                out.clone(memory_format=torch.channels_last).requires_grad_(),
                bias.clone().requires_grad_(),
                residual.clone().requires_grad_(),  # channels first, as it may come
            ]
            given = (leaves[1] if has_bias else None, leaves[2] if has_residual else None)
            ours = epilogue.finish_convolution(leaves[0] * 1, *given, relu=bool(relu))
            plain = leaves[0] + (leaves[1][:, None, None] if has_bias else 0) + (leaves[2] if has_residual else 0)
            plain = F.relu(plain) if relu else plain
            gradients = [
                torch.autograd.grad((each * weights).sum(), leaves, allow_unused=True) for each in (ours, plain)
            ]
            pairs = [(ours, plain), *((a, b) for a, b in zip(*gradients, strict=True) if a is not None)]
            found[f"{shape} {has_bias} {has_residual} {relu}"] = max(
                float((a - b).detach().abs().max()) for a, b in pairs
            )
    return found


def training_step() -> dict[str, Any]:
    """Losses and gradients of a whole step with all kernels, beside the same step without any."""
    torch.manual_seed(0)
    model = build_model(
        "faster_rcnn_r18_fpn", 5, fpn_channels=16, roi_hidden_channels=32, rpn_samples_per_image=32,
        roi_samples_per_image=16, rpn_nms_pre_train=60, rpn_proposals_train=40,
    ).train()  # fmt: skip
    torch.nn.init.normal_(model.rpn.deltas.weight, std=0.1)
    torch.nn.init.normal_(model.rpn.objectness.weight, std=0.1)
    images = ImageBatch(
        torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)),
        torch.tensor([[64, 96], [60, 50]]),
    )
    truth = torch.tensor([[[8.0, 8, 40, 44], [50, 3, 90, 60]], [[2.0, 2, 30, 20], [0, 0, 0, 0]]])
    targets = TargetBatch(
        truth, torch.tensor([[0, 4], [2, 0]]), torch.tensor([[True, True], [True, False]]), torch.tensor([3, 4])
    )

    def step() -> tuple[dict[str, float], Tensor]:
        model.zero_grad()
        losses = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return {name: float(value) for name, value in losses.items()}, torch.cat(gradients)

    plain, plain_gradient = step()
    with (
        implementation(**TRITON),
        mock.patch.object(roi_kernels, "pool_from_table", wraps=roi_kernels.pool_from_table) as pool,
    ):
        ours, our_gradient = step()
    difference = float((our_gradient - plain_gradient).norm() / plain_gradient.norm())
    return {"plain": plain, "ours": ours, "gradient": difference, "pooled": pool.call_count}


def main() -> None:
    torch.set_num_threads(1)
    answers = {
        case.__name__: case()
        for case in (kernels_that_differ, broken_kernels_are_found, suppression, pooled, ends, training_step)
    }
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
