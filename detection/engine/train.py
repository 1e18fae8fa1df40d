"""One training from its built parts to its last checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from functools import partial

from torch import nn

from data import TrainLoader
from detection.config.run_config import RunConfig
from detection.engine.accelerate.compile import compile_for_training, uncompiled
from detection.engine.accelerate.cuda_graphs import cuda_step_graphs
from detection.engine.build import Components
from detection.engine.checkpoint import Best, CheckpointError, CheckpointStore, LoadedCheckpoint, continue_from
from detection.engine.distributed.agreement import RunError, run_on_all_ranks, run_on_main_rank
from detection.engine.distributed.comm import Processes
from detection.engine.distributed.sync_batch_norm import trains_batch_norm
from detection.engine.evaluate import validation
from detection.engine.fingerprint import assert_same_on_all_ranks, fingerprint
from detection.engine.inputs.augmentation import augmentation_of
from detection.engine.inputs.bad_images import BadImages, TooManyBadImages
from detection.engine.metrics.images import training_mosaic
from detection.engine.metrics.logger import MetricLogger
from detection.engine.metrics.step_metrics import NonFiniteLoss
from detection.engine.optim.amp import Precision
from detection.engine.optim.ema import AveragedModel
from detection.engine.optim.optimizer import build_optimizer, parameter_facts
from detection.engine.resume import check_resumable, progress_of, restore, settings_without_effect
from detection.engine.run_dir import RunDir, RunDirError, write_json
from detection.engine.run_summary import closing_summary, config_record, configuration_text, describe_run
from detection.engine.signals import STOPPED_EXIT_CODE, StopRequest
from detection.engine.trainer import Progress, SavePlan, Stopped, Trainer
from detection.reporting import Console, MetricsLog, TensorBoardLog
from schedules import Schedule, unmatched_custom_keys


def train(
    config: RunConfig,
    processes: Processes,
    output: RunDir,
    stop: StopRequest,
    console: Console,
    components: Components,
    checkpoint: LoadedCheckpoint | None,
) -> int:
    """Train to the schedule's end, from `checkpoint` where one is given; the exit status."""
    schedule, model = components.schedule, components.model
    on_gpu = processes.device.type == "cuda"
    workers = config.data.workers if config.data.workers is not None else (4 if on_gpu else 1)
    loader = _train_loader(config, processes, components, workers=workers)
    # What is wrong with the learning rate shows when it is first asked for.
    run_on_all_ranks(processes, lambda: schedule.learning_rate(0, loader.iterations_per_epoch))
    facts = fingerprint(config, processes, components, loader)
    assert_same_on_all_ranks(config, processes, facts, schedule, loader.iterations_per_epoch)
    num_iterations = schedule.max_epochs * loader.iterations_per_epoch
    graphs = None
    if config.train.cuda_graphs:
        graphs = run_on_all_ranks(processes, partial(cuda_step_graphs, processes, model))
    progress, changes = Progress(), []
    notes = [*components.overrides, *schedule.notes]
    if checkpoint is None:
        notes += [f"model {key}: {value}" for key, value in config.model.settings]
    unused = unmatched_custom_keys(schedule.paramwise, parameter_facts(model))
    notes += [f"paramwise_cfg custom key {key!r} matches no parameter: it has no effect" for key in unused]
    if checkpoint is not None:
        changes = run_on_all_ranks(
            processes,
            partial(check_resumable, checkpoint, facts, schedule, loader.iterations_per_epoch),
        )
        notes += settings_without_effect(checkpoint, config.model)
        progress = progress_of(checkpoint, facts, num_iterations)
    console.say(
        describe_run(
            config,
            processes,
            schedule=schedule,
            loader=loader,
            train_set=loader.dataset,
            val_set=components.evaluation_set,
            model=model,
            weights_line=components.weights_line,
            output=output,
            progress=progress,
            changes=changes,
            notes=notes,
            unicode=console.has_unicode,
        )
    )
    optimizer = build_optimizer(model, schedule)
    precision = Precision(schedule.amp or "off", processes.device, schedule.loss_scale)
    ema = AveragedModel(model, config.train.ema) if config.train.ema is not None else None
    if checkpoint is not None:
        for line in run_on_all_ranks(processes, partial(restore, checkpoint, model, optimizer, precision, ema)):
            console.say(line)
    if progress.iteration >= num_iterations and not progress.validation_due:
        console.say(f"epoch {schedule.max_epochs} is done already: nothing is left to train (--max-epochs)")
    if config.dry_run:
        console.say("dry run: everything above was checked; nothing was trained or written.")
        return 0

    if checkpoint is not None and not run_on_main_rank(
        processes, partial(_leave_other_future, output, checkpoint, console, progress)
    ):
        progress.best_map = progress.best_epoch = None
    metric_logger = run_on_all_ranks(
        processes, partial(_open_recorder, config, processes, output, console, schedule, progress)
    )
    bad_images = BadImages(processes, metric_logger, config.data.max_bad_images)
    if progress.iteration == 0 and processes.is_main:
        first = _train_loader(config, processes, components, workers=0).batches(0, loader.iterations_per_epoch)
        metric_logger.images(0, [training_mosaic(first, components.class_names)], "train/batch")
    val_loader, validate = validation(
        config, processes, output, stop, metric_logger, components, precision, workers, bad_images
    )
    if config.train.compile:
        compile_for_training(model)
        validate = uncompiled(validate) if validate is not None else None
    store = CheckpointStore(output.checkpoints, config.output.keep_checkpoints)
    if graphs is not None:
        processes.broadcast_weights(model)
        trained: nn.Module = model
    else:
        trained = processes.wrap_ddp(model, broadcast_buffers=trains_batch_norm(model) and not config.model.sync_bn)
    loop = Trainer(
        model=trained,
        optimizer=optimizer,
        schedule=schedule,
        loader=loader,
        accumulate=schedule.accumulative_counts,
        precision=precision,
        ema=ema,
        processes=processes,
        metric_logger=metric_logger,
        store=store,
        stop=stop,
        log_interval=config.output.log_interval or (20 if on_gpu else 1),
        save_plan=SavePlan(config.output.checkpoint_minutes, config.output.checkpoint_iterations),
        bad_images=bad_images,
        skip_nonfinite=config.train.skip_nonfinite,
        validate=validate,
        graphs=graphs,
        extra_state={"model_config": asdict(model.config), **facts.state(), "config": config.to_dict()},
    )
    status, problem = 0, None
    try:
        loop.run(progress)
    except Stopped as stopped:
        status = STOPPED_EXIT_CODE
        by = stop.signal_name or "a signal to another process"
        console.say(f"stopped by {by} {stopped} (exit status {status}); go on with --resume")
    except (NonFiniteLoss, TooManyBadImages) as error:  # every process has it
        raise RunError(str(error)) from error
    else:
        metric_logger.finish(loop.num_iterations)
    finally:
        if processes.is_main and (problem := store.close()) is not None:
            console.warn(problem)
        metric_logger.close()
        loader.close()
        if val_loader is not None:
            val_loader.close()
    # At the end nothing more can be tried: a run whose last checkpoint is missing has failed.
    run_on_main_rank(processes, partial(_require_saved, problem))
    if status == 0:
        # Of a part of the set, every image that was not run would count as one where nothing was found.
        is_whole = metric_logger.num_validated == len(components.evaluation_set or ())
        console.say(closing_summary(output, metric_logger, progress, bad_images, components.evaluation_files, is_whole))
    return status


