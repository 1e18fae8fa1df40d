"""What a run is made of before it begins: schedule, data, model with its starting weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import CocoAnnotations, CocoDataset
from data.coco.layout import SplitFiles
from data.layouts.found_set import FoundSet
from data.loading.dataset import ConcatDataset
from detection.config import ConfigError
from detection.config.run_config import RunConfig
from detection.engine.accelerate.cuda_graphs import require_cuda_graphs
from detection.engine.distributed.comm import Processes
from detection.engine.distributed.cpu_threads import crowding
from detection.engine.distributed.sync_batch_norm import synchronize_batch_norm
from detection.engine.inputs.datasets import DatasetFiles, prepare_files
from detection.engine.optim.amp import multiplies_bfloat16
from detection.engine.optim.optimizer import is_fused
from detection.engine.state.checkpoint import CheckpointError, LoadedCheckpoint, load_checkpoint, newest_checkpoint
from detection.engine.state.run_dir import RunDir
from detection.engine.state.train_state import stored_model
from detection.evaluation import resolve_backend
from detection.evaluation.federated import MAX_DETECTIONS
from detection.models import (
    AnyDetector,
    OwnDetector,
    WeightsError,
    build_detector,
    imported,
    is_own,
    load_detector,
    load_weights,
    model_config,
    model_from_config,
    prefetch_weights,
)
from detection.reporting import tracker_named
from schedules import Schedule, config_schedule, load_schedule, with_overrides


@dataclass
class Components:
    """What every process builds for itself."""

    schedule: Schedule
    overrides: list[str]
    train_set: CocoDataset | None
    evaluation_set: CocoDataset | None
    """Validation set, or test set in a test run."""
    evaluation_files: tuple[SplitFiles, ...]
    test_set: CocoDataset | None
    """What a training is tested on at its end."""
    model: AnyDetector
    weights_line: str
    """Where its weights come from, and what of it is trained."""


def preflight(
    config: RunConfig, output: RunDir, processes: Processes
) -> tuple[LoadedCheckpoint | None, tuple[FoundSet, ...], list[str]]:
    """Everything that only the main process may do, and everything cheap that can be wrong.

    Returns:
        The checkpoint to resume from, what the folders of --data-path hold (`find_data`), and lines that the start of
        the run should show.
    """
    schedule, _ = _load_schedule(config)
    if config.train.skip_nonfinite and (schedule.optimizer.kwargs.get("dampening") or not is_fused(schedule)):
        raise ConfigError(
            "--skip-nonfinite does not go with an optimizer's dampening, foreach=True or fused=False: only a fused "
            "step can be skipped on the device. Leave one of them away"
        )
    if config.train.cuda_graphs:
        require_cuda_graphs(processes.device)
    if config.mode != "test":
        resolve_backend(config.output.eval_backend)
    if config.mode == "train" and config.output.tracker is not None:
        tracker_named(config.output.tracker)
    resume, overwrite = config.output.resume, config.output.overwrite
    is_restart = config.mode == "train" and not config.dry_run and output.was_begun_by_torchrun(processes.nodes)
    if is_restart:
        # What the run was begun with, an older checkpoint or none, would throw away what it has done since.
        resume, overwrite = "auto", False
    # Before the data, which may take a while to find and to read.
    settings = _model_settings(config) if resume is None else _chosen_settings(config)
    if is_own(config.model.model):
        imported(config.model.model)
    else:
        backbone = model_config(config.model.model, num_classes=1, **settings).backbone
        if is_own(backbone):
            imported(backbone)
    if config.augmentation.augmentation is not None:
        imported(config.augmentation.augmentation)
    masks = has_masks(config, None)
    for name in ("copy_paste", "lsj_boxes_of_masks"):
        if getattr(config.augmentation, name) and not masks:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} needs a model with masks, such as mask_rcnn_r50_fpn; not {config.model.model}")
    found, data_lines = prepare_files(config.data, mode=config.mode, masks=masks)
    lines = [*config.config_notes, *data_lines]
    if schedule.amp == "fp16" and processes.device.type == "cpu":
        # Not refused: the figures are right, and float16 can be tried where there is no GPU.
        lines.append("warning: float16 on a CPU takes some forty times as long as float32: use --amp bf16 or --amp off")
    elif schedule.amp == "bf16" and not multiplies_bfloat16(processes.device):
        lines.append("warning: this device has no instructions for bfloat16, so float32 is faster: use --amp off")
    if processes.device.type == "cpu" and (crowded := crowding(processes.local_world_size)) is not None:
        lines.append(crowded)
    if is_restart:
        lines.append("started again by torchrun: the run resumes from its own newest checkpoint")
    if resume is None:
        _prefetch(config)
    # The output directory comes last: a run that cannot begin leaves it as it was.
    if config.mode == "train" and not config.dry_run:
        lines += output.claim(overwrite=overwrite, resume=resume is not None)
    elif config.dry_run:
        if config.mode == "train":
            output.check(overwrite=overwrite, resume=resume is not None)
        output.check_usable()
    else:
        lines += output.lock()
    if resume is None:
        return None, found, lines
    checkpoint = _checkpoint_to_resume(resume, output, is_restart=is_restart)
    if checkpoint is not None:
        return checkpoint, found, [*lines, *(f"skipped: {reason}" for reason in checkpoint.skipped)]
    if config.mode != "train":
        raise CheckpointError(f"{output.checkpoints}: there is no checkpoint to evaluate; give --weights FILE")
    _prefetch(config)
    return None, found, lines


def has_masks(config: RunConfig, checkpoint: LoadedCheckpoint | None) -> bool:
    """Whether the run's model gives masks: that of the checkpoint, of a weights file with its own model, or of the
    command line."""
    if checkpoint is not None:
        return bool(checkpoint.state["model_config"].get("has_masks"))
    if config.mode != "train" and Path(config.model.weights).is_file():
        with contextlib.suppress(WeightsError):  # weights of another project, without a model
            return bool(getattr(load_detector(config.model.weights).model.config, "has_masks", False))
    return not is_own(config.model.model) and model_config(config.model.model, **_chosen_settings(config)).has_masks


def _prefetch(config: RunConfig) -> None:
    if not is_own(config.model.model):
        named = model_config(config.model.model, **_chosen_settings(config))
        prefetch_weights(config.model.weights, named.backbone, masks=named.has_masks)


def _checkpoint_to_resume(resume: str, output: RunDir, *, is_restart: bool) -> LoadedCheckpoint | None:
    folder = output.checkpoints
    if resume != "auto":
        if not Path(resume).is_dir():
            return load_checkpoint(Path(resume))
        folder = Path(resume) / folder.name
        if not folder.is_dir():
            raise CheckpointError(f"{resume} is a folder without {folder.name}: give a checkpoint, or a run's folder")
    try:
        return newest_checkpoint(folder)
    except CheckpointError as error:
        again = "\nThe run was started again by this torchrun, which counts as --resume: start torchrun anew."
        raise CheckpointError(f"{error}{again if is_restart else ''}") from error


def _load_schedule(config: RunConfig) -> tuple[Schedule, list[str]]:
    if config.config_file is not None and config.train.schedule == str(config.config_file):
        schedule = config_schedule(config.config_file, config.cfg_options)
    else:
        schedule = load_schedule(config.train.schedule)
    pairs = dict(text.split("=", 1) for text in config.train.overrides)
    schedule, lines = with_overrides(schedule, {key.strip(): value.strip() for key, value in pairs.items()})
    if config.train.accumulate not in (None, schedule.accumulative_counts):
        lines.append(f"optim_wrapper.accumulative_counts: {schedule.accumulative_counts} -> {config.train.accumulate}")
        schedule = replace(schedule, accumulative_counts=config.train.accumulate)
    if config.train.clip_grad is not None:
        schedule, clip_lines = with_overrides(
            schedule, {"optim_wrapper.clip_grad": f"dict(max_norm={config.train.clip_grad!r}, norm_type=2)"}
        )
        lines += clip_lines
    if config.train.amp is not None and config.train.amp != (schedule.amp or "off"):
        lines.append(f"mixed precision: {schedule.amp or 'off'} -> {config.train.amp}")
        schedule = replace(schedule, amp=None if config.train.amp == "off" else config.train.amp)
    return schedule, lines


def run_schedule(config: RunConfig, processes: Processes) -> tuple[Schedule, list[str]]:
    """The schedule as the command line changes it, its learning rate for the global batch, and a line each change."""
    schedule, overrides = _load_schedule(config)
    global_batch_size = config.train.batch_size * processes.world_size * schedule.accumulative_counts
    if global_batch_size and (config.train.auto_scale_lr or schedule.auto_scale_lr_enabled):
        schedule = schedule.scaled(global_batch_size)
    return schedule, overrides


def build(
    config: RunConfig,
    processes: Processes,
    checkpoint: LoadedCheckpoint | None,
    files: DatasetFiles,
    annotations: dict[Path, CocoAnnotations],
) -> Components:
    """What every process builds for itself, of the checkpoint and the annotation files (by path) that all have."""
    schedule, overrides = run_schedule(config, processes)
    # A listing of the image folder takes seconds on a network's file system. Process 0 has made one in `preflight`.
    look_for_images = processes.rank == processes.node_main and not processes.is_main
    if config.mode == "train":
        large = {
            each.annotations: annotations[each.annotations].ignoring_below(config.data.min_box_side)
            for each in files.train
        }
        train_set = _dataset(files.train, large, training=True, look_for_images=look_for_images)
        assert train_set is not None
        class_names = train_set.class_names
        model, weights_line = _model_to_train(config, processes, checkpoint, train_set.annotations)
    else:
        train_set = None
        model, class_names, weights_line = _model_to_evaluate(config, checkpoint, files, annotations)
    model = _place(config, processes, model)
    evaluation_files = files.test if config.mode == "test" else files.val
    evaluation_set, test_set = (
        _dataset(
            splits,
            {each.annotations: annotations[each.annotations].with_classes(class_names) for each in splits},
            training=False,
            # To be judged masks need no bitmaps.
            bitmaps=config.output.val_loss,
            look_for_images=look_for_images,
        )
        for splits in (evaluation_files, files.test if config.mode == "train" else ())
    )
    return Components(schedule, overrides, train_set, evaluation_set, evaluation_files, test_set, model, weights_line)


def _dataset(
    splits: tuple[SplitFiles, ...],
    annotations: Mapping[Path, CocoAnnotations],
    *,
    training: bool,
    bitmaps: bool = True,
    look_for_images: bool,
) -> CocoDataset | None:
    """The images of these files, of several sets behind each other; None where there are none."""
    parts = [
        CocoDataset(
            files.images,
            (read := annotations[files.annotations]),
            training=training,
            masks=bitmaps and read.segmentations is not None,
            look_for_images=look_for_images,
        )
        for files in splits
    ]
    return ConcatDataset(parts, [files.set_name for files in splits]) if len(parts) > 1 else parts[0] if parts else None


def _model_to_train(
    config: RunConfig, processes: Processes, checkpoint: LoadedCheckpoint | None, annotations: CocoAnnotations
) -> tuple[AnyDetector, str]:
    """The model with its starting weights, and a line that says where they come from."""
    if checkpoint is not None:
        # Settings come with the weights: what is frozen and how it is normalized cannot change in mid-run.
        return _stored_model(config, checkpoint), f"{checkpoint.path} (iteration {checkpoint.state['iteration']})"
    class_names = annotations.class_names
    torch.manual_seed(config.train.seed)
    model = build_detector(config.model.model, len(class_names), **_settings_for(config, annotations))
    if isinstance(model, OwnDetector) and config.model.weights == "none":
        return model, f"as {config.model.model} gives them"
    if config.model.weights == "none":
        norm = "group norm" if config.model.norm == "gn" else "batch norm is trained"
        warning = ""
        if model.config.frozen_stages >= 0:
            warning = "\n  WARNING: what is frozen has random weights, which are never learned: leave --freeze away"
        return model, f"none: random weights, {norm}\n{_describe_frozen(model)}{warning}"
    report = load_weights(model, config.model.weights, category_ids=annotations.category_ids)
    lines = [report.table(), *_renamed_classes(config, class_names), _describe_frozen(model)]
    return model, "\n".join(lines)


def _renamed_classes(config: RunConfig, class_names: tuple[str, ...]) -> list[str]:
    """A warning where the weights' head fits by its number of classes, and was trained for others."""
    spec = config.model.weights
    if not Path(spec).exists():
        return []
    try:
        before = load_detector(spec, own_code=_own_code(config)).class_names
    except WeightsError:  # weights of another project, without class names
        return []
    changed = [f"{old!r} is now {new!r}" for old, new in zip(before, class_names, strict=False) if old != new]
    if len(before) != len(class_names) or not changed:
        return []
    some = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    return [
        f"  WARNING: the weights are for as many classes under other names, so the head is kept: {some}. "
        "Where that is another object or another order, the head has to unlearn it"
    ]


