"""torchvision's training step, and the weights that both models start from."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import checkout  # noqa: F401
from benchmarks.timing import BenchmarkError
from benchmarks.variants import (
    ASSIGNMENT,
    BACKWARD,
    BOX_HEAD,
    FEATURES,
    INPUT,
    LOSSES,
    OPTIMIZER,
    PROPOSALS,
    ROI_ALIGN,
    RPN_HEAD,
    HostMemory,
    Place,
    Variant,
    Work,
    to_host,
)
from data import RawBatch
from detection.engine.accelerate.compile import prepare_compiler
from detection.engine.optim.amp import Precision
from detection.models.config import model_config

TorchvisionInputs = tuple[list[Tensor], list[dict[str, Tensor]]]

TORCHVISION_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
_RESIDUAL_SCALE = 0.3  # of each block's last norm, so that random weights give activations of ordinary size
_LOGIT_STD = 1.0  # lets about 2 of 100 class scores pass the score threshold, as after training


class TorchvisionStep:
    """torchvision's model in the step of its reference training: model, finite check, backward, SGD, losses read.

    It is given float images that are decoded, scaled to 0..1 and flipped already, because its own loader's workers do
    that; normalization and resize are inside its model.
    """

    def __init__(self, variant: Variant, work: Work) -> None:
        self.variant, self.work = variant, work
        self.model = torchvision_model(work.model, work.num_classes, work.min_size, work.max_size)
        self.model.load_state_dict(torch.load(work.weights, weights_only=True))
        self.model.to(work.device).to(memory_format=variant.memory_format)
        if variant.channels_last:
            batch_images = self.model.transform.batch_images
            self.model.transform.batch_images = lambda *args, **kwargs: batch_images(*args, **kwargs).contiguous(
                memory_format=torch.channels_last
            )
        if variant.compiled:
            prepare_compiler()
            self.model.backbone.compile(dynamic=False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=2e-5, momentum=0.9, weight_decay=1e-4)
        self.precision = Precision(variant.amp, work.device)
        self._decoded: list[tuple[RawBatch, TorchvisionInputs]] = []
        self._losses: dict[str, float] = {}

    def settle(self, run: Callable[[], object]) -> None:
        if self.work.device.type == "cpu":
            HostMemory.switch(False)

    def train(self, batches: Sequence[RawBatch]) -> None:
        self.model.train()
        for batch in batches:
            images, targets = self.take_input(batch)
            with self.precision.autocast():
                losses = self.model(images, targets)
                loss = torch.stack(list(losses.values())).sum()
            if not math.isfinite(loss.item()):
                raise BenchmarkError(f"{self.variant.name}: the loss is not finite")
            self.optimizer.zero_grad()
            self.precision.backward(loss)
            self.precision.step(self.optimizer)
            self._losses = {name: value.item() for name, value in losses.items()}

    def take_input(self, batch: RawBatch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images and targets onto the device."""
        device = self.work.device
        images, targets = self._inputs(batch)
        return [image.to(device) for image in images], [
            {name: value.to(device) for name, value in target.items()} for target in targets
        ]

    def _inputs(self, batch: RawBatch) -> TorchvisionInputs:
        """What its workers would hand over; made once, in the untimed round."""
        for known, inputs in self._decoded:
            if known is batch:
                return inputs
        self._decoded.append((batch, torchvision_inputs(batch, self.work.device)))
        return self._decoded[-1][1]

    @torch.inference_mode()
    def detect(self, batches: Sequence[RawBatch]) -> None:
        self.model.eval()
        for batch in batches:
            images, _ = self.take_input(batch)
            with self.precision.autocast():
                detections = self.model(images)
            for detection in detections:
                to_host(detection)

    def losses(self) -> dict[str, float]:
        return self._losses

    def stages(self) -> list[Place]:
        rpn_, roi_heads_ = self.model.rpn, self.model.roi_heads
        return [
            (self, "take_input", INPUT),
            (self.model.transform, "forward", INPUT),
            (self.model, "backbone", FEATURES),
            (rpn_, "head", RPN_HEAD),
            (rpn_, "anchor_generator", PROPOSALS),
            (rpn_.box_coder, "decode", PROPOSALS),
            (rpn_, "filter_proposals", PROPOSALS),
            (rpn_, "assign_targets_to_anchors", ASSIGNMENT),
            (rpn_, "fg_bg_sampler", ASSIGNMENT),
            (rpn_, "compute_loss", LOSSES),
            (roi_heads_, "select_training_samples", ASSIGNMENT),
            (roi_heads_, "box_roi_pool", ROI_ALIGN),
            (roi_heads_, "box_head", BOX_HEAD),
            (roi_heads_, "box_predictor", BOX_HEAD),
            (torchvision_roi_heads, "fastrcnn_loss", LOSSES),
            (self.precision, "backward", BACKWARD),
            (self.optimizer, "zero_grad", OPTIMIZER),
            (self.precision, "step", OPTIMIZER),
        ]


