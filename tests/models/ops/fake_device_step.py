"""A training step on a GPU that is not there: run by test_fake_device.py, which reads the answers as JSON.

A process of its own, because the device stays with the process.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from data import RawBatch, assemble
from data.loading.batch import BatchPlan
from data.transforms.color import Distortion, Jitter
from detection.engine.metrics.step_metrics import StepMetrics
from detection.engine.optim.amp import Precision, gradient_norm
from detection.engine.optim.ema import AveragedModel
from detection.engine.optim.nonfinite import NonFiniteGuard
from detection.engine.optim.optimizer import build_optimizer, set_learning_rate, trained_parameters
from detection.models import FasterRCNN, ImageBatch, MaskBatch, TargetBatch, build_model
from detection.models.ops import nms
from gpu_checks.fake_device import move, pretend_gpu
from schedules import load_schedule


class TensorsFromNumbers(torch.overrides.TorchFunctionMode):
    """Refuses tensors made on a device from Python's numbers, each of which is a blocking copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func not in (torch.tensor, torch.as_tensor) or kwargs.get("device") is None, "a blocking copy"
        return func(*args, **kwargs)


def raw_batch() -> RawBatch:
    sizes = [(60, 90), (48, 48)]
    plan = BatchPlan(
        scaled_sizes=np.array([(120, 180), (96, 96)]), offsets=np.array([(0, 0), (4, 6)]),
        sizes=np.array([(120, 180), (90, 90)]), flips=np.array([False, True]), vertical_flips=np.array([True, False]),
        padded_size=(128, 192), iteration=0, epoch=0, indices=np.array([0, 1]), places=np.array([0, 1]),
        sample_keys=np.array([3, 4]), num_box_rows=3,
    )  # fmt: skip
    return RawBatch(
        plan=plan,
        pixels=torch.zeros(sum(3 * height * width for height, width in sizes), dtype=torch.uint8),
        native_sizes=sizes, sizes=torch.from_numpy(plan.sizes), boxes_xyxy=torch.zeros(2, 3, 4),
        labels=torch.zeros(2, 3, dtype=torch.int64), valid=torch.ones(2, 3, dtype=torch.bool),
        image_ids=torch.tensor([1, 2]), places=torch.tensor([0, 1]), sample_keys=torch.tensor([3, 4]),
        scale_factors=torch.ones(2, 2), mask_bits=torch.ones(9, dtype=torch.uint8),
        mask_offsets=torch.zeros(2, 3, dtype=torch.int64), mask_rectangles=torch.tensor([5, 6, 3, 3]).repeat(2, 3, 1),
    )  # fmt: skip


def train(name: str, batch: Any, device: torch.device, amp: str, **settings: Any) -> dict[str, Any]:
    """One iteration, with everything that can take part in one."""
    model: FasterRCNN = build_model(name, 5, fpn_channels=32, roi_hidden_channels=32, **settings).train()
    move(model, device)
    schedule = load_schedule("1x")
    optimizer = build_optimizer(model, schedule)
    set_learning_rate(optimizer, schedule, 3, 100)
    precision = Precision(amp, device)
    guard = NonFiniteGuard(model, skips=True)
    before = {key: value.dtype for key, value in model.state_dict().items()}
    ema = AveragedModel.__new__(AveragedModel)
    ema.decay, ema.module = 0.5, model
    records = StepMetrics(
        mock.Mock(world_size=1), images_per_iteration=2, gradient_may_overflow=False, skips_nonfinite=True
    )
    guard.begin()
    images = ImageBatch(batch.pixels, batch.sizes)
    masks = MaskBatch(batch.mask_bits, batch.mask_offsets, batch.mask_rectangles)
    targets = TargetBatch(batch.boxes_xyxy, batch.labels, batch.valid, batch.sample_keys, masks)
    with precision.autocast():
        model(images, targets)  # anchors of a new size are made on the host
        with TensorsFromNumbers():
            losses = model(images, targets)
    precision.backward(guard.mark(torch.stack(list(losses.values())).sum()))
    parameters = trained_parameters(optimizer)
    grad_norm = gradient_norm(parameters, clip_to=35.0)
    skip = guard.finish(grad_norm)
    # The optimizer's own step is one operator of PyTorch's, which fake tensors have no shapes for.
    ema.update(model, 3, skip)
    records.add(losses, grad_norm, [1, 2], epoch=0, iteration=3, lr=0.1, data_seconds=0.0)
    return {
        "losses": sorted(losses),
        "devices": sorted({str(p.grad.device) for p in parameters if p.grad is not None} | {str(grad_norm.device)}),
        "without gradient": sum(p.grad is None for p in parameters),
        "dtypes kept": before == {key: value.dtype for key, value in model.state_dict().items()},
    }


def main() -> None:
    device, mode = pretend_gpu()
    found: dict[str, Any] = {}
    with mode:
        raw = raw_batch()
        batch = assemble(raw, device)
        found["assembled on"] = sorted({str(t.device) for t in (batch.pixels, batch.sizes, batch.labels)})
        distorted = Distortion(9.0, 1.2, 0.8, 0.03, 1.1, (2, 0, 1))
        jittered = Jitter(1.1, 0.9, 1.2, 0.02, ("hue", "contrast", "saturation", "brightness"))
        batch = assemble(replace(raw, plan=replace(raw.plan, colors=(distorted, jittered))), device)
        # Its operator has a fake of its own, which would hide what it does.
        try:
            boxes, scores, valid = torch.zeros(2, 9, 4), torch.zeros(2, 9), torch.ones(2, 9, dtype=torch.bool)
            nms.suppress(boxes.to(device), scores.to(device), valid.to(device), [6, 3], 0.7)
        except Exception as error:  # the question whether suppression has settled is caught in the act
            found["suppression"] = type(error).__name__
        everything = {"rpn_samples_per_image": None, "roi_samples_per_image": None}
        found["in bf16"] = train("mask_rcnn_r18_fpn", batch, device, "bf16")
        found["in torchvision's recipe"] = train("fasterrcnn_resnet18_fpn", batch, device, "off")
        found["without sampling"] = train("mask_rcnn_r18_fpn", batch, device, "off", **everything)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