def _describe_frozen(model: AnyDetector) -> str:
    """What of the model keeps its weights."""
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stages = model.config.frozen_stages
    parts = ["stem", *(f"stage {number}" for number in range(1, stages + 1))] if stages >= 0 else []
    if stages == 4:
        parts = ["the whole backbone"]
    if model.config.norm == "frozen_bn":
        parts.append("statistics of batch norm")
    return f"frozen: {', '.join(parts) or 'nothing'}; {frozen:,} parameters frozen, {trained:,} trained"


def _model_to_evaluate(
    config: RunConfig,
    checkpoint: LoadedCheckpoint | None,
    files: DatasetFiles,
    annotations: dict[Path, CocoAnnotations],
) -> tuple[AnyDetector, tuple[str, ...], str]:
    """The model with trained weights, its class names, and a line that says where the weights come from."""
    spec = config.model.weights
    if checkpoint is not None:
        state = checkpoint.state
        average = ", averaged weights" if state["ema"] is not None else ""
        line = f"{checkpoint.path} (iteration {state['iteration']}{average})"
        model = _with_chosen_settings(config, _stored_model(config, checkpoint, averaged=bool(average)))
        sizes = state["preprocessing"]["min_size"], state["preprocessing"]["max_size"]
        return model, tuple(state["class_names"]), line + _other_scale(config, *sizes)
    if Path(spec).exists():
        with contextlib.suppress(WeightsError):  # weights of another project, without a model and classes
            detector = load_detector(spec, own_code=_own_code(config))
            line = f"{spec} (with its own model, {detector.model.config.backbone})"
            line += _other_scale(config, detector.min_size, detector.max_size)
            return _with_chosen_settings(config, detector.model), detector.class_names, line
    chosen = (files.test if config.mode == "test" else files.val)[0]
    names, category_ids = annotations[chosen.annotations].class_names, annotations[chosen.annotations].category_ids
    model = build_detector(config.model.model, len(names), **_settings_for(config, annotations[chosen.annotations]))
    report = load_weights(model, spec, category_ids=category_ids) if spec != "none" else None
    if report is None or report.missing or report.reshaped:
        raise ConfigError(
            f"--{config.mode}-only needs the weights of a whole detector: give --weights FILE, or --resume"
            + ("" if report is None else f"\n{report.table()}")
        )
    return model, names, report.table()


