"""What a run says of itself: the start screen, config.json, and where everything is when it ends."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import nn

from data import CocoDataset, TrainLoader
from data.coco.layout import SplitFiles
from data.loading.dataset import ConcatDataset
from detection.config.run_config import RunConfig
from detection.engine.accelerate.choice import Acceleration
from detection.engine.build import Components
from detection.engine.context import RunContext
from detection.engine.distributed.comm import Processes
from detection.engine.inputs.augmentation import describe_augmentation
from detection.engine.inputs.bad_images import BadImages
from detection.engine.metrics.logger import MetricLogger
from detection.engine.optim.amp import multiplies_bfloat16
from detection.engine.state.run_dir import RunDir
from detection.engine.state.train_state import Progress
from detection.evaluation import describe_judging
from detection.models import describe_kernels
from detection.models.weights.files import BEST_WEIGHTS
from detection.reporting import counted, sparkline
from schedules import Schedule, load_schedule

_PACKAGES = ("torch", "torchvision", "pycocotools", "tensorboard", "numpy", "pillow")
_CURVE_POINTS = 600
_OF_ONE_START = {"output.resume", "output.overwrite", "mode", "dry_run"}
_REACHED = 0.98
"""Part of the learning rate that counts as all of it: the curve looks at some iterations only."""


def describe_run(
    context: RunContext,
    components: Components,
    loader: TrainLoader,
    progress: Progress,
    acceleration: Acceleration,
    *,
    changes: list[str],
    notes: list[str],
) -> str:
    """One screen that says what will happen.

    changes: what differs from the checkpoint's run, and which of the two holds. notes: overrides, and the like.
    """
    config, processes, schedule = context.config, context.processes, components.schedule
    train_set, val_set, names = loader.dataset, components.evaluation_set, loader.dataset.class_names
    num_iterations = schedule.max_epochs * loader.iterations_per_epoch
    tested = f"at the end, with the {'last' if val_set is None else 'best'} weights"
    rows = [
        ("data", _describe_set("train", train_set)),
        ("", _describe_set("val", val_set) if val_set is not None else "no validation set"),
        ("", _describe_set("test", components.test_set, f", evaluated once, {tested}") if components.test_set else ""),
        ("classes", ", ".join(names[:12]) + (f", ... ({len(names)})" if len(names) > 12 else "")),
        ("model", f"{config.model.model}, {_describe_parameters(components.model)}"),
        ("weights", components.weights_line),
        ("schedule", "\n".join(schedule.describe())),
        ("", f"{num_iterations:,} iterations, {loader.iterations_per_epoch:,} an epoch"),
        ("batch", _describe_batch(config, processes, schedule, loader)),
        ("augment", "\n".join(describe_augmentation(config, loader))),
        ("device", _describe_device(processes) + _faster(schedule, processes)),
        ("kernels", describe_kernels(processes.device)),
        ("speed", acceleration.describe() if processes.device.type == "cuda" else ""),
        ("output", str(context.output.path)),
    ]
    if val_set is not None:
        most = components.model.config.detections_per_image
        rows.append(("judging", "\n".join(describe_judging(val_set.annotations, config.output.eval_backend, most))))
    if ends := _describe_ends(config):
        rows.append(("ends", "\n".join(ends)))
    if notes:
        rows.append(("overrides", "\n".join(notes)))
    if progress.iteration:
        done, within = divmod(progress.iteration, loader.iterations_per_epoch)
        where = f"epoch {done + 1}, {within} iterations into it" if within else f"epoch {done} done"
        rows.append(("resumed", f"at iteration {progress.iteration:,} ({where})"))
    if changes:
        rows.append(("changed", "\n".join(changes)))
    lines = []
    for name, text in rows:
        for place, line in enumerate(text.splitlines()):
            lines.append(f"{name if place == 0 else '':<10}{line}".rstrip())
    curve = _learning_rate_curve(schedule, loader.iterations_per_epoch, unicode=context.console.has_unicode)
    return "\n".join([*lines, "", *curve, ""])


def config_record(
    context: RunContext, schedule: Schedule, validated: Sequence[SplitFiles], iteration: int
) -> dict[str, Any]:
    """What config.json holds: the resolved configuration, where it runs, and the starts of the run so far.

    validated: the validation set's files, or those of each.
    """
    try:
        starts = json.loads(context.output.config.read_text()).get("starts", [])
    except (FileNotFoundError, ValueError):  # torn by a crash; the starts are only history
        starts = []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "iteration": iteration,
            "world_size": context.processes.world_size,
            "command": [sys.executable, *sys.argv],
        }
    )
    return {
        "config": context.config.to_dict(),
        "schedule": schedule.to_dict(),
        "validated": _absolute(validated[0]) if len(validated) == 1 else None,
        **({"sets": {files.set_name: _absolute(files) for files in validated}} if len(validated) > 1 else {}),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": _describe_device(context.processes),
        "host": platform.node(),
        "git_commit": _git_commit(),
        "starts": starts,
    }


def _absolute(files: SplitFiles) -> dict[str, str]:
    return {"images": str(files.images.absolute()), "annotations": str(files.annotations.absolute())}


def configuration_text(record: dict[str, Any]) -> str:
    """The configuration of a run (config_record's) as Markdown, without what only this start of it was asked for."""
    lines = ["| setting | value |", "|---|---|"]
    for group, settings in record["config"].items():
        for name, value in settings.items() if isinstance(settings, dict) else [("", settings)]:
            key = f"{group}.{name}".rstrip(".")
            if key not in _OF_ONE_START and value not in (None, []):
                lines.append(f"| {key} | {_table_cell(value)} |")
    lines += [f"| processes | {record['starts'][-1]['world_size']} |"]
    lines += [f"| {name} | {_table_cell(record[name])} |" for name in ("device", "host", "git_commit")]
    lines += [f"| {name} | {version} |" for name, version in record["versions"].items()]
    return "\n".join(lines)


def closing_summary(
    output: RunDir,
    metric_logger: MetricLogger,
    progress: Progress,
    bad_images: BadImages,
    validated: Sequence[SplitFiles],
    can_be_analyzed: bool,
    own_code: str = "",
) -> str:
    """The table of the run's validations, where everything is, and commands for what comes next.

    own_code: options that name a detector or backbone of the user's own.
    """
    lines = ["", metric_logger.summary(progress.best_epoch), ""]
    if progress.skipped_steps:
        lines.append(f"{progress.skipped_steps} of {progress.iteration} iterations were not finite and made no step")
    if bad_images:
        lines.append(bad_images.summary())
    lines.append(f"checkpoints  {output.checkpoints}")
    of_all, images, analysis = output.detections("val"), "IMAGE_OR_FOLDER", []
    ending = progress.ending
    if ending.best_value is not None:
        lines[-1] += f"   best.pt has {ending.best_metric} {abs(ending.best_value):.3f} (epoch {progress.best_epoch})"
    for files in validated if progress.best_epoch is not None else ():
        images = quote(str(files.images))
        results = of_all if len(validated) == 1 else of_all.with_name(f"{of_all.stem}_{files.set_name}.json")
        lines.append(f"detections   {results} (of the last validation)")
        if can_be_analyzed:
            analysis.append(
                f"why so       python3 scripts/analyze_results.py --annotations {quote(str(files.annotations))} "
                f"--results {quote(str(results))} --images {images}"
            )
    best, weights = output.checkpoints / "best.pt", output.path / BEST_WEIGHTS
    lines += [
        f"take away    {weights} ({'its' if best.is_file() else 'the last'} weights alone, with class names)",
        f"figures      {output.metrics}, {output.log}",
        f"curves       tensorboard --logdir {quote(str(output.path))}",
        f"report       python3 scripts/report.py {quote(str(output.path))}",
        *analysis,
        f"try it       python3 scripts/predict.py --weights {quote(str(weights))}{own_code} {images}",
    ]
    return "\n".join(lines)


def _table_cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def _describe_set(name: str, dataset: CocoDataset, more: str = "") -> str:
    if isinstance(dataset, ConcatDataset):
        pairs = zip(dataset.names, dataset.parts, strict=True)
        sets = [f"  {part_name} {_describe_set(name, part)}" for part_name, part in pairs]
        return "\n".join([f"{name}: {len(dataset):,} images of {counted(len(sets), 'set')}{more}", *sets])
    empty = int((dataset.box_counts == 0).sum())
    return (
        f"{name}: {len(dataset):,} images ({empty:,} without a box), {int(dataset.box_counts.sum()):,} boxes, "
        f"{counted(len(dataset.class_names), 'class', 'classes')} ({dataset.annotations.source}){more}"
    )


def _describe_ends(config: RunConfig) -> list[str]:
    """When a run ends before its schedule."""
    lines, metric = [], config.train.best_metric
    if config.train.patience is not None:
        lines.append(f"after {counted(config.train.patience, 'validation')} without a better {metric}")
    if config.train.max_hours is not None:
        lines.append(f"within {config.train.max_hours:g} hours; the rest of the schedule is then gone through faster")
    if metric != "mAP":
        lines.append(f"best.pt is the validation with the best {metric}")
    return lines


def _describe_parameters(model: nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained, {(total - trained) / 1e6:.1f} M frozen"


def _describe_batch(config: RunConfig, processes: Processes, schedule: Schedule, loader: TrainLoader) -> str:
    total = loader.global_batch_size
    text = f"{total} = {counted(processes.world_size, 'process', 'processes')} x "
    text += counted(config.train.batch_size, "image")
    if schedule.accumulative_counts > 1:
        text += f" x {schedule.accumulative_counts} micro-steps"
    base = schedule.base_batch_size
    if config.train.auto_scale_lr or schedule.auto_scale_lr_enabled:
        return f"{text}; learning rate scaled for it from base batch {base}: {schedule.optimizer.lr:g}"
    if total != base:
        scaled = schedule.scaled(total).optimizer.lr
        text += f"; the schedule's lr {schedule.optimizer.lr:g} is meant for {base}: "
        text += f"--auto-scale-lr would use {scaled:g}"
    return text


def _describe_device(processes: Processes) -> str:
    if processes.device.type == "cuda":
        return f"{processes.world_size} x {torch.cuda.get_device_name(processes.device)}"
    count = counted(processes.world_size, "process", "processes")
    return f"CPU, {count} x {counted(torch.get_num_threads(), 'thread')}"


def _faster(schedule: Schedule, processes: Processes) -> str:
    if schedule.amp is not None or not multiplies_bfloat16(processes.device):
        return ""
    gain = "trains 1.9 times as fast on an H100" if processes.device.type == "cuda" else "halves the time of a step"
    return f"\nfloat32; --amp bf16 {gain}, where it was measured (docs/performance.md)"


def _learning_rate_curve(schedule: Schedule, iterations_per_epoch: int, *, unicode: bool) -> list[str]:
    total = schedule.max_epochs * iterations_per_epoch
    points = np.linspace(0, total - 1, min(total, _CURVE_POINTS)).astype(int).tolist()
    rates = [schedule.learning_rate(point, iterations_per_epoch) for point in points]
    image = sparkline(rates, width=72, height=4, unicode=unicode).splitlines()
    axis = f"{'epoch 1':<36}{f'epoch {schedule.max_epochs}':>36}"
    title = f"learning rate, up to {max(rates):g}"
    if max(rates) < _REACHED * schedule.optimizer.lr:
        title += f": it never comes to the schedule's {schedule.optimizer.lr:g} in {counted(total, 'iteration')}"
    return [title, *image, axis, *_long_warmup(schedule, iterations_per_epoch)]


def _long_warmup(schedule: Schedule, iterations_per_epoch: int) -> list[str]:
    """Where a warmup counted in iterations takes more than a tenth of the run: a line with the figures and remedies."""
    total = schedule.max_epochs * iterations_per_epoch
    ends = [each.end or total for each in schedule.param_schedulers if each.kind == "LinearLR" and not each.by_epoch]
    if max(ends, default=0) <= total / 10:
        return []
    small = load_schedule("finetune")
    return [
        f"warning: the warmup takes {min(max(ends), total):,} of the {counted(total, 'iteration')}. --schedule "
        f"{small.name} is for small sets: {small.max_epochs * iterations_per_epoch:,} iterations here, the warmup "
        f"{iterations_per_epoch:,}; or --set param_scheduler.0.end={max(total // 20, 2)}"
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _git_commit() -> str | None:
    root = str(Path(__file__).resolve().parents[2])
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None
