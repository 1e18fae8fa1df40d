"""What a checkpoint holds. Everything that must survive is listed here, and nowhere else.

A checkpoint's state is a dictionary of tensors and plain types (loaded with weights_only=True):

    iteration, validation_due, best_map, best_epoch, skipped_steps, ending   how far the run is, see Progress
    model, ema, optimizer, scaler                                     tensors; ema is None without --ema
    schedule, model_config, config                                    settings, as plain dictionaries
    iterations_per_epoch, class_names, category_ids, preprocessing, run      facts that a resumed run is compared with
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import NoneType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from data import CocoDataset, TrainLoader
from detection.config.run_config import RunConfig
from detection.engine.distributed.agreement import RunError
from detection.engine.distributed.comm import Processes
from detection.engine.optim.amp import Precision
from detection.engine.optim.ema import AveragedModel
from detection.engine.optim.optimizer import load_optimizer_state, optimizer_state
from detection.models import AnyDetector, OwnCodeError, model_from_config
from detection.reporting import counted
from detection.reporting.metrics_log import metric_of
from schedules import Schedule

Facts = dict[str, Any]


@dataclass
class Progress:
    """How far a run is."""

    iteration: int = 0
    """Iterations done; the next one's index."""
    validation_due: bool = False
    """The epoch that just ended has not been validated yet."""
    best_map: float | None = None
    best_epoch: int | None = None
    """Of the validation that is the best by the best metric; counted from 1. Both None until one gave that figure."""
    skipped_steps: int = 0
    """Iterations that made no step because they were not finite."""
    ending: Ending = field(default_factory=lambda: Ending())

    def forget_best(self) -> None:
        """Count the best validation anew."""
        self.best_map = self.best_epoch = self.ending.best_iteration = self.ending.best_value = None
        self.ending.stale_validations = 0

    def note_validation(self, metrics: Mapping[str, Any], epoch: int) -> bool:
        """Count a validation; whether it is the best so far by the best metric."""
        ending = self.ending
        value = metric_of(metrics, ending.best_metric)
        ending.stale_validations += 1
        if value is None or (ending.best_value is not None and value <= ending.best_value):
            return False
        self.best_map, self.best_epoch, ending.best_iteration = metrics["mAP"], epoch, self.iteration
        ending.best_value, ending.stale_validations = value, 0
        return True


@dataclass
class Ending:
    """What --best-metric, --patience and --max-hours go by."""

    best_iteration: int | None = None
    best_metric: str = "mAP"
    best_value: float | None = None
    stale_validations: int = 0
    """Since the best one."""
    seconds: float = 0.0
    """Of training and validation over all starts, where --max-hours counts them."""
    tail_from: int = 0
    tail_position: float = 0.0
    last_iteration: int | None = None
    """Where --max-hours ends the run early: its iterations tail_from..last_iteration walk through the schedule's from
    tail_position to the end."""