def _stored_model(config: RunConfig, checkpoint: LoadedCheckpoint, *, averaged: bool = False) -> AnyDetector:
    try:
        return stored_model(checkpoint.state, averaged=averaged, own_code=_own_code(config))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _own_code(config: RunConfig) -> tuple[str | None, str | None]:
    """The code of the user's own that the command line names."""
    return config.model.model, config.model.backbone


def _other_scale(config: RunConfig, min_size: int, max_size: int) -> str:
    if (min_size, max_size) == (config.data.min_size, config.data.max_size):
        return ""
    return (
        f"\nnote: trained at --min-size {min_size} --max-size {max_size}, evaluated at "
        f"{config.data.min_size} and {config.data.max_size}"
    )


def _model_settings(config: RunConfig) -> dict[str, Any]:
    """Settings of a new model: those of the command line, and what the starting weights decide where it does not."""
    if is_own(config.model.model):
        return _chosen_settings(config)
    settings: dict[str, Any] = {}
    from_none = config.model.weights == "none"
    own_backbone = config.model.backbone is not None
    norm = config.model.norm
    if norm == "auto":
        norm = "bn" if from_none or config.model.sync_bn else "frozen_bn"
    if norm == "frozen_bn" and from_none and config.mode == "train" and not own_backbone:
        raise ConfigError(
            "--norm frozen_bn with --weights none freezes random statistics, from which nothing can be learned: "
            "use --norm bn or gn, or pretrained weights"
        )
    settings["norm"] = norm
    frozen = config.model.frozen_stages
    settings["frozen_stages"] = frozen if frozen is not None else (-1 if from_none or own_backbone else 1)
    if norm == "gn":
        settings["fpn_norm"] = "gn"
    return settings | _chosen_settings(config)


