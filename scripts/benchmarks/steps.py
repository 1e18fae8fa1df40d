"""This project's training step, with the loop's own pieces, and the way from a variant to its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import checkout  # noqa: F401
from benchmarks.ablation import FUSED_OPTIMIZER, KEPT_MEMORY, OPTIMIZATIONS
from benchmarks.timing import BenchmarkError
from benchmarks.torchvision_peer import TorchvisionStep
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
    Step,
    Variant,
    Work,
    to_host,
)
from data import DevicePrefetcher, RawBatch
from detection.engine.accelerate.compile import compile_for_training
from detection.engine.accelerate.cuda_graphs import cuda_step_graphs
from detection.engine.distributed.comm import Processes
from detection.engine.metrics.step_metrics import StepMetrics
from detection.engine.optim import update
from detection.engine.optim.amp import Precision
from detection.engine.optim.gradients import GradientComputer
from detection.engine.optim.nonfinite import KeepEveryStep
from detection.engine.optim.optimizer import build_optimizer, trained_parameters
from detection.engine.optim.update import ParameterUpdate
from detection.models import FasterRCNN, ImageBatch, build_model, faster_rcnn, load_weights
from schedules import load_schedule

_LEARNING_RATE_ITERATION = 0  # the first of the warmup: small enough for random weights to stay finite
_SETTLING_RUNS = 3  # the second still had 59,000 page faults, the third 60 (R50, 800x1088, batch 2)


def build_step(variant: Variant, work: Work) -> Step:
    return OurStep(variant, work) if variant.owner == "ours" else TorchvisionStep(variant, work)


class OurStep:
    """The parts of Trainer.train_step, with the prefetcher in front of them and the metrics behind them."""

    def __init__(self, variant: Variant, work: Work, processes: Processes | None = None) -> None:
        self.variant, self.work = variant, work
        model = build_model(work.model, work.num_classes)
        load_weights(model, str(work.weights))
        self.model: FasterRCNN = model.to(work.device).to(memory_format=variant.memory_format)
        if variant.compiled:
            compile_for_training(self.model)
        schedule = load_schedule("1x")
        precision = Precision(variant.amp, work.device)
        optimizer = build_optimizer(self.model, schedule)
        if variant.without == FUSED_OPTIMIZER:
            for group in optimizer.param_groups:
                group.update(fused=False, foreach=None)
        processes = processes or Processes(0, 0, 1, 1, work.device)
        graphs = cuda_step_graphs(processes, self.model, self._refuse) if variant.graphs else None
        trained = processes.wrap_ddp(self.model, broadcast_buffers=False) if graphs is None else self.model
        guard = KeepEveryStep()
        self.precision, self.optimizer = precision, optimizer
        self.gradients = GradientComputer(
            trained, trained_parameters(optimizer), precision, processes, guard, accumulate=1, graphs=graphs
        )
        self.update = ParameterUpdate(
            self.model, optimizer, schedule, precision, guard, iterations_per_epoch=work.loader.iterations_per_epoch
        )
        self.metrics = StepMetrics(
            processes, images_per_iteration=work.loader.global_batch_size, gradient_may_overflow=False
        )
        self._record: dict[str, Any] = {}

    def settle(self, run: Callable[[], object]) -> None:
        if self.work.device.type == "cpu" and HostMemory.switch(self.variant.without != KEPT_MEMORY):
            # These take their memory from the system, as the first few of a training's thousands of steps do. As many
            # in every process: they may wait for each other.
            for _ in range(_SETTLING_RUNS):
                run()

    def train(self, batches: Sequence[RawBatch]) -> None:
        self.model.train()
        prefetcher = DevicePrefetcher(iter(batches), self.work.device)
        with self._patches():
            for _ in batches:
                fed = self.gradients.compute(prefetcher)
                _, grad_norm = self.update.apply(_LEARNING_RATE_ITERATION)
                self.metrics.add(fed.losses, grad_norm, fed.image_ids, iteration=0, epoch=0, lr=0.0)
        # The losses are fetched at the end of the block, as at a logging step.
        self._record = self.metrics.read()[-1]

    def _refuse(self, problem: str) -> None:
        raise BenchmarkError(f"{self.variant.name}: {problem}")

    def _patches(self) -> AbstractContextManager[Any]:
        """While inside, the step does without what its variant says."""
        optimization = OPTIMIZATIONS.get(self.variant.without or "")
        if optimization is None or optimization.without is None:
            return nullcontext()
        return optimization.without(self.model)

    def detect(self, batches: Sequence[RawBatch]) -> None:
        self.model.eval()
        for batch in DevicePrefetcher(iter(batches), self.work.device):
            with self.precision.autocast():
                detections = self.model(ImageBatch(batch.pixels, batch.sizes))
            for detection in detections:
                to_host(detection)

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
            (self.precision, "backward", BACKWARD),
            (update, "set_learning_rate", OPTIMIZER),
            (update, "gradient_norm", OPTIMIZER),
            (self.precision, "step", OPTIMIZER),
        ]
