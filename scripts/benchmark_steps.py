"""The training steps that are compared: this project's, with the loop's own pieces, and torchvision's."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import checkout  # noqa: F401
from benchmark_ablation import FUSED_OPTIMISER, KEPT_MEMORY, OPTIMISATIONS
from benchmark_timing import BenchmarkError
from data import DevicePrefetcher, RawBatch, TrainLoader
from detection.engine import train_loop
from detection.engine.bad_images import BadImages
from detection.engine.checkpoint import CheckpointStore
from detection.engine.compilation import compile_for_training, prepare_compiler
from detection.engine.distributed import Processes
from detection.engine.host_memory import keep_freed_memory, return_freed_memory
from detection.engine.optimizer import build_optimizer
from detection.engine.precision import Precision
from detection.engine.recorder import Recorder
from detection.engine.step_graphs import cuda_step_graphs
from detection.engine.stopping import StopRequest
from detection.engine.train_loop import EpochBasedTrainLoop, SavePlan
from detection.models import FasterRCNN, ImageBatch, build_model, faster_rcnn, load_weights
from detection.models.recipes import model_config
from detection.reporting import Console
from schedules import load_schedule

INPUT, FEATURES, RPN_HEAD, PROPOSALS = "input", "backbone and FPN", "RPN head", "proposals and NMS"
ASSIGNMENT, ROI_ALIGN, BOX_HEAD = "assignment and sampling", "RoIAlign", "box head"
LOSSES, BACKWARD, OPTIMISER = "losses", "backward", "optimiser"
STAGES = (INPUT, FEATURES, RPN_HEAD, PROPOSALS, ASSIGNMENT, ROI_ALIGN, BOX_HEAD, LOSSES, BACKWARD, OPTIMISER)

TorchvisionInputs = tuple[list[Tensor], list[dict[str, Tensor]]]
Place = tuple[Any, str, str]
"""An owner (module, object or class), the name of something it calls, and the stage that this belongs to."""

TORCHVISION_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
_LEARNING_RATE_ITERATION = 0  # the first of the warmup: small enough for random weights to stay finite
_RESIDUAL_SCALE = 0.3  # of each block's last norm, so that random weights give activations of ordinary size
_SETTLING_RUNS = 3  # the second still had 59,000 page faults, the third 60 (R50, 800x1088, batch 2)
_LOGIT_STD = 1.0  # lets about 2 of 100 class scores pass the score threshold, as after training


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
    """Of ours: the one of OPTIMISATIONS that is left out."""

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
        if without is not None and (owner != "ours" or without not in OPTIMISATIONS):
            raise BenchmarkError(f"variant {name!r}: -without- goes with ours and one of {', '.join(OPTIMISATIONS)}")
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


class Step(Protocol):
    """A model that can be trained and run on the batches of its work."""

    variant: Variant

    def settle(self, run: Callable[[], object]) -> None:
        """Right before `run` is timed: memory as this step's own program has it."""

    def train(self, batches: Sequence[RawBatch]) -> None:
        """One optimiser step a batch, from what workers hand over to updated weights."""

    def detect(self, batches: Sequence[RawBatch]) -> None:
        """Detections of each batch, on the host."""

    def losses(self) -> dict[str, float]:
        """Those of the latest training step."""

    def stages(self) -> list[Place]:
        """Where the time of `train` goes."""


def build_step(variant: Variant, work: Work) -> Step:
    return OurStep(variant, work) if variant.owner == "ours" else TorchvisionStep(variant, work)


class _HostMemory:
    """Whether this process keeps what it frees: train.py on the CPU does, torchvision's reference training does not."""

    keeps = False

    @classmethod
    def switch(cls, keep: bool) -> bool:
        """True where that changed something."""
        if keep == cls.keeps:
            return False
        cls.keeps = keep
        return keep_freed_memory() if keep else return_freed_memory()