def _settings_for(config: RunConfig, annotations: CocoAnnotations) -> dict[str, Any]:
    """_model_settings, with as many detections an image as LVIS's evaluation takes where the file is one of LVIS."""
    settings = _model_settings(config)
    if annotations.federated is not None and not is_own(config.model.model):
        settings.setdefault("detections_per_image", MAX_DETECTIONS)
    return settings


def _chosen_settings(config: RunConfig) -> dict[str, Any]:
    """What --model-set and --backbone say."""
    settings = dict(config.model.settings)
    if is_own(config.model.model):
        if "num_classes" in settings:
            raise ConfigError("--model-set num_classes=... cannot be given here: the data set decides it")
        return settings
    for key, instead in (("num_classes", "the data set decides it"), ("norm", "--norm"), ("backbone", "--backbone")):
        if key in settings:
            raise ConfigError(f"--model-set {key}=... cannot be given here: {instead}")
    return settings if config.model.backbone is None else settings | {"backbone": config.model.backbone}


def _with_chosen_settings(config: RunConfig, model: AnyDetector) -> AnyDetector:
    """The same weights in a model with the settings of --model-set."""
    settings = _chosen_settings(config)
    if not settings:
        return model
    before = asdict(model.config)
    after = before | ({"settings": before["settings"] | settings} if "factory" in before else settings)
    changed = model_from_config(after, own_code=_own_code(config))
    try:
        changed.load_state_dict(model.state_dict())
    except RuntimeError as error:
        given = " ".join(f"--model-set {key}={value}" for key, value in settings.items())
        raise ConfigError(
            f"{given}: the weights do not fit into such a model. Leave away what changes the shape of weights"
        ) from error
    return changed


def _place(config: RunConfig, processes: Processes, model: AnyDetector) -> AnyDetector:
    if config.model.sync_bn:
        if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise ConfigError("--sync-bn: the model has no trained batch norm; add --norm bn")
        synchronize_batch_norm(model, processes.device)
    model = model.to(processes.device)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model
