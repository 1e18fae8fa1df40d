"""Evaluations: the validation inside a training, and --val-only and --test-only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from data import CocoAnnotations, EvalLoader
from detection.config.run_config import RunConfig
from detection.engine.accelerate.compile import compile_for_evaluation
from detection.engine.build import Components
from detection.engine.distributed.agreement import RunError, run_on_all_ranks, run_on_main_rank
from detection.engine.distributed.comm import Processes
from detection.engine.evaluator import EvaluationInputs, TestLoop, ValLoop
from detection.engine.inputs.bad_images import BadImages, TooManyBadImages
from detection.engine.metrics.images import validation_images
from detection.engine.metrics.logger import MetricLogger
from detection.engine.optim.amp import Precision
from detection.engine.run_dir import RunDir, RunDirError, write_json
from detection.engine.signals import STOPPED_EXIT_CODE, StopRequest
from detection.engine.trainer import Stopped
from detection.evaluation import CocoEvaluator
from detection.reporting import Console, validation_table


def validation(
    config: RunConfig,
    processes: Processes,
    output: RunDir,
    stop: StopRequest,
    metric_logger: MetricLogger,
    components: Components,
    precision: Precision,
    workers: int,
    bad_images: BadImages,
) -> tuple[EvalLoader | None, Callable[[int, nn.Module], dict[str, Any]] | None]:
    """The loader of the validation set, and (iteration, model) -> metrics; (None, None) without a set."""
    if components.evaluation_set is None or components.evaluation_files is None:
        metric_logger.say("no validation set is given: the run trains without validation")
        return None, None
    inputs = _evaluation_inputs(
        config, processes, output, stop, metric_logger, components, precision, workers, bad_images
    )
    evaluator = run_on_all_ranks(
        processes, partial(_evaluator, config, processes, components.evaluation_set.annotations)
    )
    loop = ValLoop(inputs, evaluator)
    dataset = components.evaluation_set

    def validate(iteration: int, model: nn.Module) -> dict[str, Any]:
        metrics, detections = loop.run(model)
        if detections is not None:
            metric_logger.images(iteration, validation_images(dataset, detections), "val/detections")
        if evaluator is not None:
            metric_logger.precision_recall(iteration, evaluator.curves)
        return metrics

    return inputs.loader, validate


def evaluate(
    config: RunConfig,
    processes: Processes,
    output: RunDir,
    stop: StopRequest,
    console: Console,
    components: Components,
) -> int:
    """--val-only and --test-only; the exit status."""
    assert components.evaluation_set is not None and components.evaluation_files is not None
    console.say(f"{config.mode}: {len(components.evaluation_set)} images of {components.evaluation_files.annotations}")
    console.say(f"weights: {components.weights_line}")
    if config.dry_run:
        console.say("dry run: everything above was checked; nothing was written.")
        return 0
    metric_logger = MetricLogger(console)
    precision = Precision(components.schedule.amp or "off", processes.device)
    on_gpu = processes.device.type == "cuda"
    workers = config.data.workers if config.data.workers is not None else (4 if on_gpu else 1)
    bad_images = BadImages(processes, metric_logger, config.data.max_bad_images)
    if config.train.compile:
        compile_for_evaluation(components.model)
    inputs = _evaluation_inputs(
        config, processes, output, stop, metric_logger, components, precision, workers, bad_images
    )
    evaluator = run_on_all_ranks(
        processes, partial(_evaluator, config, processes, components.evaluation_set.annotations)
    )
    with contextlib.closing(inputs.loader):
        try:
            if config.mode == "val":
                metrics: dict[str, Any] | None = ValLoop(inputs, evaluator).run(components.model)[0]
            else:
                if evaluator is not None and not evaluator.has_boxes:
                    evaluator = None
                metrics, _ = TestLoop(inputs, evaluator).run(components.model)
        except Stopped as stopped:
            console.say(
                f"stopped by {stop.signal_name or 'a signal to another process'} {stopped} "
                f"(exit status {STOPPED_EXIT_CODE}); nothing was written"
            )
            return STOPPED_EXIT_CODE
        except TooManyBadImages as error:  # every process has it
            raise RunError(str(error)) from error
    console.say(f"detections: {inputs.results_file} (COCO results format)")
    if metrics is None:
        console.say("the annotation file has no boxes: no metrics, the detections are ready for an upload")
        return 0
    console.say(validation_table(metrics))
    file = output.path / f"metrics_{config.mode}.json"
    run_on_main_rank(processes, partial(_write_metrics, file, metrics))
    console.say(f"metrics: {file}")
    return 0


def _write_metrics(file: Path, metrics: dict[str, Any]) -> None:
    try:
        write_json(file, metrics)
    except OSError as error:
        raise RunDirError(f"{file} could not be written: {error}") from error


def _evaluation_inputs(
    config: RunConfig,
    processes: Processes,
    output: RunDir,
    stop: StopRequest,
    metric_logger: MetricLogger,
    components: Components,
    precision: Precision,
    workers: int,
    bad_images: BadImages,
) -> EvaluationInputs:
    assert components.evaluation_set is not None
    loader = EvalLoader(
        components.evaluation_set,
        min_size=config.data.min_size,
        max_size=config.data.max_size,
        batch_size=config.train.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        workers=workers,
        limit_batches=config.data.limit_val_batches,
        pin=processes.device.type == "cuda",
        max_bad_images=config.data.max_bad_images,
    )
    return EvaluationInputs(
        loader=loader,
        category_ids=components.evaluation_set.annotations.category_ids,
        precision=precision,
        processes=processes,
        metric_logger=metric_logger,
        bad_images=bad_images,
        split="test" if config.mode == "test" else "val",
        stop=stop,
        results_file=output.detections("test" if config.mode == "test" else "val"),
        limited=config.data.limit_val_batches is not None,
    )


def _evaluator(config: RunConfig, processes: Processes, annotations: CocoAnnotations) -> CocoEvaluator | None:
    return CocoEvaluator(annotations, backend=config.output.eval_backend) if processes.is_main else None
