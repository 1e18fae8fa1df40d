"""One training from its components to its last checkpoint."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from functools import partial
from typing import Any

from data import NEWEST_ORDER, CocoDataset, TrainLoader
from data.loading.dataset import sets_of
from detection.engine.accelerate.algorithm_search import AlgorithmSearch
from detection.engine.accelerate.choice import Acceleration, acceleration_of, has_few_shapes, searches_algorithms
from detection.engine.accelerate.compile import compile_for_training, uncompiled
from detection.engine.accelerate.cuda_graphs import StepGraphs, cuda_step_graphs, record_detection
from detection.engine.accelerate.device_memory import REMEDIES, device_memory
from detection.engine.build import Components, run_schedule
from detection.engine.context import RunContext
from detection.engine.distributed.agreement import RunError, run_on_all_ranks, run_on_main_rank
from detection.engine.distributed.comm import Processes
from detection.engine.distributed.signals import STOPPED_EXIT_CODE, Interrupted, Stopped
from detection.engine.evaluator import Evaluator, coco_evaluator, evaluate_set
from detection.engine.inputs.augmentation import augmentation_of, sampling_of
from detection.engine.inputs.bad_images import BadImages, TooManyBadImages
from detection.engine.metrics.best import check_best_metric
from detection.engine.metrics.images import training_mosaic
from detection.engine.metrics.logger import MetricLogger
from detection.engine.metrics.step_metrics import NonFiniteLoss, StepMetrics
from detection.engine.metrics.training_log import TrainingLog
from detection.engine.optim.amp import Precision
from detection.engine.optim.ema import AveragedModel
from detection.engine.optim.gradient_buckets import GradientBuckets
from detection.engine.optim.gradients import GradientComputer
from detection.engine.optim.nonfinite import NonFiniteGuard
from detection.engine.optim.optimizer import build_optimizer, parameter_facts, set_learning_rate
from detection.engine.optim.update import ParameterUpdate
from detection.engine.run_summary import closing_summary, config_record, configuration_text, describe_run
from detection.engine.state.best_weights import complete_best_weights
from detection.engine.state.checkpoint import BEST, CheckpointError, LoadedCheckpoint, load_checkpoint
from detection.engine.state.checkpoint_store import Checkpointer, CheckpointStore, continue_from
from detection.engine.state.resume import check_resumable, image_order_of, resumed_progress
from detection.engine.state.run_dir import RunDirError, write_json
from detection.engine.state.train_state import Ending, Facts, Progress, TrainState, assert_same_on_all_ranks, run_facts
from detection.engine.trainer import Trainer
from detection.engine.trial import MARGIN, MemoryTrial, largest_that_fits
from detection.evaluation import METRIC_NAMES, metric_names
from detection.models import AnyDetector, FasterRCNN, OwnDetector, is_own, model_config
from detection.models.weights.files import BEST_WEIGHTS
from detection.reporting import MetricsLog, TensorBoardLog, TrackedRun, TrackerFeed, tracker_named
from detection.reporting.metrics_log import OF_CLASS
from schedules import Schedule, unmatched_custom_keys


def run_training(
    context: RunContext, components: Components, checkpoint: LoadedCheckpoint | None, changes: list[str]
) -> int:
    """Train to the schedule's end, from `checkpoint` where one is given; the exit status.

    changes: lines on settings of the command line that are not those of the checkpoint's run.
    """
    config, processes, console = context.config, context.processes, context.console
    image_order = NEWEST_ORDER if checkpoint is None else image_order_of(checkpoint)
    make_loader = partial(_train_loader, context, components, workers=context.num_workers, image_order=image_order)
    loader = run_on_all_ranks(processes, make_loader)
    acceleration = acceleration_of(config.train, processes.device, processes.world_size, components.model)
    graphs = None
    if acceleration.graphs:
        graphs = run_on_all_ranks(processes, partial(cuda_step_graphs, components.model, console.warn))
    state = _build_state(context, components, loader, checkpoint, changes, acceleration)
    if acceleration.compile:
        # Each compiled part leaves its gradients at its end: smaller parts, so that they travel while others compute.
        assert isinstance(state.model, FasterRCNN)
        by_stage = processes.world_size > 1 and graphs is None
        compile_for_training(state.model, by_stage=by_stage, warn=console.warn)
    if (trial := _memory_trial(context, graphs=acceleration.graphs)) is not None:
        if acceleration.graphs and not acceleration.graphs_asked_for and not trial.fits_with_margin(state, loader):
            console.say(f"no CUDA graphs: with them less than {MARGIN:.0%} of the memory would be left")
            graphs, trial = None, _memory_trial(context, graphs=False)
        assert trial is not None
        console.say(trial.require_fit(state, loader))
    progress = state.progress
    if (reason := state.reason_to_end(config.train.patience)) is not None and not progress.validation_due:
        console.say(f"nothing is left to train: {reason}")
    if config.dry_run:
        console.say("dry run: everything above was checked; nothing was trained or written.")
        return 0

    if checkpoint is not None:
        if not run_on_main_rank(processes, partial(_leave_other_future, context, checkpoint, progress)):
            progress.forget_best()
        checkpoint.state.clear()  # everything was copied out of it; it has the size of several models
    logger = run_on_all_ranks(processes, partial(_open_logger, context, components, progress))
    bad_images = BadImages(processes, console, config.data.max_bad_images)
    if progress.iteration == 0 and processes.is_main:
        first = _train_loader(context, components, workers=0).batches(0, loader.iterations_per_epoch)
        mosaics = []
        with contextlib.suppress(Interrupted), context.stop.interrupting():
            mosaics = [training_mosaic(first, loader.dataset.class_names)]
        logger.images(0, mosaics, "train/batch")
    if graphs is not None:
        record_detection(state.validated_model[0], graphs.backend, console.warn)
    evaluator = _validation(context, components, state.precision, logger, bad_images)
    store = CheckpointStore(
        context.output.checkpoints, config.output.keep_checkpoints, context.output.path / BEST_WEIGHTS
    )
    # NCCL is not safe to fork under, and begins in _build_trainer.
    loader.start()
    if evaluator is not None:
        evaluator.loader.start()
    trainer = _build_trainer(context, state, loader, logger, bad_images, evaluator, store, graphs)
    status, problem = 0, None
    try:
        trainer.train()
    except Stopped as stopped:
        status = STOPPED_EXIT_CODE
        by = context.stop.signal_name or "a signal to another process"
        console.say(f"stopped by {by} {stopped} (exit status {status}); continue with --resume")
    except (NonFiniteLoss, TooManyBadImages) as error:  # every process has it
        raise RunError(str(error)) from error
    else:
        logger.finish(progress.iteration)
    finally:
        if processes.is_main and (problem := store.close()) is not None:
            console.warn(problem)
        logger.close()
        loader.close()
        if evaluator is not None:
            evaluator.close()
    # At the end nothing more can be tried: a run whose last checkpoint is missing has failed.
    run_on_main_rank(processes, partial(_require_saved, context, problem))
    if status == 0:
        # Of a part of the set, every image that was not run would count as one where nothing was found.
        is_whole = logger.num_validated == len(components.evaluation_set or ())
        given = (("--model", config.model.model), ("--backbone", config.model.backbone or ""))
        own = "".join(f" {flag} {name}" for flag, name in given if is_own(name))
        console.say(
            closing_summary(context.output, logger, progress, bad_images, components.evaluation_files, is_whole, own)
        )
        if components.test_set is not None:
            status = _test(context, state, components.test_set)
    return status


def _test(context: RunContext, state: TrainState, dataset: CocoDataset) -> int:
    """Evaluate the test set with the weights of the best validation, or the last ones without any; the exit status.

    They take the place of the state's, which is saved and not needed any more.
    """
    model, name = state.validated_model
    best = context.output.checkpoints / BEST

    def take_best() -> str:
        if state.progress.best_epoch is None:
            return f"the last {name}"
        stored = load_checkpoint(best).state
        model.load_state_dict(stored["ema"] or stored["model"])
        return str(best)

    weights = run_on_main_rank(context.processes, take_best)
    context.processes.broadcast_weights(model)
    context.console.say(f"\ntest: {len(dataset)} images of {dataset.annotations.source}, {weights}")
    settings = context.config.train
    evaluate = uncompiled(evaluate_set) if settings.compile or settings.fast else evaluate_set
    tested = replace(context, config=replace(context.config, mode="test"))
    return evaluate(tested, dataset, model, state.precision)


def find_batch_size(context: RunContext, components: Components) -> RunContext:
    """The context with the most images a process that fit, in place of --batch-size auto; collective. The components'
    schedule becomes that of this batch.

    Raises:
        RunError: on every process, where not even one image fits.
    """
    config, processes, model = context.config, context.processes, components.model
    acceleration = acceleration_of(config.train, processes.device, processes.world_size, model)
    # More images are worth more than graphs that nobody asked for.
    trial = _memory_trial(context, graphs=acceleration.graphs_asked_for)
    assert trial is not None and components.train_set is not None
    asked = config.train.global_batch_size
    accumulate = components.schedule.accumulative_counts
    most = max((asked or len(components.train_set) // accumulate) // processes.world_size, 1)

    def sized(batch_size: int) -> RunContext:
        # The batch decides the learning rate, unless the user has decided both.
        scales = config.train.auto_scale_lr or asked is None
        train = replace(config.train, batch_size=batch_size, auto_scale_lr=scales)
        chosen = replace(context, config=replace(config, train=train).for_processes(processes.world_size))
        components.schedule, components.overrides = run_schedule(chosen.config, processes)
        return chosen

    def fits(batch_size: int) -> bool:
        chosen = sized(batch_size)
        loader = _train_loader(chosen, components, workers=0)
        schedule = components.schedule
        facts = {"iterations_per_epoch": loader.iterations_per_epoch, "schedule": schedule.to_dict()}
        state = _new_state(chosen, model, schedule, facts, Progress())
        return trial.fits_with_margin(state, loader)

    batch_size = largest_that_fits(fits, most)
    if batch_size is None:
        raise RunError(f"--batch-size auto: not even one image a process fits into memory.\n{REMEDIES}")
    chosen = sized(batch_size)
    context.console.say(
        f"--batch-size auto: {chosen.config.train.batch_size} images a process, with {MARGIN:.0%} of the memory left; "
        f"learning rate {components.schedule.optimizer.lr:g}"
        + (", scaled for the global batch (--auto-scale-lr)" if chosen.config.train.auto_scale_lr else "")
    )
    return chosen


def _new_state(
    context: RunContext, model: AnyDetector, schedule: Schedule, facts: Facts, progress: Progress
) -> TrainState:
    decay = schedule.ema_decay if context.config.train.ema is None else context.config.train.ema
    return TrainState(
        model,
        build_optimizer(model, schedule),
        Precision(schedule.amp or "off", context.processes.device, schedule.loss_scale),
        AveragedModel(model, decay) if decay is not None else None,
        schedule,
        facts,
        progress,
    )


def _build_state(
    context: RunContext,
    components: Components,
    loader: TrainLoader,
    checkpoint: LoadedCheckpoint | None,
    changes: list[str],
    acceleration: Acceleration,
) -> TrainState:
    """The training's state, as new or as the checkpoint has it; the start screen says which run this will be."""
    config, processes, console = context.config, context.processes, context.console
    schedule, model = components.schedule, components.model
    if config.train.patience is not None and components.evaluation_set is None:
        raise RunError("--patience counts validations, and there is no validation set: give one, or --max-hours")
    has_loss = config.output.val_loss and isinstance(model, FasterRCNN)
    figures = metric_names((components.evaluation_set or loader.dataset).annotations, config.output.voc_metric)
    for name in sets_of(components.evaluation_set) if components.evaluation_set is not None else ():
        of_classes = [OF_CLASS + each for each in loader.dataset.class_names]
        figures = (*figures, *(f"{name}/{figure}" for figure in (*METRIC_NAMES, *of_classes)))
    check_best_metric(config.train.best_metric, loader.dataset.class_names, figures, has_loss=has_loss)
    # What is wrong with the learning rate shows when it is first asked for.
    run_on_all_ranks(processes, lambda: schedule.learning_rate(0, loader.iterations_per_epoch))
    facts = run_facts(config, processes, schedule, model, loader, components.evaluation_set)
    assert_same_on_all_ranks(config, processes, facts)
    num_iterations = schedule.max_epochs * loader.iterations_per_epoch
    progress = Progress(ending=Ending(best_metric=config.train.best_metric))
    notes = [*components.overrides, *schedule.notes]
    if checkpoint is None and not isinstance(model, OwnDetector):
        named = vars(model_config(config.model.model))
        notes += [f"model {key}: {value}" for key, value in config.model.settings if named.get(key) != value]
    unused = unmatched_custom_keys(schedule.paramwise, parameter_facts(model))
    notes += [f"paramwise_cfg custom key {key!r} matches no parameter: it has no effect" for key in unused]
    if checkpoint is not None:
        changes = changes + run_on_all_ranks(processes, partial(check_resumable, checkpoint, facts, num_iterations))
        progress = resumed_progress(checkpoint, facts, num_iterations)
    console.say(describe_run(context, components, loader, progress, acceleration, changes=changes, notes=notes))
    state = _new_state(context, model, schedule, facts, progress)
    # Of every group: a multiplier may take its rate beyond what is possible.
    first = partial(set_learning_rate, state.optimizer, schedule, progress.iteration, loader.iterations_per_epoch)
    run_on_all_ranks(processes, first)
    if checkpoint is not None:
        for line in run_on_all_ranks(processes, partial(_restore, state, checkpoint)):
            console.say(line)
    return state


