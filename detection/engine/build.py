"""What a run is made of before it begins: schedule, data, model with its starting weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import CocoDataset, read_coco
from detection.config import ConfigError, RunConfig
from detection.engine.checkpoint import CheckpointError, LoadedCheckpoint, load_checkpoint, newest_checkpoint
from detection.engine.datasets import (
    DatasetFiles,
    SplitFiles,
    dataset_files,
    load_evaluation,
    load_train,
    prepare_files,
)
from detection.engine.distributed import Processes
from detection.engine.output_directory import OutputDirectory
from detection.engine.sync_batch_norm import synchronise_batch_norm
from detection.models import FasterRCNN, build_model, load_weights, model_from_config, prefetch_weights
from schedules import Schedule, load_schedule


@dataclass(frozen=True)
class Prepared:
    """What the main process made sure of before the others began."""

    resume_path: Path | None
    lines: tuple[str, ...]


@dataclass
class Built:
    """What every process builds for itself."""

    schedule: Schedule
    overrides: list[str]
    train_set: CocoDataset | None
    evaluation_set: CocoDataset | None
    """Validation set, or test set in a test run."""
    evaluation_files: SplitFiles | None
    model: FasterRCNN
    weights_line: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]


def prepare(config: RunConfig, output: OutputDirectory) -> Prepared:
    """Everything that only one process may do, and everything cheap that can be wrong."""
    _load_schedule(config)
    lines: list[str] = []
    if not config.dry_run:
        if config.mode == "train":
            moved = output.claim(overwrite=config.output.overwrite, resume=config.output.resume is not None)
            lines += [moved] if moved else []
        else:
            output.path.mkdir(parents=True, exist_ok=True)
    resume_path = None
    if config.output.resume == "auto":
        found = newest_checkpoint(output.checkpoints)
        if found is not None:
            resume_path = found.path
            lines += [f"skipped: {reason}" for reason in found.skipped]
    elif config.output.resume is not None:
        resume_path = load_checkpoint(Path(config.output.resume)).path
    if config.mode != "train" and config.output.resume is not None and resume_path is None:
        raise CheckpointError(f"{output.checkpoints}: there is no checkpoint to evaluate; give --weights FILE")
    prepare_files(config.data, mode=config.mode)
    if resume_path is None and config.model.weights != "none":
        prefetch_weights(config.model.weights, config.model.model)
    return Prepared(resume_path, tuple(lines))


def _load_schedule(config: RunConfig) -> tuple[Schedule, list[str]]:
    schedule = load_schedule(config.train.schedule)
    pairs = dict(text.split("=", 1) for text in config.train.overrides)
    schedule, lines = schedule.with_overrides({key.strip(): value.strip() for key, value in pairs.items()})
    if config.train.accumulate is not None:
        lines.append(f"optim_wrapper.accumulative_counts: {schedule.accumulative_counts} -> {config.train.accumulate}")
        schedule = replace(schedule, accumulative_counts=config.train.accumulate)
    if config.train.clip_grad is not None:
        clip, lines_ = schedule.with_overrides(
            {"optim_wrapper.clip_grad": f"dict(max_norm={config.train.clip_grad!r}, norm_type=2)"}
        )
        schedule, lines = clip, lines + lines_
    if config.train.amp is not None and config.train.amp != (schedule.amp or "off"):
        lines.append(f"mixed precision: {schedule.amp or 'off'} -> {config.train.amp}")
        schedule = replace(schedule, amp=None if config.train.amp == "off" else config.train.amp)
    return schedule, lines


def build(config: RunConfig, processes: Processes, checkpoint: LoadedCheckpoint | None) -> Built:
    schedule, overrides = _load_schedule(config)
    global_batch_size = config.train.batch_size * processes.world_size * schedule.accumulative_counts
    if config.train.auto_scale_lr or schedule.auto_scale_lr_enabled:
        schedule = schedule.scaled(global_batch_size)
    files = dataset_files(config.data, mode=config.mode)
    train_set = load_train(files.train) if files.train is not None else None
    model, class_names, weights_line = _build_model(config, processes, checkpoint, train_set, files)
    evaluation_files = files.test if config.mode == "test" else files.val
    evaluation_set = load_evaluation(evaluation_files, class_names) if evaluation_files is not None else None
    named = train_set or evaluation_set
    assert named is not None
    return Built(
        schedule,
        overrides,
        train_set,
        evaluation_set,
        evaluation_files,
        model,
        weights_line,
        class_names,
        named.annotations.category_ids,
    )


def _build_model(
    config: RunConfig,
    processes: Processes,
    checkpoint: LoadedCheckpoint | None,
    train_set: CocoDataset | None,
    files: DatasetFiles,
) -> tuple[FasterRCNN, tuple[str, ...], str]:
    """The model with its starting weights, the class names, and a line that says where the weights come from."""
    if checkpoint is not None:
        state = checkpoint.state
        # Settings come with the weights: what is frozen and how it is normalised cannot change in mid-run.
        model = model_from_config(state["model_config"])
        use_average = config.mode != "train" and state["ema"] is not None
        model.load_state_dict(state["ema" if use_average else "model"])
        names = tuple(state["class_names"])
        line = f"{checkpoint.path} (iteration {state['iteration']}{', averaged weights' if use_average else ''})"
        return _place(config, processes, model), names, line
    names = train_set.class_names if train_set is not None else _class_names(config, files)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model.model, len(names), **_model_settings(config))
    if config.model.weights == "none":
        line = "none: random weights, nothing is frozen, batch norm is trained"
        if config.model.norm == "gn":
            line = "none: random weights, nothing is frozen, group norm"
        if config.mode != "train":
            raise ConfigError(f"--{config.mode}-only needs trained weights: give --weights FILE, or --resume")
    else:
        report = load_weights(model, config.model.weights)
        line = "\n".join([f"{report.source}", report.table()])
    return _place(config, processes, model), names, line


def _class_names(config: RunConfig, files: DatasetFiles) -> tuple[str, ...]:
    chosen = files.test if config.mode == "test" else files.val
    assert chosen is not None
    return read_coco(chosen.annotations).class_names


def _model_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that the starting weights decide, where the command line does not."""
    settings: dict[str, Any] = {}
    from_none = config.model.weights == "none"
    norm = config.model.norm
    if norm == "auto":
        norm = "bn" if from_none or config.model.sync_bn else "frozen_bn"
    if norm == "frozen_bn" and from_none and config.mode == "train":
        raise ConfigError(
            "--norm frozen_bn with --weights none freezes random statistics, from which nothing can be learnt: "
            "use --norm bn or gn, or pretrained weights"
        )
    settings["norm"] = norm
    frozen = config.model.frozen_stages
    settings["frozen_stages"] = frozen if frozen is not None else (-1 if from_none else 1)
    if norm == "gn":
        settings["fpn_norm"] = "gn"
    return settings


def _place(config: RunConfig, processes: Processes, model: FasterRCNN) -> FasterRCNN:
    if config.model.sync_bn:
        if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise ConfigError("--sync-bn: the model has no trained batch norm; add --norm bn")
        synchronise_batch_norm(model, processes.device)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    return model.to(processes.device).to(memory_format=memory_format)