class OurStep:
    """EpochBasedTrainLoop.train_iteration itself, with the prefetcher in front of it and the records behind it."""

    def __init__(self, variant: Variant, work: Work, processes: Processes | None = None) -> None:
        self.variant, self.work = variant, work
        model = build_model(work.model, work.num_classes)
        load_weights(model, str(work.weights))
        self.model: FasterRCNN = model.to(work.device).to(memory_format=variant.memory_format)
        if variant.compiled:
            compile_for_training(self.model)
        schedule = load_schedule("1x")
        precision = Precision(variant.amp, work.device)
        self._scratch = tempfile.TemporaryDirectory(prefix="benchmark_")
        optimizer = build_optimizer(self.model, schedule)
        if variant.without == FUSED_OPTIMISER:
            for group in optimizer.param_groups:
                group.update(fused=False, foreach=None)
        processes, recorder = processes or Processes(0, 0, 1, 1, work.device), Recorder(Console(None))
        graphs = cuda_step_graphs(processes, self.model) if variant.graphs else None
        self.loop = EpochBasedTrainLoop(
            model=processes.wrap(self.model, broadcast_buffers=False) if graphs is None else self.model,
            graphs=graphs,
            optimizer=optimizer,
            schedule=schedule,
            loader=work.loader,
            accumulate=1,
            precision=precision,
            ema=None,
            processes=processes,
            recorder=recorder,
            store=CheckpointStore(Path(self._scratch.name), keep=1),
            stop=StopRequest(),
            log_interval=1,
            save_plan=SavePlan(),
            bad_images=BadImages(processes, recorder, limit=0),
            skip_nonfinite=False,
            validate=None,
            extra_state={},
        )
        self._record: dict[str, Any] = {}

    def settle(self, run: Callable[[], object]) -> None:
        if self.work.device.type == "cpu" and _HostMemory.switch(self.variant.without != KEPT_MEMORY):
            # These take their memory from the system, as the first few of a training's thousands of steps do. As many
            # in every process: they may wait for each other.
            for _ in range(_SETTLING_RUNS):
                run()

    def train(self, batches: Sequence[RawBatch]) -> None:
        self.model.train()
        prefetcher = DevicePrefetcher(iter(batches), self.work.device)
        with self._patches():
            for _ in batches:
                self.loop.train_iteration(_LEARNING_RATE_ITERATION, prefetcher)
        if self.loop.graphs is not None and self.loop.graphs.problem is not None:
            raise BenchmarkError(f"{self.variant.name}: {self.loop.graphs.problem}")
        # The losses are fetched at the end of the block, as at a logging step.
        self._record = self.loop.records.read()[-1]

    def _patches(self) -> AbstractContextManager[Any]:
        """While inside, the step does without what its variant says."""
        optimisation = OPTIMISATIONS.get(self.variant.without or "")
        if optimisation is None or optimisation.without is None:
            return nullcontext()
        return optimisation.without(self.model)

    def detect(self, batches: Sequence[RawBatch]) -> None:
        self.model.eval()
        for batch in DevicePrefetcher(iter(batches), self.work.device):
            with self.loop.precision.autocast():
                detections = self.model(ImageBatch(batch.pixels, batch.sizes))
            for detection in detections:
                _to_host(detection)

    def losses(self) -> dict[str, float]:
        return {name: value for name, value in self._record.items() if name.startswith("loss")}

    def stages(self) -> list[Place]:
        return [
            (DevicePrefetcher, "__next__", INPUT),
            (DevicePrefetcher, "prepare", INPUT),
            (self.model, "extract_features", FEATURES),
            (self.model, "_anchors", PROPOSALS),
            (faster_rcnn, "anchor_targets", ASSIGNMENT),
            # The table of all levels' cells serves the sampled anchors and RoIAlign alike.
            (faster_rcnn, "cell_table", ROI_ALIGN),
            (faster_rcnn, "windows_3x3", RPN_HEAD),
            (faster_rcnn, "take_rows", RPN_HEAD),
            (self.model.rpn, "at_anchors", RPN_HEAD),
            (self.model, "rpn", RPN_HEAD),
            (faster_rcnn, "rpn_losses", LOSSES),
            (faster_rcnn, "select_proposals", PROPOSALS),
            (faster_rcnn, "sample_rois", ASSIGNMENT),
            (self.model, "_pool", ROI_ALIGN),
            (self.model, "roi_head", BOX_HEAD),
            (faster_rcnn, "roi_losses", LOSSES),
            (self.loop.precision, "backward", BACKWARD),
            (self.loop.optimizer, "zero_grad", OPTIMISER),
            (train_loop, "set_learning_rate", OPTIMISER),
            (train_loop, "gradient_norm", OPTIMISER),
            (self.loop.precision, "step", OPTIMISER),
        ]


class TorchvisionStep:
    """torchvision's model in the step of its reference training: model, finite check, backward, SGD, losses read.

    It is given float images that are decoded, scaled to 0..1 and flipped already, because its own loader's workers do
    that; normalisation and resize are inside its model.
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
            _HostMemory.switch(False)

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
                _to_host(detection)

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
            (self.optimizer, "zero_grad", OPTIMISER),
            (self.precision, "step", OPTIMISER),
        ]


def torchvision_inputs(batch: RawBatch, device: torch.device) -> TorchvisionInputs:
    """The pictures of `batch` at native size, float [3, h, w] in 0..1, and their boxes, as torchvision takes them."""
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


def _to_host(detection: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in detection.items()}
