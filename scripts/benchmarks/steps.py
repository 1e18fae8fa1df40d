"""The steps compared: this project's training step and torchvision's, on the same batches and starting weights."""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import detection as torchvision_detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import checkout  # noqa: F401
from benchmarks.figures import BenchmarkError
from benchmarks.scenes import open_images
from data import CocoDataset, DevicePrefetcher, RawBatch, TrainLoader
from detection.engine.accelerate.algorithm_search import AlgorithmSearch
from detection.engine.accelerate.compile import compile_for_training, prepare_compiler
from detection.engine.accelerate.cuda_graphs import cuda_step_graphs, record_detection, require_cuda_graphs
from detection.engine.distributed.comm import Processes
from detection.engine.metrics.step_metrics import StepMetrics
from detection.engine.optim.amp import Precision
from detection.engine.optim.gradient_buckets import GradientBuckets
from detection.engine.optim.gradients import GradientComputer
from detection.engine.optim.nonfinite import NonFiniteGuard
from detection.engine.optim.optimizer import build_optimizer, trained_parameters
from detection.engine.optim.update import ParameterUpdate
from detection.models import FasterRCNN, ImageBatch, build_model, load_weights, model_config
from detection.models.ops.backend import implementation
from schedules import load_schedule

Inputs = tuple[list[Tensor], list[dict[str, Tensor]]]
"""Images and targets as torchvision takes them."""
DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FUSED_OPTIMIZER, ALGORITHM_SEARCH = "fused-optimizer", "algorithm-search"
_LEARNING_RATE_ITERATION = 0  # the first of the warmup: small enough for random weights to stay finite
_TORCHVISION_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
_RESIDUAL_SCALE = 0.3  # of each block's last norm, so that random weights give activations of ordinary size
_LOGIT_STD = 1.0  # lets about 2 of 100 class scores pass the score threshold, as after training


class Switch(NamedTuple):
    """A setting that makes ours faster, and what a variant "-without" it runs instead."""

    text: str
    device: str | None = None
    """The only type of device that has it"""
    implementations: Mapping[str, str] = {}
    """Operators of detection.models.ops.backend, and which implementation of them runs"""
    of_compiled: bool = False
    """Whether only a compiled step has it"""


