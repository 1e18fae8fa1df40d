"""The self-check of the Triton kernels: small problems, solved by each kernel and by the plain code it stands for.

A GPU, its driver, or a missing C compiler (Triton builds its launchers with it) can each spoil the kernels, and none of
that is known before. So a GPU runs them only after they have given the plain code's results on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models.ops import mask_crops, nms
from detection.models.ops.backend import Verdict, gpu_number, verdicts
from detection.models.ops.matcher import MaxIoUAssigner
from detection.models.ops.roi_align import RoIAlign, roi_levels

SWITCH = "DETECTION_TRITON"
"""Environment variable; 0 turns the kernels off."""

# As many as a training has in a group and in a cell: kernels are compiled for such numbers.
NUM_BOXES, NUM_CHANNELS = 2000, 64
_STRIDES = (4, 8, 16, 32)
_WIDTH, _HEIGHT = 160, 96


def uses_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go through Triton kernels. The first call for a GPU takes seconds."""
    return check_kernels(device).usable


def describe_kernels(device: torch.device) -> str:
    """One line about the kernels of a GPU; "" for other devices, which have none."""
    return check_kernels(device).reason


def check_kernels(device: torch.device) -> Verdict:
    """Checks the kernels of a GPU, the first time it is asked about, and tells `backend`, which chooses by it."""
    if device.type != "cuda":
        return Verdict(False, "")
    index = gpu_number(device)
    if index not in verdicts:
        verdicts[index] = _verdict(torch.device("cuda", index))
    return verdicts[index]


def _verdict(device: torch.device) -> Verdict:
    if os.environ.get(SWITCH, "1") == "0":
        return Verdict(False, f"PyTorch's operators ({SWITCH}=0)")
    # The comparison reads results, which must not count as waits of the training step.
    sync_debug_mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        # A new thread has gradients on and autocast off, whatever the caller has.
        with ThreadPoolExecutor(1) as thread:
            problem = thread.submit(_problem, device).result()
    finally:
        torch.cuda.set_sync_debug_mode(sync_debug_mode)
    if problem:
        return Verdict(False, f"PyTorch's operators, as Triton's kernels do not work here: {problem}")
    return Verdict(True, "Triton, checked on this GPU against PyTorch's operators")


