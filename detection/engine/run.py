"""One run from the command line to the last checkpoint: build, then train, validate or test."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from data import EvalLoader, TrainLoader
from detection.config import RunConfig
from detection.engine.build import Built, build, prepare
from detection.engine.checkpoint import CheckpointError, CheckpointStore, LoadedCheckpoint, load_checkpoint
from detection.engine.datasets import SplitFiles
from detection.engine.distributed import Processes, start_processes, stop_processes
from detection.engine.ema import AveragedModel
from detection.engine.errors import main_first, together
from detection.engine.evaluation_loops import EvaluationInputs, TestLoop, ValLoop
from detection.engine.optimizer import build_optimizer, parameter_facts
from detection.engine.output_directory import OutputDirectory, write_json
from detection.engine.pictures import training_mosaic, validation_pictures
from detection.engine.plan import config_record, describe_plan
from detection.engine.precision import Precision
from detection.engine.recorder import Recorder
from detection.engine.resume import RunFacts, check_resumable, progress_of
from detection.engine.stopping import STOPPED_EXIT_CODE, StopRequest
from detection.engine.train_loop import EpochBasedTrainLoop, Progress, SavePlan, Stopped
from detection.evaluation import CocoEvaluator
from detection.reporting import Console, MetricsLog, TensorBoardLog, validation_table
from schedules import Schedule, unmatched_custom_keys


def run(config: RunConfig) -> int:
    """Do what the configuration says.

    Returns:
        The exit status: 0, or STOPPED_EXIT_CODE where a signal ended the run (which saved itself first).

    Raises:
        RunError and the errors in detection.engine.errors.USER_ERRORS: the user's to mend.
    """
    processes = start_processes(config.device)
    output = OutputDirectory(config.output_dir)
    try:
        with StopRequest() as stop:
            return _run(config, processes, output, stop)
    finally:
        output.release()
        stop_processes()


def _run(config: RunConfig, processes: Processes, output: OutputDirectory, stop: StopRequest) -> int:
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    prepared = main_first(processes, partial(prepare, config, output))
    checkpoint = None
    if prepared.resume_path is not None:
        checkpoint = together(processes, partial(load_checkpoint, prepared.resume_path))
    built = together(processes, partial(build, config, processes, checkpoint))
    console = Console(None if config.dry_run else output.log, is_main=processes.is_main, rank=processes.rank)
    for line in prepared.lines:
        console.say(line)
    if config.mode == "train":
        return _train(config, processes, output, stop, console, built, checkpoint)
    return _evaluate(config, processes, output, stop, console, built)


def _train(
    config: RunConfig,
    processes: Processes,
    output: OutputDirectory,
    stop: StopRequest,
    console: Console,
    built: Built,
    checkpoint: LoadedCheckpoint | None,
) -> int:
    assert built.train_set is not None
    schedule = built.schedule
    on_gpu = processes.device.type == "cuda"
    workers = config.data.workers if config.data.workers is not None else (4 if on_gpu else 1)
    new_train_loader = partial(
        TrainLoader,
        built.train_set,
        min_size=config.data.min_size,
        max_size=config.data.max_size,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        accumulate=schedule.accumulative_counts,
        rank=processes.rank,
        world_size=processes.world_size,
        limit_batches=config.data.limit_train_batches,
    )
    loader = new_train_loader(workers=workers, pin=on_gpu)
    facts = RunFacts(
        model_name=config.model.model,
        class_names=built.class_names,
        category_ids=built.category_ids,
        preprocessing={"min_size": config.data.min_size, "max_size": config.data.max_size},
        seed=config.train.seed,
        global_batch_size=loader.global_batch_size,
        world_size=processes.world_size,
        data_digest=built.train_set.annotations.digest(),
    )
    progress, changes = Progress(), []
    if checkpoint is not None:
        changes = together(
            processes,
            lambda: check_resumable(checkpoint, facts, schedule.to_dict(), loader.iterations_per_epoch),
        )
        progress = progress_of(checkpoint)
    notes = [*built.overrides, *schedule.notes]
    unused = unmatched_custom_keys(schedule.paramwise, parameter_facts(built.model))
    notes += [f"paramwise_cfg custom key {key!r} matches no parameter: it has no effect" for key in unused]
    console.say(
        describe_plan(
            config,
            processes,
            schedule=schedule,
            loader=loader,
            train_set=built.train_set,
            val_set=built.evaluation_set,
            model=built.model,
            weights_line=built.weights_line,
            output=output,
            progress=progress,
            changes=changes,
            notes=notes,
            unicode=console.has_unicode,
        )
    )
    if config.dry_run:
        console.say("dry run: everything above was checked; nothing was written.")
        return 0

    optimizer = build_optimizer(built.model, schedule)
    precision = Precision(schedule.amp or "off", processes.device, schedule.loss_scale)
    ema = AveragedModel(built.model, config.train.ema) if config.train.ema is not None else None
    if checkpoint is not None:
        _restore(checkpoint, optimizer, precision, ema, console)
    recorder = _open_recorder(config, processes, output, console, schedule, progress)
    if progress.iteration == 0 and processes.is_main:
        first = next(new_train_loader(workers=0).batches(0, 1))
        recorder.pictures(0, [training_mosaic(first, built.class_names)], "train/batch")
    val_loader, validate = _validation(config, processes, output, stop, recorder, built, precision, workers)
    if config.train.compile:
        built.model.compile_dense_parts()
    trains_batch_norm = any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        for module in built.model.modules()
    )
    store = CheckpointStore(output.checkpoints, config.output.keep_checkpoints)
    loop = EpochBasedTrainLoop(
        model=processes.wrap(built.model, broadcast_buffers=trains_batch_norm and not config.model.sync_bn),
        optimizer=optimizer,
        schedule=schedule,
        loader=loader,
        accumulate=schedule.accumulative_counts,
        precision=precision,
        ema=ema,
        processes=processes,
        recorder=recorder,
        store=store,
        stop=stop,
        log_interval=config.output.log_interval or (20 if on_gpu else 1),
        save_plan=SavePlan(config.output.checkpoint_minutes, config.output.checkpoint_iterations),
        validate=validate,
        extra_state={"model_config": asdict(built.model.config), **facts.state(), "config": config.to_dict()},
    )
    status = 0
    try:
        loop.run(progress)
    except Stopped as stopped:
        status = STOPPED_EXIT_CODE
        console.say(
            f"stopped by {stop.signal_name or 'a signal to another process'} {stopped}; "
            f"the run is saved, go on with it with --resume (exit status {STOPPED_EXIT_CODE})"
        )
    finally:
        problem = store.close() if processes.is_main else None
        recorder.close()
        loader.close()
        if val_loader is not None:
            val_loader.close()
    # At the end nothing more can be tried: a run whose last checkpoint is missing has failed.
    main_first(processes, partial(_require_saved, problem))
    if status == 0:
        console.say(_closing_words(config, output, recorder, progress))
    return status


def _require_saved(problem: str | None) -> None:
    if problem is not None:
        raise CheckpointError(
            f"{problem}\nThe newest state of the run is NOT saved; make room and go on with --resume."
        )


def _restore(
    checkpoint: LoadedCheckpoint,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    ema: AveragedModel | None,
    console: Console,
) -> None:
    state = checkpoint.state
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    # The schedule of this run decides over rates and decay; the checkpoint brings momentum.
    for group, chosen in zip(optimizer.param_groups, settings, strict=True):
        group.update(chosen)
    precision.load_state_dict(state["scaler"])
    if ema is not None and state["ema"] is not None:
        ema.module.load_state_dict(state["ema"])
    elif ema is not None:
        console.say("--ema: the checkpoint has no averaged weights, the average begins with its weights")
    elif state["ema"] is not None:
        console.warn("the checkpoint has averaged weights and this run does not go on averaging: give --ema to do so")


def _open_recorder(
    config: RunConfig,
    processes: Processes,
    output: OutputDirectory,
    console: Console,
    schedule: Schedule,
    progress: Progress,
) -> Recorder:
    if not processes.is_main:
        return Recorder(console)
    # A validation stands at the last iteration before it, and is repeated where the checkpoint says it is due.
    val_from = progress.iteration - int(progress.validation_due)
    log = MetricsLog(output.metrics)
    log.cut(progress.iteration, val_from)
    board = TensorBoardLog(output.tensorboard, first_iteration=progress.iteration, val_from=val_from)
    record = config_record(config, processes, schedule, output.config, progress.iteration)
    write_json(output.config, record)
    board.text("schedule", "\n".join(schedule.describe()), verbatim=True)
    board.hparams(
        {
            "model": config.model.model,
            "schedule": config.train.schedule,
            "lr": schedule.optimizer.lr,
            "epochs": schedule.max_epochs,
            "batch_size_total": config.train.batch_size * processes.world_size * schedule.accumulative_counts,
            "amp": schedule.amp or "off",
            "weights": config.model.weights,
            "min_size": config.data.min_size,
            "seed": config.train.seed,
        }
    )
    return Recorder(console, log, board)


def _evaluation_inputs(
    config: RunConfig,
    processes: Processes,
    output: OutputDirectory,
    stop: StopRequest,
    recorder: Recorder,
    built: Built,
    precision: Precision,
    workers: int,
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
    )
    return EvaluationInputs(
        loader=loader,
        category_ids=built.evaluation_set.annotations.category_ids,
        precision=precision,
        processes=processes,
        recorder=recorder,
        stop=stop,
        results_file=output.detections("test" if config.mode == "test" else "val"),
        limited=config.data.limit_val_batches is not None,
    )


def _validation(
    config: RunConfig,
    processes: Processes,
    output: OutputDirectory,
    stop: StopRequest,
    recorder: Recorder,
    built: Built,
    precision: Precision,
    workers: int,
) -> tuple[EvalLoader | None, Any]:
    """The loader of the validation set, and (iteration, model) -> metrics; (None, None) without a set."""
    if built.evaluation_set is None or built.evaluation_files is None:
        recorder.say("no validation set is given: the run trains without validation")
        return None, None
    inputs = _evaluation_inputs(config, processes, output, stop, recorder, built, precision, workers)
    evaluator = together(processes, partial(_evaluator, config, processes, built.evaluation_files))
    loop = ValLoop(inputs, evaluator)
    dataset = built.evaluation_set

    def validate(iteration: int, model: nn.Module) -> dict[str, Any]:
        metrics, detections = loop.run(model)
        if detections is not None:
            recorder.pictures(iteration, validation_pictures(dataset, detections), "val/detections")
        return metrics

    return inputs.loader, validate


def _evaluator(config: RunConfig, processes: Processes, files: SplitFiles) -> CocoEvaluator | None:
    return CocoEvaluator(files.annotations, backend=config.output.eval_backend) if processes.is_main else None


def _evaluate(
    config: RunConfig,
    processes: Processes,
    output: OutputDirectory,
    stop: StopRequest,
    console: Console,
    built: Built,
) -> int:
    """--val-only and --test-only."""
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
    if config.train.compile:
        built.model.compile_dense_parts()
    inputs = _evaluation_inputs(config, processes, output, stop, recorder, built, precision, workers)
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
                f"stopped by {stop.signal_name or 'a signal to another process'} {stopped}; nothing was written"
            )
            return STOPPED_EXIT_CODE
    if processes.is_main:
        console.say(f"detections: {inputs.results_file} (COCO results format)")
        if metrics:
            write_json(output.path / f"metrics_{config.mode}.json", metrics)
            console.say(validation_table(metrics))
            console.say(f"metrics: {output.path / f'metrics_{config.mode}.json'}")
        else:
            console.say("the annotation file has no boxes: no metrics, the detections are ready for an upload")
    return 0


def _closing_words(config: RunConfig, output: OutputDirectory, recorder: Recorder, progress: Progress) -> str:
    best = ""
    if progress.best_map is not None:
        best = f"   best.pt has mAP {progress.best_map:.3f} (epoch {progress.best_epoch})"
    return "\n".join(
        [
            "",
            recorder.summary(),
            "",
            f"checkpoints  {output.checkpoints}{best}",
            f"curves       tensorboard --logdir {output.tensorboard}",
            f"try it       python3 scripts/predict.py --weights {output.checkpoints / 'best.pt'} IMAGE ...",
        ]
    )