def _train_loader(config: RunConfig, processes: Processes, components: Components, *, workers: int) -> TrainLoader:
    assert components.train_set is not None
    return TrainLoader(
        components.train_set,
        min_size=config.data.min_size,
        max_size=config.data.max_size,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        accumulate=components.schedule.accumulative_counts,
        rank=processes.rank,
        world_size=processes.world_size,
        workers=workers,
        augmentation=augmentation_of(config.augmentation, config.data.max_size),
        repeat_threshold=config.augmentation.repeat_threshold,
        limit_batches=config.data.limit_train_batches,
        few_shapes=config.train.compile or config.train.cuda_graphs,
        pin=processes.device.type == "cuda" and workers > 0,
        max_bad_images=config.data.max_bad_images,
    )


def _leave_other_future(output: RunDir, checkpoint: LoadedCheckpoint, console: Console, progress: Progress) -> bool:
    """Go on from `checkpoint` and from no other: what the folder has beyond it is moved aside, its curves too.

    Returns:
        Whether the best weights so far, if `progress` knows of any, are there.
    """
    best = None
    if progress.best_epoch is not None and progress.best_map is not None:
        best = Best(progress.best_epoch, progress.best_map)
    done = continue_from(output.checkpoints, checkpoint, best)
    if done.aside is not None:
        try:
            if output.metrics.is_file():
                shutil.copyfile(output.metrics, done.aside / output.metrics.name)
        except OSError as error:
            raise RunDirError(f"{done.aside}: {error}") from error
        console.say(f"checkpoints that do not belong to this run from here on, or are broken, are now in {done.aside}")
    if progress.best_map is not None and not done.has_best:
        console.say(
            f"the weights of the best mAP so far ({progress.best_map:.3f}, epoch {progress.best_epoch}) are not there "
            "any more: best.pt begins anew"
        )
    return done.has_best


def _open_recorder(
    config: RunConfig,
    processes: Processes,
    output: RunDir,
    console: Console,
    schedule: Schedule,
    progress: Progress,
) -> MetricLogger:
    if not processes.is_main:
        return MetricLogger(console)
    # A validation stands at the last iteration before it, and is repeated where the checkpoint says it is due.
    val_from = progress.iteration - int(progress.validation_due)
    try:
        log = MetricsLog(output.metrics)
        log.cut(progress.iteration, val_from)
        board = TensorBoardLog(output.tensorboard, first_iteration=progress.iteration, val_from=val_from)
        record = config_record(config, processes, schedule, output.config, progress.iteration)
        write_json(output.config, record)
        metric_logger = MetricLogger(
            console,
            log,
            board,
            describe=partial(_describe, configuration_text(record), config, processes, schedule),
            best_epoch=progress.best_epoch,
        )
        metric_logger.flush()
        output.mark_as_begun()
    except OSError as error:
        raise RunDirError(f"{output.path}: cannot be written: {error}") from error
    return metric_logger


def _describe(
    configuration: str, config: RunConfig, processes: Processes, schedule: Schedule, board: TensorBoardLog
) -> None:
    board.text("configuration", configuration)
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


def _require_saved(problem: str | None) -> None:
    if problem is not None:
        raise CheckpointError(
            f"{problem}\nThe newest state of the run is NOT saved; make room and go on with --resume."
        )