def torchvision_inputs(batch: RawBatch, device: torch.device) -> TorchvisionInputs:
    """The images of `batch` at native size, float [3, h, w] in 0..1, and their boxes, as torchvision takes them."""
    images, targets, start = [], [], 0
    for row, ((height, width), flip) in enumerate(zip(batch.native_sizes, batch.flips, strict=True)):
        end = start + height * width * 3
        image = batch.pixels[start:end].view(height, width, 3).permute(2, 0, 1).float() / 255
        image = (image.flip(-1) if flip else image).contiguous()
        valid = batch.valid[row]
        target = {
            "boxes": batch.boxes_xyxy[row, valid] / batch.scale_factors[row].repeat(2),
            "labels": batch.labels[row, valid] + 1,
        }
        if device.type == "cuda":
            image, target = image.pin_memory(), {name: value.pin_memory() for name, value in target.items()}
        images.append(image)
        targets.append(target)
        start = end
    return images, targets


def torchvision_model(name: str, num_classes: int, min_size: int, max_size: int) -> TorchvisionFasterRCNN:
    """What torchvision's fasterrcnn_resnet50_fpn builds around pretrained weights: frozen batch norm, stem and first
    stage frozen; with the backbone of our model `name`. The weights are random."""
    backbone_name = model_config(name).backbone
    if backbone_name not in TORCHVISION_BACKBONES:
        raise BenchmarkError(f"--model {name}: torchvision has no detector with {backbone_name} to stand beside it")
    backbone = resnet_fpn_backbone(backbone_name=backbone_name, weights=None, trainable_layers=3)
    return TorchvisionFasterRCNN(backbone, num_classes + 1, min_size=min_size, max_size=max_size)


def write_starting_weights(file: Path, work_model: str, num_classes: int, batch: RawBatch) -> None:
    """Random weights for torchvision's model, calmed so that activations, proposals and scores are of ordinary size."""
    torch.manual_seed(0)
    model = torchvision_model(work_model, num_classes, *_small_sizes(batch))
    for block in model.backbone.body.modules():
        last_norm = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        if last_norm is not None:
            last_norm.weight.fill_(_RESIDUAL_SCALE)
    hidden: list[Tensor] = []
    handle = model.roi_heads.box_predictor.cls_score.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    images, _ = torchvision_inputs(batch, torch.device("cpu"))
    with torch.inference_mode():
        model.eval()(images[:1])
    handle.remove()
    classifier = model.roi_heads.box_predictor.cls_score
    length = hidden[0].square().sum(dim=1).mean().sqrt().item()
    nn.init.normal_(classifier.weight, std=_LOGIT_STD / max(length, 1e-6))
    torch.save(model.state_dict(), file)


@contextmanager
def starting_weights(work_model: str, num_classes: int, batch: RawBatch) -> Iterator[Path]:
    """A file of them, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        file = Path(folder) / "weights.pth"
        write_starting_weights(file, work_model, num_classes, batch)
        yield file


def _small_sizes(batch: RawBatch) -> tuple[int, int]:
    return min(batch.resized_sizes[0]), max(batch.resized_sizes[0])