def _restore(state: TrainState, checkpoint: LoadedCheckpoint) -> list[str]:
    try:
        return state.load_state_dict(checkpoint.state)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _validation(
    context: RunContext, components: Components, precision: Precision, logger: MetricLogger, bad_images: BadImages
) -> Evaluator | None:
    if components.evaluation_set is None:
        context.console.say("no validation set is given: the run trains without validation")
        return None
    coco = coco_evaluator(context, components.evaluation_set)
    return Evaluator(context, components.evaluation_set, coco, precision, logger, bad_images)


def _build_trainer(
    context: RunContext,
    state: TrainState,
    loader: TrainLoader,
    logger: MetricLogger,
    bad_images: BadImages,
    evaluator: Evaluator | None,
    store: CheckpointStore,
    graphs: StepGraphs | None,
) -> Trainer:
    config, processes = context.config, context.processes
    validate = evaluator.validate if evaluator is not None else None
    if validate is not None and (config.train.compile or config.train.fast):
        validate = uncompiled(validate)
    processes.broadcast_weights(state.model)
    search = AlgorithmSearch() if searches_algorithms(config.train, processes.device) else None
    gradients, update = _build_step(context, state, processes, graphs, search)
    metrics = StepMetrics(
        processes,
        images_per_iteration=loader.global_batch_size,
        gradient_may_overflow=state.precision.amp == "fp16",
        skips_nonfinite=config.train.skip_nonfinite,
    )
    log_interval = config.output.log_interval_on(processes.device.type)
    log = TrainingLog(processes, loader, metrics, logger, bad_images, log_interval=log_interval)
    checkpointer = Checkpointer(
        store,
        processes,
        logger,
        minutes=config.output.checkpoint_minutes,
        iterations=config.output.checkpoint_iterations,
    )
    return Trainer(context, state, loader, gradients, update, log, checkpointer, validate)


