"""This project's training step, with the loop's own pieces, and the way from a variant to its step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
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
from detection.engine import trainer
from detection.engine.accelerate.compile import compile_for_training
from detection.engine.accelerate.cuda_graphs import cuda_step_graphs
from detection.engine.checkpoint import CheckpointStore
from detection.engine.distributed.comm import Processes
from detection.engine.inputs.bad_images import BadImages
from detection.engine.metrics.logger import MetricLogger
from detection.engine.optim.amp import Precision
from detection.engine.optim.optimizer import build_optimizer
from detection.engine.signals import StopRequest
from detection.engine.trainer import SavePlan, Trainer
from detection.models import FasterRCNN, ImageBatch, build_model, faster_rcnn, load_weights
from detection.reporting import Console
from schedules import load_schedule

_LEARNING_RATE_ITERATION = 0  # the first of the warmup: small enough for random weights to stay finite
_SETTLING_RUNS = 3  # the second still had 59,000 page faults, the third 60 (R50, 800x1088, batch 2)


def build_step(variant: Variant, work: Work) -> Step:
    return OurStep(variant, work) if variant.owner == "ours" else TorchvisionStep(variant, work)


class OurStep:
    """Trainer.train_iteration itself, with the prefetcher in front of it and the records behind it."""

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
        if variant.without == FUSED_OPTIMIZER:
            for group in optimizer.param_groups:
                group.update(fused=False, foreach=None)
        processes, metric_logger = processes or Processes(0, 0, 1, 1, work.device), MetricLogger(Console(None))
        graphs = cuda_step_graphs(processes, self.model) if variant.graphs else None
        self.loop = Trainer(
            model=processes.wrap_ddp(self.model, broadcast_buffers=False) if graphs is None else self.model,
            graphs=graphs,
            optimizer=optimizer,
            schedule=schedule,
            loader=work.loader,
            accumulate=1,
            precision=precision,
            ema=None,
            processes=processes,
            metric_logger=metric_logger,
            store=CheckpointStore(Path(self._scratch.name), keep=1),
            stop=StopRequest(),
            log_interval=1,
            save_plan=SavePlan(),
            bad_images=BadImages(processes, metric_logger, limit=0),
            skip_nonfinite=False,
            validate=None,
            extra_state={},
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
                self.loop.train_iteration(_LEARNING_RATE_ITERATION, prefetcher)
        if self.loop.graphs is not None and self.loop.graphs.problem is not None:
            raise BenchmarkError(f"{self.variant.name}: {self.loop.graphs.problem}")
        # The losses are fetched at the end of the block, as at a logging step.
        self._record = self.loop.records.read()[-1]

    def _patches(self) -> AbstractContextManager[Any]:
        """While inside, the step does without what its variant says."""
        optimization = OPTIMIZATIONS.get(self.variant.without or "")
        if optimization is None or optimization.without is None:
            return nullcontext()
        return optimization.without(self.model)

    def detect(self, batches: Sequence[RawBatch]) -> None:
        self.model.eval()
        for batch in DevicePrefetcher(iter(batches), self.work.device):
            with self.loop.precision.autocast():
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
            (self.loop.precision, "backward", BACKWARD),
            (self.loop.optimizer, "zero_grad", OPTIMIZER),
            (trainer, "set_learning_rate", OPTIMIZER),
            (trainer, "gradient_norm", OPTIMIZER),
            (self.loop.precision, "step", OPTIMIZER),
        ]
