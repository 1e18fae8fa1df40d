"""Whether a checkpoint can be resumed, and where command line and checkpoint differ, which of them holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from data import ORDERS
from detection.config.run_config import FREEZE_CHOICES, RunConfig
from detection.config.settings import CHECKPOINT, EACH_START, EQUAL, KEPT_OFF, SCHEDULE, settings_of
from detection.engine.state.checkpoint import CheckpointError, LoadedCheckpoint
from detection.engine.state.train_state import Ending, Facts, Progress
from detection.reporting import counted

_PARTS: dict[Any, str] = {number: part for part, number in FREEZE_CHOICES.items()}


def resumed_settings(checkpoint: LoadedCheckpoint, config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The settings with which the checkpoint's run continues.

    Which of the two holds stands at each setting's definition (OnResume). A checkpoint from before there was a setting
    counts as one with its default.

    Returns:
        The settings, and a line for each on which command line and checkpoint differ, with the one that wins; those of
        the schedule are in check_resumable's.

    Raises:
        CheckpointError: a setting differs that must be equal.
    """
    before, now, defaults = checkpoint.state["config"], config.to_dict(), RunConfig().to_dict()
    lines: list[str] = []
    kept: dict[str, Any] = {}
    train: dict[str, Any] = {}
    for _, key, field in settings_of(RunConfig):
        options = field.metadata["options"]
        decides, name = field.metadata["on_resume"], options[0].flag_for(field) if options else key
        default, given = _at(defaults, key), _at(now, key)
        # It was off before it was a setting that decides itself, and in runs older than the setting.
        was = _at(before, key, False if decides is KEPT_OFF else default)
        if isinstance(was, str) and isinstance(given, list):
            was = [was]  # recorded before the option took several
        if decides is CHECKPOINT:
            if None not in (was, default) and type(was) is not type(default):
                raise CheckpointError(f"{checkpoint.path}: not a readable checkpoint ({key} is {was!r})")
            kept[field.name] = _hashable(was)
            lines += _without_effect(name, field.name, was, given, checkpoint.state["model_config"])
        elif decides is EQUAL and was != given:
            raise CheckpointError(
                f"{checkpoint.path} is of {name} {was}, the command line says {given}: give {name} {was} to resume, or "
                "--weights instead of --resume to start a new run from its weights"
            )
        elif decides is KEPT_OFF and was is False and given is None:
            if not config.train.fast:  # which turns it on
                train[field.name] = False
        elif decides not in (EACH_START, SCHEDULE) and was != given:
            lines.append(_line(name, was, given))
    model, train_settings = dataclasses.replace(config.model, **kept), dataclasses.replace(config.train, **train)
    return dataclasses.replace(config, model=model, train=train_settings), lines


def _without_effect(name: str, field: str, was: Any, given: Any, model: Mapping[str, Any]) -> Iterator[str]:
    """Lines on what the command line says of the model otherwise than `model`, the settings of the checkpoint's."""
    pairs = [(name, model.get(field, was), given)] if given not in (None, "auto") else []
    if field == "settings":
        said = dict(given)
        pairs = [(f"{name} {key}", model.get(key), said.get(key)) for key in {**dict(was), **said}]
    for what, there, here in pairs:
        if _hashable(there) != _hashable(here):
            if field == "frozen_stages":
                there, here = _PARTS.get(there, there), _PARTS.get(here, here)
            yield _line(what, there, here, winner="checkpoint")