def _build_step(
    context: RunContext,
    state: TrainState,
    processes: Processes,
    graphs: StepGraphs | None,
    search: AlgorithmSearch | None,
) -> tuple[GradientComputer, ParameterUpdate]:
    """What computes the gradients of an iteration, and what applies them."""
    config, model, schedule, precision = context.config, state.model, state.schedule, state.precision
    buckets = GradientBuckets(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        processes,
        stay=graphs is not None,
        in_rank_order=config.train.deterministic,
    )
    may_overflow, skips = precision.amp == "fp16", config.train.skip_nonfinite
    guard = NonFiniteGuard(model, skips=skips, gradient_may_overflow=may_overflow)
    gradients = GradientComputer(
        model,
        buckets,
        precision,
        guard,
        accumulate=schedule.accumulative_counts,
        graphs=graphs,
        search=search,
    )
    update = ParameterUpdate(
        model,
        state.optimizer,
        schedule,
        precision,
        guard,
        iterations_per_epoch=state.iterations_per_epoch,
        ema=state.ema,
    )
    return gradients, update


def _memory_trial(context: RunContext, *, graphs: bool) -> MemoryTrial | None:
    """What tries whether the training fits, in graphs or not; None where the device has no limit of its own."""
    memory = device_memory(context.processes.device)
    if memory is None:
        return None

    def build_step(state: TrainState, processes: Processes) -> tuple[GradientComputer, ParameterUpdate]:
        # Graphs of its own, which go with their memory: the training's gradients will lie elsewhere.
        own = cuda_step_graphs(state.model, lambda line: None) if graphs else None
        # A search takes memory only where there is some, and gives it back.
        return _build_step(context, state, processes, own, search=None)

    # A size is captured when it comes for the third time.
    return MemoryTrial(context.processes, memory, build_step, passes=3 if graphs else 1)


