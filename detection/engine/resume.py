"""Going on where a checkpoint stopped: what must agree with it, and what the command line may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from detection.config.augmentation import AugmentationConfig
from detection.config.run_config import FREEZE_CHOICES, ModelConfig
from detection.engine.checkpoint import CheckpointError, LoadedCheckpoint
from detection.engine.fingerprint import Fingerprint
from detection.engine.optim.amp import Precision
from detection.engine.optim.ema import AveragedModel
from detection.engine.optim.optimizer import load_optimizer_state
from detection.engine.trainer import Progress
from detection.reporting import counted
from schedules import Schedule

_PARTS: dict[int | None, str] = {number: part for part, number in FREEZE_CHOICES.items()}


def check_resumable(
    checkpoint: LoadedCheckpoint, facts: Fingerprint, schedule: Schedule, iterations_per_epoch: int
) -> list[str]:
    """Lines that say what differs from the checkpoint's run; in all of them the command line wins.

    Raises:
        CheckpointError: a difference that cannot be gone on with; the message names it and the way out.
    """
    state, path = checkpoint.state, checkpoint.path
    run = state["run"]
    if run["model_name"] != facts.model_name:
        raise CheckpointError(
            f"{path} is of {run['model_name']}, the command line says {facts.model_name}: "
            f"give --model {run['model_name']} to resume, or --weights instead of --resume to start a new run from "
            "its weights"
        )
    if list(facts.class_names) != state["class_names"]:
        raise CheckpointError(
            f"{path} was trained on the classes {_short(state['class_names'])}, the data set has "
            f"{_short(list(facts.class_names))}: give the same data to resume, or --weights instead of --resume to "
            "start a new run from its weights"
        )
    if run["global_batch_size"] != facts.global_batch_size:
        per_process = facts.global_batch_size // facts.world_size
        raise CheckpointError(
            f"{path} was trained with a global batch of {run['global_batch_size']} images on "
            f"{counted(run['world_size'], 'process', 'processes')}; this run has {facts.global_batch_size} "
            f"({counted(facts.world_size, 'process', 'processes')} x {per_process}), with "
            "which epochs, learning rate and image order would not go on where they were. Give "
            f"--global-batch-size {run['global_batch_size']}, or --batch-size and --accumulate so that processes x "
            f"batch size x accumulate is {run['global_batch_size']}."
        )
    if state["iterations_per_epoch"] != iterations_per_epoch:
        raise CheckpointError(
            f"{path} has {state['iterations_per_epoch']} iterations an epoch, this run "
            f"{iterations_per_epoch}: the number of training images, --repeat-threshold or --limit-train-batches is "
            "another one. Give the same data and options to resume, or --weights instead of --resume to start a new "
            "run from its weights."
        )
    lines = []
    if run["world_size"] != facts.world_size:
        lines.append(
            f"processes: {run['world_size']} before, now {facts.world_size} (the same images in the same order)"
        )
    if run["data_digest"] != facts.data_digest:
        lines.append("training annotations: their content is not that of the checkpoint; the present ones are used")
    if run["seed"] != facts.seed:
        lines.append(f"seed: {run['seed']} before, now {facts.seed}")
    if state["preprocessing"] != facts.preprocessing:
        lines.append(f"image scale: {state['preprocessing']} before, now {facts.preprocessing}")
    if forgets_best(checkpoint, facts, schedule.max_epochs * iterations_per_epoch):
        assert facts.validation is not None
        lines.append(
            f"validation: {run['validation']['num_images']} images before, now {facts.validation['num_images']}; "
            "their annotations or their number are others, so the best mAP is counted anew"
        )
    # Checkpoints from before there was a choice have none; they were trained without.
    before = run.get("augmentation", AugmentationConfig().to_dict())
    for key in dict.fromkeys([*before, *facts.augmentation]):
        was, now = before.get(key), facts.augmentation.get(key)
        if was != now:
            lines.append(f"--{key.replace('_', '-')}: {was} before, now {now}")
    lines += _differences(state["schedule"], schedule.to_dict(), "")
    return lines


def forgets_best(checkpoint: LoadedCheckpoint, facts: Fingerprint, num_iterations: int) -> bool:
    """Whether mAP will be of other images than the checkpoint's, with which it cannot be compared."""
    state = checkpoint.state
    goes_on = state["iteration"] < num_iterations or state["validation_due"]
    before = state["run"].get("validation")  # not in checkpoints of before it was noted
    return goes_on and None not in (before, facts.validation) and before != facts.validation