def with_batch_size_of(checkpoint: LoadedCheckpoint, config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with the checkpoint's number of images a process in place of --batch-size auto, and with its
    global batch where there are more or fewer processes."""
    stored, run = checkpoint.state["config"]["train"], checkpoint.state["run"]
    train = dataclasses.replace(config.train, batch_size=stored["batch_size"], auto_scale_lr=stored["auto_scale_lr"])
    if run["world_size"] != world_size and train.global_batch_size is None and train.accumulate is None:
        train = dataclasses.replace(train, global_batch_size=run["global_batch_size"])
    return dataclasses.replace(config, train=train).for_processes(world_size)


def image_order_of(checkpoint: LoadedCheckpoint) -> int:
    """The version of the order in which the checkpoint's run takes its images, in which it continues.

    Raises:
        CheckpointError: an order that this version of the program does not know.
    """
    version = checkpoint.state["run"].get("image_order", 1)  # not in checkpoints of before there was another
    if version not in ORDERS:
        raise CheckpointError(
            f"{checkpoint.path} is of a newer version of this program (image order {version}): update to resume it"
        )
    return int(version)


def check_resumable(checkpoint: LoadedCheckpoint, facts: Facts, num_iterations: int) -> list[str]:
    """Compare the checkpoint's run with this one's facts; `num_iterations` are those of the whole run as planned now.

    Returns:
        A line for each difference of data, processes and schedule, in which the present ones hold.

    Raises:
        CheckpointError: a difference with which the run cannot continue; the message names it and the way out.
    """
    state, path = checkpoint.state, checkpoint.path
    before, now = state["run"], facts["run"]
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
    if _forgets_best(state, facts, num_iterations):
        lines.append(
            f"validation: {before['validation']['num_images']} images before, now {now['validation']['num_images']}; "
            "their annotations or their number are others, so the best mAP is counted anew"
        )
    return lines + _differences(state["schedule"], facts["schedule"], "")


def resumed_progress(checkpoint: LoadedCheckpoint, facts: Facts, num_iterations: int) -> Progress:
    """How far the checkpoint's run was, without a best mAP that is of other images than those of this run."""
    state = checkpoint.state
    metric = _at(facts["config"], "train.best_metric", "mAP")
    hours = [_at(config, "train.max_hours") for config in (state["config"], facts["config"])]
    # What is not in checkpoints of earlier versions keeps its default.
    known = {each.name: state[each.name] for each in dataclasses.fields(Progress) if each.name in state}
    stored = state.get("ending", {"best_value": state["best_map"]})
    ending = Ending(**{each.name: stored[each.name] for each in dataclasses.fields(Ending) if each.name in stored})
    progress = Progress(**known | {"ending": ending})
    if _forgets_best(state, facts, num_iterations) or metric != ending.best_metric:
        progress.forget_best()
    ending.best_metric = metric
    if hours[0] != hours[1] or not 0 <= ending.tail_position <= num_iterations:
        ending.tail_from, ending.tail_position, ending.last_iteration = 0, 0.0, None
    return progress


def _forgets_best(state: Mapping[str, Any], facts: Facts, num_iterations: int) -> bool:
    """Whether mAP will be of other images than the checkpoint's, with which it cannot be compared."""
    is_unfinished = state["iteration"] < num_iterations or state["validation_due"]
    before = state["run"].get("validation")  # not in checkpoints of before it was noted
    now = facts["run"]["validation"]
    return is_unfinished and None not in (before, now) and before != now


def _differences(before: Any, now: Any, key: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        pairs = [(name, before.get(name), now.get(name)) for name in dict.fromkeys([*before, *now])]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(str(place), one, other) for place, (one, other) in enumerate(zip(before, now, strict=True))]
    else:
        return [] if before == now else [_line(f"schedule {key}", before, now)]
    return [line for name, one, other in pairs for line in _differences(one, other, f"{key}.{name}".lstrip("."))]


def _line(name: str, was: Any, given: Any, *, winner: str = "command line") -> str:
    return f"{name}: {_shown(was)} in the checkpoint, {_shown(given)} now; the {winner} wins"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "on", False: "off"}[value]
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _at(settings: Any, key: str, default: Any = None) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        if not isinstance(settings, Mapping) or part not in settings:
            return default
        settings = settings[part]
    return settings


def _hashable(value: Any) -> Any:
    """The same with tuples for lists, as settings hold them."""
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _short(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return f"[{shown}{', ...' if len(names) > 6 else ''}] ({len(names)})"