def _train_loader(
    context: RunContext, components: Components, *, workers: int, image_order: int = NEWEST_ORDER
) -> TrainLoader:
    assert components.train_set is not None
    config, processes = context.config, context.processes
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
        sampling=sampling_of(config.augmentation),
        image_order=image_order,
        limit_batches=config.data.limit_train_batches,
        epoch_iterations=components.schedule.epoch_iterations,
        few_shapes=has_few_shapes(config.train, processes.device),
        pin=processes.device.type == "cuda" and workers > 0,
        max_bad_images=config.data.max_bad_images,
    )


def _leave_other_future(context: RunContext, checkpoint: LoadedCheckpoint, progress: Progress) -> bool:
    """Continue from `checkpoint` alone: what the folder has beyond it is moved aside, its curves too.

    Returns:
        Whether the best weights so far, if `progress` knows of any, are there.
    """
    output, console = context.output, context.console
    done = continue_from(output.checkpoints, checkpoint, progress)
    if done.aside is not None:
        try:
            if output.metrics.is_file():
                shutil.copyfile(output.metrics, done.aside / output.metrics.name)
        except OSError as error:
            raise RunDirError(f"{done.aside}: {error}") from error
        console.say(f"checkpoints that do not belong to this run from here on, or are broken, are now in {done.aside}")
    if progress.ending.best_value is not None and not done.has_best:
        console.say(
            f"the weights of the best {progress.ending.best_metric} so far (epoch {progress.best_epoch}) are not there "
            "any more: best.pt begins anew"
        )
    return done.has_best