def _problem(device: torch.device) -> str:
    """What is wrong with the kernels on `device`; "" where nothing is."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        # torchvision's deterministic RoIAlign is another one, which takes hours.
        torch.use_deterministic_algorithms(False)
        with torch.cuda.device(device):
            wrong = kernels_that_differ(device)
    except Exception as error:  # whatever it is, training can do without
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return f"{', '.join(wrong)}: other results" if wrong else ""


def kernels_that_differ(device: torch.device) -> list[str]:
    """The kernels, by what they do, that give other results on `device` than the plain code does there."""
    checks = {
        "suppression": _suppression_agrees,
        "assignment": _assignment_agrees,
        "RoIAlign": _pooling_agrees,
        "ends of convolutions": _ends_agree,
        "crops of masks": _crops_agree,
    }
    return [name for name, agrees in checks.items() if not agrees(device)]


def _ends_agree(device: torch.device) -> bool:
    from detection.models.ops.triton.epilogue import finish_convolution

    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(3, 2, NUM_CHANNELS, 15, 17, generator=generator).to(device)
    bias = torch.randn(NUM_CHANNELS, generator=generator).to(device)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        out, residual, weights = (each.to(dtype, memory_format=torch.channels_last) for each in maps)
        for with_bias, with_residual, relu in ((True, False, True), (True, True, True), (True, False, False)):
            leaves = [each.clone().requires_grad_() for each in (out, bias, residual)]
            ours = finish_convolution(
                leaves[0] * 1, leaves[1] if with_bias else None, leaves[2] if with_residual else None, relu=relu
            )
            plain = leaves[0].float() + leaves[1][:, None, None]
            plain = plain + leaves[2].float() if with_residual else plain
            plain = F.relu(plain) if relu else plain
            pairs = [(ours.detach().float(), plain.detach())]
            gradients = [
                torch.autograd.grad((each.float() * weights.float()).sum(), leaves, allow_unused=True)
                for each in (ours, plain)
            ]
            pairs += zip(*gradients, strict=True)
            for a, b in pairs:
                if a is not None and not torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance):
                    return False
    return True


def _boxes(generator: torch.Generator, *shape: int, device: torch.device) -> Tensor:
    """Boxes at whole pixels: many overlap, some are equal, and overlaps at a threshold exactly are among them."""
    corners = torch.rand(*shape, 2, generator=generator) * torch.tensor([_WIDTH - 40.0, _HEIGHT - 30.0])
    sides = torch.rand(*shape, 2, generator=generator) * torch.tensor([40.0, 30.0])
    return torch.cat((corners, corners + sides), dim=-1).round().to(device)


def _suppression_agrees(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    per_level = [NUM_BOXES, 40]
    boxes = _boxes(generator, 2, sum(per_level), device=device)
    ranking = torch.randn(2, sum(per_level), generator=generator).to(device)
    ranking[0, 5:40] = -torch.inf
    return all(
        torch.equal(
            nms.by_triton(boxes, ranking, per_level, threshold), nms.in_rounds(boxes, ranking, per_level, threshold)
        )
        for threshold in (0.3, 0.5, 0.7)
    )


def _assignment_agrees(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(1)
    gt_boxes = _boxes(generator, 3, 9, device=device)
    gt_boxes[:, 4] = gt_boxes[:, 2]
    gt_valid = torch.tensor([[True] * 9, [True] * 3 + [False] * 6, [False] * 9], device=device)
    every = _boxes(generator, 3, 700, device=device)
    every[:, :9] = gt_boxes
    some = (torch.rand(3, 700, generator=generator) > 0.3).to(device)
    for candidates, valid, low_quality_iou in ((every, some, None), (every[:1], some, 0.3), (every, None, 0.0)):
        assigner = MaxIoUAssigner(0.7, 0.3, low_quality_iou)
        found = assigner.best_by_triton(gt_boxes, gt_valid, candidates, valid)
        expected = assigner.best_in_blocks(gt_boxes, gt_valid, candidates, valid)
        for ours, plain in zip(found, expected, strict=True):
            if ours is not None and plain is not None and not torch.equal(ours, plain):
                return False
    return True


def _pooling_agrees(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(2)
    sizes = [(_HEIGHT // stride, _WIDTH // stride) for stride in _STRIDES]
    maps = [torch.randn(2, NUM_CHANNELS, *size, generator=generator).to(device) for size in sizes]
    boxes = _boxes(generator, 2, 12, device=device)
    boxes[0, 0] = 0.0
    boxes[0, 1] = torch.tensor([0.0, 0.0, _WIDTH, 20.0])
    levels = roi_levels(boxes, finest_scale=10.0, eps_inside_log=True)
    half = [each.bfloat16() for each in maps]
    for ratio, aligned in ((0, True), (2, False)):
        roi_align = RoIAlign(7, ratio, aligned, _STRIDES)
        ours, our_gradient = _pooled(roi_align.by_triton, maps, boxes, levels)
        plain, plain_gradient = _pooled(roi_align.by_operator, maps, boxes, levels)
        of_half, _ = _pooled(roi_align.by_triton, half, boxes, levels)
        of_its_values, _ = _pooled(roi_align.by_operator, [each.float() for each in half], boxes, levels)
        if not (
            torch.allclose(ours, plain, rtol=1e-4, atol=1e-4)
            and torch.allclose(our_gradient, plain_gradient, rtol=1e-3, atol=1e-3)
            and torch.allclose(of_half.float(), of_its_values, rtol=1e-2, atol=1e-2)
        ):
            return False
    return True


def _crops_agree(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(4)
    number, side = 4, 12
    rectangles = torch.cat((torch.arange(2 * number).view(-1, 2), torch.full((number, 2), side)), dim=1)
    rectangles[0, 2:] = 0
    bits = torch.randint(0, 2, (number * side**2,), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[2.0, 3, 9, 9], [0, 0, 24, 16], [5, 5, 5, 9], [1.25, 4.5, 9.75, 17]])
    offsets = side**2 * torch.arange(number)
    crops = mask_crops.MaskCrops(*(each.to(device) for each in (boxes, bits, offsets, rectangles)))
    for aligned in (True, False):
        found = mask_crops.by_triton(crops, (16, 24), size=5, aligned=aligned)
        expected = mask_crops.by_matrices(crops, (16, 24), size=5, aligned=aligned)
        if not torch.allclose(found, expected, rtol=0, atol=1e-5):
            return False
    return True


def _pooled(
    pool: Callable[[Sequence[Tensor], Tensor, Tensor], Tensor], maps: Sequence[Tensor], boxes: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """The pooled RoIs, and the gradient of a weighted sum of them, by the maps' cells."""
    own_maps = [each.detach().requires_grad_() for each in maps]
    pooled = pool(own_maps, boxes, levels)
    weights = torch.linspace(-1, 1, pooled.numel(), device=pooled.device).view_as(pooled)
    gradients = torch.autograd.grad((pooled * weights).sum(), own_maps)
    return pooled.detach(), torch.cat([each.flatten() for each in gradients])