SWITCHES = {
    FUSED_OPTIMIZER: Switch("fused SGD"),
    ALGORITHM_SEARCH: Switch("cuDNN's search for the fastest algorithms", "cuda"),
    "sparse-roi-align": Switch("RoIAlign as a sparse matrix product", "cpu", {"roi_align": "operator"}),
    "triton-nms": Switch("NMS as a Triton kernel, instead of rounds of products", "cuda", {"nms": "rounds"}),
    "joint-nms": Switch("NMS of all images and levels at once, instead of an operator call each", "cuda",
                        {"nms": "per_level"}),
    "triton-assignment": Switch("assignment as a Triton kernel", "cuda", {"assignment": "blocks"}),
    "triton-roi-align": Switch("RoIAlign as a Triton kernel", "cuda", {"roi_align": "operator"}),
    "finished-convolutions": Switch("bias, residual and ReLU after a convolution in one pass", "cuda",
                                    {"convolution": "torch"}),
    "shared-table-gradient": Switch("one gradient of the feature table for the RPN and RoIAlign", "cuda",
                                    {"table_gradient": "autograd"}),
    "compiled-glue": Switch("compiled code between the dense parts", "cuda", {"glue": "plain"}, of_compiled=True),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One of the steps compared, e.g. "ours-bf16-cl-compile": whose, precision, memory format, compiled or not, in CUDA
    graphs or not."""

    name: str
    owner: str
    amp: str
    channels_last: bool
    compiled: bool
    graphs: bool = False
    without: str | None = None
    """Of ours: the one of SWITCHES that is off."""

    @staticmethod
    def parse(name: str) -> Variant:
        match = re.fullmatch(
            r"(ours|torchvision)-(fp32|bf16|fp16)(-cl)?(-compile)?(-graphs)?(?:-without-([a-z0-9-]+))?", name
        )
        if match is None:
            raise BenchmarkError(
                f"variant {name!r}: write ours or torchvision, then -fp32, -bf16 or -fp16, then -cl (channels last) "
                "and -compile as wanted, e.g. torchvision-bf16-cl"
            )
        owner, precision, channels_last, compiled, graphs, without = match.groups()
        if graphs is not None and owner != "ours":
            raise BenchmarkError(f"variant {name!r}: -graphs goes with ours")
        if without is not None and (owner != "ours" or without not in SWITCHES):
            raise BenchmarkError(f"variant {name!r}: -without- goes with ours and one of {', '.join(SWITCHES)}")
        amp = "off" if precision == "fp32" else precision
        return Variant(name, owner, amp, channels_last is not None, compiled is not None, graphs is not None, without)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Work:
    """What every variant is given."""

    model: str
    num_classes: int
    min_size: int
    max_size: int
    device: torch.device
    loader: TrainLoader
    batches: tuple[RawBatch, ...]
    """In host memory, pinned for a GPU, as the workers hand them over"""
    weights: Path
    """torchvision's state dict that both models start from"""


def load_work(arguments: argparse.Namespace, folder: Path, device: torch.device) -> Work:
    """The work that the arguments of `train` ask for; what it needs is made in `folder` where it is not there yet."""
    network_size, sizes = None, (arguments.min_size, arguments.max_size)
    if arguments.height is not None:
        network_size = arguments.height, arguments.width
        sizes = min(network_size), max(network_size)
    made = folder / "annotations.json"
    if made.exists():
        arguments = argparse.Namespace(**{**vars(arguments), "images": folder, "annotations": made})
    masks = model_config(arguments.model).has_masks
    dataset = open_images(arguments, folder, network_size=network_size, masks=masks)
    new_loader = partial(
        TrainLoader,
        dataset,
        min_size=sizes[0],
        max_size=sizes[1],
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        # The same batches for all variants, as train.py makes them: more sizes would be compiled in vain.
        few_shapes=arguments.compile or device.type == "cuda",
    )
    batches = tuple(new_loader().batches(0, arguments.batches))
    if device.type == "cuda":
        batches = tuple(batch.pin_memory() for batch in batches)
    weights, num_classes = folder / "weights.pth", len(dataset.class_names)
    if not weights.exists():
        write_starting_weights(weights, arguments.model, dataset, batches[0])
    return Work(arguments.model, num_classes, *sizes, device, new_loader(), batches, weights)


class OurStep:
    """The parts of Trainer.train_step, with the prefetcher in front of them and the metrics behind them."""

    def __init__(self, variant: Variant, work: Work) -> None:
        self.variant, self.device = variant, work.device
        model = build_model(work.model, work.num_classes)
        load_weights(model, str(work.weights))
        self.model: FasterRCNN = model.to(work.device).to(memory_format=variant.memory_format)
        if variant.compiled:
            compile_for_training(self.model, by_stage=False, warn=self._refuse)
        schedule, processes = load_schedule("1x"), Processes(0, 0, 1, 1, work.device)
        guard = NonFiniteGuard(self.model, skips=False, gradient_may_overflow=variant.amp == "fp16")
        optimizer = build_optimizer(self.model, schedule)
        if variant.without == FUSED_OPTIMIZER:
            for group in optimizer.param_groups:
                group.update(fused=False, foreach=None)
        self.precision = Precision(variant.amp, work.device)
        if variant.graphs:
            require_cuda_graphs(work.device)
        graphs = cuda_step_graphs(self.model, self._refuse) if variant.graphs else None
        if graphs is not None:
            record_detection(self.model, graphs.backend, self._refuse)
        buckets = GradientBuckets(trained_parameters(optimizer), processes, stay=graphs is not None)
        search = AlgorithmSearch() if work.device.type == "cuda" and variant.without != ALGORITHM_SEARCH else None
        self.gradients = GradientComputer(
            self.model, buckets, self.precision, guard, accumulate=1, graphs=graphs, search=search
        )
        length = work.loader.iterations_per_epoch
        self.update = ParameterUpdate(
            self.model, optimizer, schedule, self.precision, guard, iterations_per_epoch=length
        )
        images = work.loader.global_batch_size
        self.metrics = StepMetrics(processes, images_per_iteration=images, gradient_may_overflow=False)
        self._record: dict[str, Any] = {}
        self._feeds: dict[int, tuple[Sequence[RawBatch], DevicePrefetcher]] = {}

    def _refuse(self, problem: str) -> None:
        raise BenchmarkError(f"{self.variant.name}: {problem}")

    def train(self, batches: Sequence[RawBatch]) -> None:
        """One optimizer step a batch, from what workers hand over to updated weights."""
        self.model.train()
        if id(batches) not in self._feeds:
            # It goes on from block to block: the first batch of one is assembled during the last step of the one
            # before, as in a training.
            self._feeds[id(batches)] = batches, DevicePrefetcher(itertools.cycle(batches), self.device)
        prefetcher = self._feeds[id(batches)][1]
        with implementation(**(SWITCHES[self.variant.without].implementations if self.variant.without else {})):
            for _ in batches:
                fed = self.gradients.compute(prefetcher)
                _, grad_norm = self.update.apply(_LEARNING_RATE_ITERATION)
                self.metrics.add(fed.losses, grad_norm, fed.image_ids, iteration=0, epoch=0, lr=0.0)
        # The losses are fetched at the end of the block, as at a logging step.
        self._record = self.metrics.read()[-1]

    def detect(self, batches: Sequence[RawBatch]) -> None:
        """Detections of each batch, on the host."""
        self.model.eval()
        for batch in DevicePrefetcher(iter(batches), self.device):
            with self.precision.autocast():
                detections = self.model(ImageBatch(batch.pixels, batch.sizes))
            to_host(detections)

    def losses(self) -> dict[str, float]:
        """Those of the latest training step."""
        return {name: value for name, value in self._record.items() if name.startswith("loss")}


class TorchvisionStep:
    """torchvision's model in the step of its reference training: model, finite check, backward, SGD, losses read.

    It is given float images that are decoded, scaled to 0..1 and flipped already, because its own loader's workers do
    that; normalization and resize are inside its model.
    """

    def __init__(self, variant: Variant, work: Work) -> None:
        self.variant, self.device, self._dataset = variant, work.device, work.loader.dataset
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
        self._decoded: dict[int, tuple[RawBatch, Inputs]] = {}
        self._losses: dict[str, float] = {}

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

    def take_input(self, batch: RawBatch) -> Inputs:
        """Images and targets onto the device; what its workers would hand over is made once, in the untimed round."""
        if id(batch) not in self._decoded:
            inputs = torchvision_inputs(batch, self._dataset, pin=self.device.type == "cuda")
            self._decoded[id(batch)] = batch, inputs
        images, targets = self._decoded[id(batch)][1]
        moved = [{name: value.to(self.device) for name, value in target.items()} for target in targets]
        return [image.to(self.device) for image in images], moved

    @torch.inference_mode()
    def detect(self, batches: Sequence[RawBatch]) -> None:
        self.model.eval()
        for batch in batches:
            images, _ = self.take_input(batch)
            with self.precision.autocast():
                detections = self.model(images)
            to_host(detections)

    def losses(self) -> dict[str, float]:
        return self._losses


def torchvision_inputs(batch: RawBatch, dataset: CocoDataset, *, pin: bool) -> Inputs:
    """The images of `batch` at native size, float [3, h, w] in 0..1, and their boxes and masks, as torchvision takes
    them."""
    images, targets, start = [], [], 0
    for row, ((height, width), flip) in enumerate(zip(batch.native_sizes, batch.flips, strict=True)):
        end = start + height * width * 3
        image = batch.pixels[start:end].view(height, width, 3).permute(2, 0, 1).float() / 255
        image = (image.flip(-1) if flip else image).contiguous()
        valid = batch.valid[row]
        boxes = batch.boxes_xyxy[row, valid] / batch.scale_factors[row].repeat(2)
        target = {"boxes": boxes, "labels": batch.labels[row, valid] + 1}
        if dataset.has_masks:
            bitmaps = dataset.bitmaps(int(batch.plan.indices[row]))
            masks = np.zeros((len(boxes), height, width), dtype=np.uint8)
            for mask, number in zip(masks, valid.nonzero()[:, 0].tolist(), strict=True):
                left, top, bits = bitmaps[number]
                mask[top : top + bits.shape[0], left : left + bits.shape[1]] = bits
            target["masks"] = torch.from_numpy(np.ascontiguousarray(masks[..., ::-1]) if flip else masks)
        if pin:
            image, target = image.pin_memory(), {name: value.pin_memory() for name, value in target.items()}
        images.append(image)
        targets.append(target)
        start = end
    return images, targets


def torchvision_model(name: str, num_classes: int, min_size: int, max_size: int) -> torchvision_detection.FasterRCNN:
    """What torchvision's fasterrcnn_resnet50_fpn, or maskrcnn_resnet50_fpn, builds around pretrained weights: frozen
    batch norm, stem and first stage frozen; with the backbone of our model `name`. The weights are random."""
    config = model_config(name)
    backbone_name = config.backbone
    if backbone_name not in _TORCHVISION_BACKBONES:
        raise BenchmarkError(f"--model {name}: torchvision has no detector with {backbone_name} to stand beside it")
    backbone = resnet_fpn_backbone(backbone_name=backbone_name, weights=None, trainable_layers=3)
    detector = torchvision_detection.MaskRCNN if config.has_masks else torchvision_detection.FasterRCNN
    return detector(backbone, num_classes + 1, min_size=min_size, max_size=max_size)


def write_starting_weights(file: Path, model_name: str, dataset: CocoDataset, batch: RawBatch) -> None:
    """Random weights for torchvision's model, calmed so that activations, proposals and scores are of ordinary size."""
    torch.manual_seed(0)
    size = batch.resized_sizes[0]
    model = torchvision_model(model_name, len(dataset.class_names), min(size), max(size))
    for block in model.backbone.body.modules():
        last_norm = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        if last_norm is not None:
            last_norm.weight.fill_(_RESIDUAL_SCALE)
    classifier = model.roi_heads.box_predictor.cls_score
    hidden: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    images, _ = torchvision_inputs(batch, dataset, pin=False)
    with torch.inference_mode():
        model.eval()(images[:1])
    handle.remove()
    length = hidden[0].square().sum(dim=1).mean().sqrt().item()
    nn.init.normal_(classifier.weight, std=_LOGIT_STD / max(length, 1e-6))
    torch.save(model.state_dict(), file)


Step = OurStep | TorchvisionStep
"""A model that can be trained and run on the batches of its work."""


def build_step(variant: Variant, work: Work) -> Step:
    return OurStep(variant, work) if variant.owner == "ours" else TorchvisionStep(variant, work)


def to_host(detections: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value.cpu() for name, value in one.items()} for one in detections]