def _open_logger(context: RunContext, components: Components, progress: Progress) -> MetricLogger:
    output, console, schedule = context.output, context.console, components.schedule
    if not context.processes.is_main:
        return MetricLogger(console)
    # A validation stands at the last iteration before it, and is repeated where the checkpoint says it is due.
    val_from = progress.iteration - int(progress.validation_due)
    try:
        log = MetricsLog(output.metrics)
        log.cut(progress.iteration, val_from)
        board = TensorBoardLog(output.tensorboard, first_iteration=progress.iteration, val_from=val_from)
        record = config_record(context, schedule, components.evaluation_files, progress.iteration)
        write_json(output.config, record)
        describe = partial(_describe, context, schedule, configuration_text(record))
        trackers = _tracker_feeds(context, record, progress.iteration)
        logger = MetricLogger(
            console,
            log,
            board,
            describe=describe,
            best_epoch=progress.best_epoch,
            best_metric=progress.ending.best_metric,
            trackers=trackers,
        )
        logger.flush()
        output.mark_as_begun(context.processes.nodes)
    except OSError as error:
        raise RunDirError(f"{output.path}: cannot be written: {error}") from error
    return logger


def _tracker_feeds(context: RunContext, record: dict[str, Any], iteration: int) -> list[TrackerFeed]:
    """What passes the run on to the tracker of --tracker, and to the caller's own."""
    named = {type(tracker).__name__: tracker for tracker in context.trackers}
    if (name := context.config.output.tracker) is not None:
        named[name] = tracker_named(name)
    output, settings = context.output, {name: value for name, value in record.items() if name != "starts"}
    run = TrackedRun(output.path.resolve().name, output.path, settings, iteration)
    return [
        TrackerFeed(name, tracker, run, output.tracker(name), context.console.warn) for name, tracker in named.items()
    ]


def _describe(context: RunContext, schedule: Schedule, configuration: str, board: TensorBoardLog) -> None:
    config = context.config
    board.text("configuration", configuration)
    board.text("schedule", "\n".join(schedule.describe()), verbatim=True)
    board.hparams(
        {
            "model": config.model.model,
            "schedule": config.train.schedule,
            "lr": schedule.optimizer.lr,
            "epochs": schedule.max_epochs,
            "batch_size_total": config.train.batch_size * context.processes.world_size * schedule.accumulative_counts,
            "amp": schedule.amp or "off",
            "weights": config.model.weights,
            "min_size": config.data.min_size,
            "seed": config.train.seed,
        }
    )


def _require_saved(context: RunContext, problem: str | None) -> None:
    if problem is None:
        try:
            complete_best_weights(context.output.path / BEST_WEIGHTS, context.output.checkpoints)
        except OSError as error:
            problem = f"{context.output.path / BEST_WEIGHTS} could not be written: {error}"
    if problem is not None:
        raise CheckpointError(
            f"{problem}\nThe newest state of the run is NOT saved; make room and continue with --resume."
        )