@dataclass
class TrainState:
    """The state of a training: built once, changed by every iteration, saved and restored as a whole."""

    model: AnyDetector
    """The detector itself, not wrapped."""
    optimizer: Optimizer
    precision: Precision
    ema: AveragedModel | None
    schedule: Schedule
    facts: Facts
    """What describes the run and stays the same in it, see run_facts."""
    progress: Progress = field(default_factory=Progress)

    @property
    def iterations_per_epoch(self) -> int:
        return int(self.facts["iterations_per_epoch"])

    @property
    def schedule_iterations(self) -> int:
        """Of the whole schedule."""
        return self.schedule.max_epochs * self.iterations_per_epoch

    @property
    def num_iterations(self) -> int:
        """Of the whole run, which may end before the schedule."""
        last = self.progress.ending.last_iteration
        return self.schedule_iterations if last is None else last

    @property
    def schedule_iteration(self) -> float:
        """The place in the schedule whose learning rate the next iteration has."""
        progress, end = self.progress, self.progress.ending.last_iteration
        if end is None or end <= progress.ending.tail_from:
            return progress.iteration
        part = (progress.iteration - progress.ending.tail_from) / (end - progress.ending.tail_from)
        return progress.ending.tail_position + (self.schedule_iterations - progress.ending.tail_position) * part

    def end_in(self, iterations: int) -> None:
        """Go through the rest of the schedule in at most so many iterations from here."""
        progress, position = self.progress, self.schedule_iteration
        rest = self.schedule_iterations - position
        if iterations >= rest and position == progress.iteration:
            progress.ending.last_iteration = None
        else:
            progress.ending.tail_from, progress.ending.tail_position = progress.iteration, position
            progress.ending.last_iteration = progress.iteration + min(iterations, math.ceil(rest))

    def reason_to_end(self, patience: int | None) -> str | None:
        """Why nothing is left to train; None where something is. patience: validations without a better one."""
        progress = self.progress
        if progress.iteration >= self.num_iterations:
            early = "" if progress.ending.last_iteration is None else " in the hours given (--max-hours)"
            return f"{progress.iteration:,} iterations are done{early}"
        if patience is not None and progress.ending.stale_validations >= patience and not progress.validation_due:
            than = "" if progress.best_epoch is None else f" than epoch {progress.best_epoch}"
            validations = counted(progress.ending.stale_validations, "validation")
            return f"{validations} gave no better {progress.ending.best_metric}{than} (--patience)"
        return None

    @property
    def epochs_done(self) -> int:
        """Whole epochs, and the one that the end of the run cuts off."""
        return -(-self.progress.iteration // self.iterations_per_epoch)

    @property
    def validated_model(self) -> tuple[nn.Module, str]:
        """The weights that a validation is of, and what they are called."""
        return (self.model, "weights") if self.ema is None else (self.ema.module, "averaged weights")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; tensors are those of the run, not copies."""
        return {
            **asdict(self.progress),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.model),
            "scaler": self.precision.state_dict(),
            **self.facts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take over the optimizer's state, the loss scale and the averaged weights.

        The model is built from the state, see stored_model; rates and decay are this run's schedule's.

        Returns:
            Lines on what begins afresh.

        Raises:
            ValueError: the state is not of its own model.
        """
        lines = []
        try:
            if not load_optimizer_state(self.optimizer, self.model, state["optimizer"]):
                before, now = state["optimizer"]["type"], type(self.optimizer).__name__
                lines.append(f"optimizer: {before} before, {now} now; its state begins afresh")
            scales = [each["schedule"]["optim_wrapper"].get("loss_scale") for each in (state, self.facts)]
            if scales[0] == scales[1]:  # another one begins where its schedule says
                self.precision.load_state_dict(state["scaler"])
            if self.ema is not None and state["ema"] is not None:
                self.ema.module.load_state_dict(state["ema"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"its state is not of its own model ({error})") from error
        if self.ema is not None and state["ema"] is None:
            lines.append("--ema: the checkpoint has no averaged weights, the average begins with its weights")
        elif self.ema is None and state["ema"] is not None:
            lines.append("the checkpoint has averaged weights, which this run drops: give --ema to keep averaging")
        return lines


@dataclass(frozen=True)
class EachIs:
    """A dictionary with text for keys, or a list, of any length, whose values are all of one kind."""

    container: type
    kind: Any


SHAPE: dict[str, Any] = {
    "iteration": (int,),
    "validation_due": (bool,),
    "best_map": (float, NoneType),
    "best_epoch": (int, NoneType),
    "skipped_steps?": (int,),
    "ending?": {
        "best_iteration": (int, NoneType),
        "best_metric": (str,),
        "best_value": (float, NoneType),
        "stale_validations": (int,),
        "seconds": (float,),
        "tail_from": (int,),
        "tail_position": (float, int),
        "last_iteration": (int, NoneType),
    },
    "model": EachIs(dict, (Tensor,)),
    "ema": (EachIs(dict, (Tensor,)), NoneType),
    "optimizer": {"type": (str,), "state": EachIs(dict, EachIs(dict, (Tensor, int, float, NoneType)))},
    "scaler": EachIs(dict, (int, float)),
    "schedule": (dict,),
    "model_config": {"norm": (str,), "frozen_stages": (int,)},
    "config": {"model": {"weights": (str,)}},
    "iterations_per_epoch": (int,),
    "class_names": EachIs(list, (str,)),
    "category_ids": EachIs(list, (int,)),
    "preprocessing": {"min_size": (int,), "max_size": (int,)},
    "run": {
        "model_name?": (str,),
        "seed?": (int,),
        "global_batch_size": (int,),
        "world_size": (int,),
        "data_digest": (str,),
        "image_order?": (int,),
        "augmentation?": EachIs(dict, (str, bool, int, float, list, tuple, NoneType)),
        "validation?": ({"num_images": (int,)}, NoneType),
    },
}
"""Entries of a checkpoint, with the types that their values may have. Those with a "?" may be absent."""
_PLAIN = ("schedule", "model_config", "config", "run")  # compared with others as they are, at any depth


def find_fault(state: Any, shape: Any = SHAPE, place: str = "") -> str | None:
    """What in a checkpoint's state is not of SHAPE, whoever wrote the file; None where all is."""
    if isinstance(shape, tuple):
        if type(state) in shape:
            return None
        shape = next((each for each in shape if not isinstance(each, type)), None)
    kind = dict if isinstance(shape, dict) else getattr(shape, "container", None)
    if type(state) is not kind:
        return f"{place or 'it'} is a {type(state).__name__}"
    if isinstance(shape, dict):
        if missing := [key for key in shape if key not in state and not key.endswith("?")]:
            return f"{place or 'it'} lacks {', '.join(missing)}"
        names = [(key.removesuffix("?"), each) for key, each in shape.items()]
        inside = [(key, state[key], each) for key, each in names if key in state]
    else:
        if type(state) is dict and not all(type(key) is str for key in state):
            return f"{place} has a key that is not text"
        inside = [
            (key, value, shape.kind) for key, value in (state.items() if type(state) is dict else enumerate(state))
        ]
    for key, value, each in inside:
        if fault := find_fault(value, each, f"{place}.{key}".lstrip(".")):
            return fault
        if not place and key in _PLAIN and not _is_plain(value):
            return f"{key} holds other than plain values"
    return None


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def stored_model(
    state: Mapping[str, Any], *, averaged: bool = False, own_code: Collection[str | None] = ()
) -> AnyDetector:
    """The model that a checkpoint's state describes, with its weights or its averaged ones.

    Raises:
        ValueError: the weights are not of the model described.
    """
    try:
        weights = state["ema" if averaged else "model"]
        return model_from_config(state["model_config"], weights=weights, own_code=own_code)
    except OwnCodeError:  # says what is missing
        raise
    except Exception as error:  # whatever settings of another kind make a model raise
        raise ValueError(f"its weights are not of its own model ({error})") from error


def run_facts(
    config: RunConfig,
    processes: Processes,
    schedule: Schedule,
    model: AnyDetector,
    loader: TrainLoader,
    val_set: CocoDataset | None,
) -> Facts:
    """What decides whether a checkpoint can be resumed, and what else describes the run: plain types."""
    annotations = loader.dataset.annotations
    return {
        "iterations_per_epoch": loader.iterations_per_epoch,
        "schedule": schedule.to_dict(),
        "model_config": asdict(model.config),
        "class_names": list(annotations.class_names),
        "category_ids": list(annotations.category_ids),
        "preprocessing": {"min_size": config.data.min_size, "max_size": config.data.max_size},
        "run": {
            "global_batch_size": loader.global_batch_size,
            "world_size": processes.world_size,
            "data_digest": annotations.digest(),
            "image_order": loader.image_order,
            "validation": _validation_facts(config, processes, val_set),
        },
        "config": config.to_dict(),
    }


def _validation_facts(config: RunConfig, processes: Processes, dataset: CocoDataset | None) -> dict[str, Any] | None:
    if dataset is None:
        return None
    limit = config.data.limit_val_batches
    most = len(dataset) if limit is None else limit * config.train.batch_size * processes.world_size
    return {"digest": dataset.annotations.digest(), "num_images": min(len(dataset), most)}


def assert_same_on_all_ranks(config: RunConfig, processes: Processes, facts: Facts) -> None:
    """Raises RunError on every process where one has other data or settings: they would train past each other."""
    mine = {name: value for name, value in facts.items() if name not in ("config", "model_config", "run")}
    mine |= facts["run"]
    # Paths, loader processes and the like may be each machine's own.
    for group in (config.model, config.train, config.augmentation):
        mine |= {each.name: str(getattr(group, each.name)) for each in fields(group) if each.name != "weights"}
    for name in ("log_interval", "checkpoint_minutes", "checkpoint_iterations"):
        mine[name] = getattr(config.output, name)
    first, *others = processes.gather_objects(mine)
    lines = [
        f"process {rank} has another {', '.join(different)} than process 0"
        for rank, other in enumerate(others, start=1)
        if (different := [name for name in first if other[name] != first[name]])
    ]
    if lines:
        raise RunError(
            "\n".join(lines)
            + "\nStart every process with the same options, and put the same annotation files on every "
            "machine (data_digest is of the training annotations)."
        )
