"""Whether a checkpoint can be resumed, and what the command line changes in the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detection.config.augmentation import AugmentationConfig
from detection.config.run_config import FREEZE_CHOICES, ModelConfig
from detection.engine.checkpoint import CheckpointError, LoadedCheckpoint
from detection.engine.train_state import Facts, Progress
from detection.reporting import counted

_PARTS: dict[int | None, str] = {number: part for part, number in FREEZE_CHOICES.items()}


def check_resumable(checkpoint: LoadedCheckpoint, facts: Facts, num_iterations: int) -> list[str]:
    """Compare the checkpoint's run with this one's facts; `num_iterations` are those of the whole run as planned now.

    Returns:
        A line for each difference; in all of them the command line wins.

    Raises:
        CheckpointError: a difference with which the run cannot continue; the message names it and the way out.
    """
    state, path = checkpoint.state, checkpoint.path
    before, now = state["run"], facts["run"]
    if before["model_name"] != now["model_name"]:
        raise CheckpointError(
            f"{path} is of {before['model_name']}, the command line says {now['model_name']}: "
            f"give --model {before['model_name']} to resume, or --weights instead of --resume to start a new run from "
            "its weights"
        )
    if state["class_names"] != facts["class_names"]:
        raise CheckpointError(
            f"{path} was trained on the classes {_short(state['class_names'])}, the data set has "
            f"{_short(facts['class_names'])}: give the same data to resume, or --weights instead of --resume to "
            "start a new run from its weights"
        )
    if before["global_batch_size"] != now["global_batch_size"]:
        per_process = now["global_batch_size"] // now["world_size"]
        raise CheckpointError(
            f"{path} was trained with a global batch of {before['global_batch_size']} images on "
            f"{counted(before['world_size'], 'process', 'processes')}; this run has {now['global_batch_size']} "
            f"({counted(now['world_size'], 'process', 'processes')} x {per_process}), with "
            "which epochs, learning rate and image order would not continue where they were. Give "
            f"--global-batch-size {before['global_batch_size']}, or --batch-size and --accumulate so that processes x "
            f"batch size x accumulate is {before['global_batch_size']}."
        )
    if state["iterations_per_epoch"] != facts["iterations_per_epoch"]:
        raise CheckpointError(
            f"{path} has {state['iterations_per_epoch']} iterations an epoch, this run "
            f"{facts['iterations_per_epoch']}: the number of training images, --repeat-threshold or "
            "--limit-train-batches is another one. Give the same data and options to resume, or --weights instead of "
            "--resume to start a new run from its weights."
        )
    lines = []
    if before["world_size"] != now["world_size"]:
        lines.append(
            f"processes: {before['world_size']} before, now {now['world_size']} (the same images in the same order)"
        )
    if before["data_digest"] != now["data_digest"]:
        lines.append("training annotations: their content is not that of the checkpoint; the present ones are used")
    if before["seed"] != now["seed"]:
        lines.append(f"seed: {before['seed']} before, now {now['seed']}")
    if state["preprocessing"] != facts["preprocessing"]:
        lines.append(f"image scale: {state['preprocessing']} before, now {facts['preprocessing']}")
    if _forgets_best(state, facts, num_iterations):
        lines.append(
            f"validation: {before['validation']['num_images']} images before, now {now['validation']['num_images']}; "
            "their annotations or their number are others, so the best mAP is counted anew"
        )
    # Checkpoints from before there was a choice have none; they were trained without.
    was = before.get("augmentation", AugmentationConfig().to_dict())
    lines += [
        f"--{key.replace('_', '-')}: {was.get(key)} before, now {now['augmentation'].get(key)}"
        for key in dict.fromkeys([*was, *now["augmentation"]])
        if was.get(key) != now["augmentation"].get(key)
    ]
    return lines + _differences(state["schedule"], facts["schedule"], "")


def resumed_progress(checkpoint: LoadedCheckpoint, facts: Facts, num_iterations: int) -> Progress:
    """How far the checkpoint's run was, without a best mAP that is of other images than those of this run."""
    state = checkpoint.state
    keeps_best = not _forgets_best(state, facts, num_iterations)
    return Progress(
        iteration=state["iteration"],
        validation_due=state["validation_due"],
        best_map=state["best_map"] if keeps_best else None,
        best_epoch=state["best_epoch"] if keeps_best else None,
        skipped_steps=state.get("skipped_steps", 0),  # not in checkpoints of before there was a count
    )


def _forgets_best(state: Mapping[str, Any], facts: Facts, num_iterations: int) -> bool:
    """Whether mAP will be of other images than the checkpoint's, with which it cannot be compared."""
    is_unfinished = state["iteration"] < num_iterations or state["validation_due"]
    before = state["run"].get("validation")  # not in checkpoints of before it was noted
    now = facts["run"]["validation"]
    return is_unfinished and None not in (before, now) and before != now


def ignored_on_resume(checkpoint: LoadedCheckpoint, model: ModelConfig) -> list[str]:
    """Lines on options of the model that were given and that the checkpoint decides otherwise."""
    state, default = checkpoint.state, ModelConfig()
    stored = state["model_config"]
    given: dict[str, tuple[Any, Any, Any]] = {
        "weights": (model.weights, default.weights, state["config"]["model"]["weights"]),
        "norm": (model.norm, default.norm, stored["norm"]),
        "freeze": (_PARTS.get(model.frozen_stages), default.frozen_stages, _PARTS.get(stored["frozen_stages"])),
    }
    lines = [
        f"--{name} {now} has no effect: the resumed run has {before}"
        for name, (now, unsaid, before) in given.items()
        if now not in (unsaid, before)
    ]
    for key, now in model.settings:
        if stored.get(key) != (tuple(now) if isinstance(now, list) else now):
            lines.append(f"--model-set {key}={now} has no effect: the resumed run has {stored.get(key)}")
    return lines


def _differences(before: Any, now: Any, key: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        pairs = [(name, before.get(name), now.get(name)) for name in dict.fromkeys([*before, *now])]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(str(place), one, other) for place, (one, other) in enumerate(zip(before, now, strict=True))]
    else:
        return [] if before == now else [f"schedule {key}: {before} before, now {now}"]
    return [line for name, one, other in pairs for line in _differences(one, other, f"{key}.{name}".lstrip("."))]


def _short(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return f"[{shown}{', ...' if len(names) > 6 else ''}] ({len(names)})"
