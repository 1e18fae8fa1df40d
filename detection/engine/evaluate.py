"""Evaluations: the validation inside a training, and --val-only and --test-only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from data import EvalLoader
from detection.config.run_config import RunConfig
from detection.engine.accelerate.compile import compile_for_evaluation
from detection.engine.build import Built
from detection.engine.distributed.comm import Processes
from detection.engine.errors import RunError, main_first, together
from detection.engine.evaluator import EvaluationInputs, TestLoop, ValLoop
from detection.engine.inputs.bad_images import BadImages, TooManyBadImages
from detection.engine.inputs.datasets import SplitFiles
from detection.engine.metrics.images import validation_pictures
from detection.engine.metrics.logger import Recorder
from detection.engine.optim.amp import Precision
from detection.engine.run_dir import OutputDirectory, OutputDirectoryError, write_json
from detection.engine.signals import STOPPED_EXIT_CODE, StopRequest
from detection.engine.trainer import Stopped
from detection.evaluation import CocoEvaluator
from detection.reporting import Console, validation_table


def validation(
    config: RunConfig,
    processes: Processes,
    output: OutputDirectory,
    stop: StopRequest,
    recorder: Recorder,
    built: Built,
    precision: Precision,
    workers: int,
    bad_images: BadImages,
) -> tuple[EvalLoader | None, Callable[[int, nn.Module], dict[str, Any]] | None]:
    """The loader of the validation set, and (iteration, model) -> metrics; (None, None) without a set."""
    if built.evaluation_set is None or built.evaluation_files is None:
        recorder.say("no validation set is given: the run trains without validation")
        return None, None
    inputs = _evaluation_inputs(config, processes, output, stop, recorder, built, precision, workers, bad_images)
    evaluator = together(processes, partial(_evaluator, config, processes, built.evaluation_files))
    loop = ValLoop(inputs, evaluator)
    dataset = built.evaluation_set

    def validate(iteration: int, model: nn.Module) -> dict[str, Any]:
        metrics, detections = loop.run(model)
        if detections is not None:
            recorder.pictures(iteration, validation_pictures(dataset, detections), "val/detections")
        if evaluator is not None:
            recorder.precision_recall(iteration, evaluator.curves)
        return metrics

    return inputs.loader, validate


def evaluate(
    config: RunConfig,
    processes: Processes,
    output: OutputDirectory,
    stop: StopRequest,
    console: Console,
    built: Built,
) -> int:
    """--val-only and --test-only; the exit status."""
    assert built.evaluation_set is not None and built.evaluation_files is not None
    console.say(f"{config.mode}: {len(built.evaluation_set)} images of {built.evaluation_files.annotations}")
    console.say(f"weights: {built.weights_line}")
    if config.dry_run:
        console.say("dry run: everything above was checked; nothing was written.")
        return 0
    recorder = Recorder(console)
    precision = Precision(built.schedule.amp or "off", processes.device)
    on_gpu = processes.device.type == "cuda"
    workers = config.data.workers if config.data.workers is not None else (4 if on_gpu else 1)
    bad_images = BadImages(processes, recorder, config.data.max_bad_images)
    if config.train.compile:
        compile_for_evaluation(built.model)
    inputs = _evaluation_inputs(config, processes, output, stop, recorder, built, precision, workers, bad_images)
    evaluator = together(processes, partial(_evaluator, config, processes, built.evaluation_files))
    with contextlib.closing(inputs.loader):
        try:
            if config.mode == "val":
                metrics: dict[str, Any] | None = ValLoop(inputs, evaluator).run(built.model)[0]
            else:
                if evaluator is not None and not evaluator.has_boxes:
                    evaluator = None
                metrics, _ = TestLoop(inputs, evaluator).run(built.model)
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
    main_first(processes, partial(_write_metrics, file, metrics))
    console.say(f"metrics: {file}")
    return 0


def _write_metrics(file: Path, metrics: dict[str, Any]) -> None:
    try:
        write_json(file, metrics)
    except OSError as error:
        raise OutputDirectoryError(f"{file} could not be written: {error}") from error


def _evaluation_inputs(
    config: RunConfig,
    processes: Processes,
    output: OutputDirectory,
    stop: StopRequest,
    recorder: Recorder,
    built: Built,
    precision: Precision,
    workers: int,
    bad_images: BadImages,
) -> EvaluationInputs:
    assert built.evaluation_set is not None
    loader = EvalLoader(
        built.evaluation_set,
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
        category_ids=built.evaluation_set.annotations.category_ids,
        precision=precision,
        processes=processes,
        recorder=recorder,
        bad_images=bad_images,
        split="test" if config.mode == "test" else "val",
        stop=stop,
        results_file=output.detections("test" if config.mode == "test" else "val"),
        limited=config.data.limit_val_batches is not None,
    )


def _evaluator(config: RunConfig, processes: Processes, files: SplitFiles) -> CocoEvaluator | None:
    return CocoEvaluator(files.annotations, backend=config.output.eval_backend) if processes.is_main else None