def progress_of(checkpoint: LoadedCheckpoint, facts: Fingerprint, num_iterations: int) -> Progress:
    """How far the checkpoint's run was; `num_iterations` are those of the whole run as it is planned now."""
    state = checkpoint.state
    keeps_best = not forgets_best(checkpoint, facts, num_iterations)
    return Progress(
        iteration=state["iteration"],
        validation_due=state["validation_due"],
        best_map=state["best_map"] if keeps_best else None,
        best_epoch=state["best_epoch"] if keeps_best else None,
        skipped_steps=state.get("skipped_steps", 0),  # not in checkpoints of before there was a count
    )


def settings_without_effect(checkpoint: LoadedCheckpoint, model: ModelConfig) -> list[str]:
    """Lines on options of the model that were given and that the checkpoint decides otherwise."""
    state, default = checkpoint.state, ModelConfig()
    given: dict[str, tuple[Any, Any, Any]] = {
        "weights": (model.weights, default.weights, state["config"]["model"]["weights"]),
        "norm": (model.norm, default.norm, state["model_config"]["norm"]),
        "freeze": (
            _PARTS.get(model.frozen_stages),
            default.frozen_stages,
            _PARTS.get(state["model_config"]["frozen_stages"]),
        ),
    }
    lines = [
        f"--{name} {now} has no effect: the resumed run has {before}"
        for name, (now, unsaid, before) in given.items()
        if now not in (unsaid, before)
    ]
    for key, now in model.settings:
        before = state["model_config"].get(key)
        if before != (tuple(now) if isinstance(now, list) else now):
            lines.append(f"--model-set {key}={now} has no effect: the resumed run has {before}")
    return lines


def restore(
    checkpoint: LoadedCheckpoint,
    model: nn.Module,
    optimizer: Optimizer,
    precision: Precision,
    ema: AveragedModel | None,
) -> list[str]:
    """Give optimizer, loss scale and averaged weights what the checkpoint has; lines on what begins afresh.

    Rates and decay are not in it: this run's schedule decides over them.

    Raises:
        CheckpointError: the state is not of this model.
    """
    state, lines = checkpoint.state, []
    try:
        if not load_optimizer_state(optimizer, model, state["optimizer"]):
            before, now = state["optimizer"]["type"], type(optimizer).__name__
            lines.append(f"optimizer: {before} before, {now} now; its state begins afresh")
        precision.load_state_dict(state["scaler"])
        if ema is not None and state["ema"] is not None:
            ema.module.load_state_dict(state["ema"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: its state is not of its own model ({error})") from error
    if ema is not None and state["ema"] is None:
        lines.append("--ema: the checkpoint has no averaged weights, the average begins with its weights")
    elif ema is None and state["ema"] is not None:
        lines.append("the checkpoint has averaged weights, which this run does not go on with: give --ema to do so")
    return lines


def _differences(before: Any, now: Any, key: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        lines = []
        for name in dict.fromkeys([*before, *now]):
            lines += _differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
        return lines
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        lines = []
        for place, (one, other) in enumerate(zip(before, now, strict=True)):
            lines += _differences(one, other, f"{key}.{place}")
        return lines
    return [] if before == now else [f"schedule {key}: {before} before, now {now}"]


def _short(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return f"[{shown}{', ...' if len(names) > 6 else ''}] ({len(names)})"
