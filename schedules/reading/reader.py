"""MMDetection's schedule vocabulary: a name, a file or plain values in, a checked Schedule out. A file is data:
parsed, never executed.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from schedules.checks import (
    NO_END,
    Keys,
    checked_fields,
    choice,
    dictionary,
    flag,
    made,
    number,
    optional,
    read_dict,
    read_typed,
    rising_pairs,
    whole,
)
from schedules.errors import Place, ScheduleError
from schedules.paramwise import ParamwiseSettings
from schedules.reading.config_file import read_config, read_text
from schedules.reading.expressions import parse, read_assignments
from schedules.schedule import AMP_NAMES, ClipGrad, OptimizerSettings, Schedule, idle_schedulers
from schedules.schedulers import KINDS, Scheduler

NAMES = ("1x", "2x", "20e", "finetune")
MOST_EPOCHS = 100_000

SCHEDULE_KEYS = ("train_cfg", "val_cfg", "test_cfg", "param_scheduler", "optim_wrapper", "auto_scale_lr", "ema")

# Keys of whole MMDetection 3.x configurations that say nothing about the schedule, and what says it here.
IGNORED_KEYS = {
    key: instead
    for keys, instead in (
        ("default_scope default_hooks custom_hooks custom_imports env_cfg vis_backends", "this product has its own"),
        ("visualizer log_processor log_level launcher experiment_name", "this product has its own"),
        (
            "dataset_type data_root backend_args train_dataloader val_dataloader test_dataloader "
            "train_pipeline test_pipeline val_evaluator test_evaluator",
            "the data set is named on the command line (--dataset, --data-path, --train-images, ...)",
        ),
        ("tta_model tta_pipeline img_scales", "use scripts/predict.py --tta"),
        ("model data_preprocessor", "use --model"),
        ("load_from", "use --weights"),
        ("resume", "use --resume"),
        ("randomness", "use --seed and --deterministic"),
        ("work_dir", "use --output-dir"),
    )
    for key in keys.split()
}
_OLD_KEYS = ("optimizer", "optimizer_config", "lr_config", "runner", "total_epochs", "evaluation", "fp16")


def load_schedule(name_or_path: str | os.PathLike[str]) -> Schedule:
    """The schedule "1x", "2x" or "20e", or the one in a file in MMDetection 3.x's vocabulary.

    A file with no other keys is a schedule: literals, read as they are. Any other is a whole configuration: its base
    files count, and names, arithmetic and so on are computed as MMEngine does. Its keys that say nothing about the
    schedule are not judged; schedule.notes names them. Raises ScheduleError, with file, line and key, for whatever is
    not known, and for a file that cannot be read.
    """
    given = os.fspath(name_or_path)
    path = Path(__file__).parents[1] / f"schedule_{given}.py" if given in NAMES else Path(given)
    place = Place(str(path), lines={})
    tree = parse(read_text(path, place, f"give {', '.join(NAMES)}, or a schedule file"), place)
    if any(map(_is_beyond_schedule, tree.body)):
        values, place = read_config(path, SCHEDULE_KEYS.__contains__)
        notes = _notes(values, place)
        values = {key: value for key, value in values.items() if key in SCHEDULE_KEYS}
    else:
        values, notes = read_assignments(tree, place), []
    schedule = schedule_from_dict(values, given if given in NAMES else path.stem, str(path), place)
    return replace(schedule, notes=(*notes, *schedule.notes))


def config_schedule(path: str | os.PathLike[str], options: Iterable[str] = ()) -> Schedule:
    """The schedule of a whole configuration, the other keys unread. options: KEY=VALUE each, over what the file says.

    Raises ScheduleError as load_schedule does.
    """
    values, place = read_config(path, SCHEDULE_KEYS.__contains__, options)
    values = {key: value for key, value in values.items() if key in SCHEDULE_KEYS}
    return schedule_from_dict(values, Path(path).stem, os.fspath(path), place)


def _is_beyond_schedule(statement: ast.stmt) -> bool:
    match statement:
        case ast.With():
            return True
        case ast.Assign([ast.Name(key)]):
            return key not in SCHEDULE_KEYS
    return False


def _notes(values: Mapping[str, Any], place: Place) -> list[str]:
    """A line for each key of a whole configuration that is known and ignored, and one for names of its own."""
    notes, own = [], []
    for key in values:
        if key in IGNORED_KEYS:
            source, line = (place.lines or {}).get((key,), (place.source, 1))
            notes.append(f"{source}, line {line}: {key} is ignored: {IGNORED_KEYS[key]}")
        elif key not in SCHEDULE_KEYS:
            _refuse_old(key, place)
            if difflib.get_close_matches(key, SCHEDULE_KEYS, n=1, cutoff=0.75):
                raise place.at(key).unknown(SCHEDULE_KEYS)
            own.append(key)
    if own:
        notes.append(f"{place.source}: of {', '.join(own)} only what the schedule uses counts")
    return notes


def _refuse_old(key: str, place: Place) -> None:
    if key in _OLD_KEYS:
        message = "is a key of MMDetection 2.x; write the schedule with 3.x's"
        raise place.at(key).error(f"{message} train_cfg, param_scheduler and optim_wrapper")


def schedule_from_dict(
    values: Mapping[str, Any], name: str = "schedule", source: str = "", place: Place | None = None
) -> Schedule:
    """The schedule of a dict in the file's vocabulary, such as Schedule.to_dict gives. Raises ScheduleError, which
    names `place` (the source, or the name without one).
    """
    place = place or Place(source or name)
    for key in values:
        if key not in SCHEDULE_KEYS:
            _refuse_old(key, place)
            raise place.at(key).unknown(SCHEDULE_KEYS)
    for key in ("train_cfg", "optim_wrapper"):
        if key not in values:
            raise place.error(f"has no {key}; add it")
    loop = _train_loop(values["train_cfg"], place.at("train_cfg"))
    for key, kind in (("val_cfg", "ValLoop"), ("test_cfg", "TestLoop")):
        read_typed(values.get(key, {}), place.at(key), {kind: _TEST_LOOP}, kind)
    scale = read_dict(
        values.get("auto_scale_lr", {}),
        place.at("auto_scale_lr"),
        {"enable": (flag, False), "base_batch_size": (whole(1), None)},
    )
    if scale["enable"] and scale["base_batch_size"] is None:
        message = "enable=True needs base_batch_size, the global batch that lr belongs to"
        raise place.at("auto_scale_lr").error(message)
    schedule = Schedule(
        name=name,
        source=source,
        max_epochs=loop["max_epochs"],
        epoch_iterations=loop.get("epoch_iterations"),
        val_begin=loop["val_begin"],
        val_interval=loop["val_interval"],
        dynamic_intervals=loop["dynamic_intervals"] or (),
        **_optim_wrapper(values["optim_wrapper"], place.at("optim_wrapper")),
        param_schedulers=_schedulers(values.get("param_scheduler"), place.at("param_scheduler"), loop),
        ema_decay=read_dict(values.get("ema") or {}, place.at("ema"), {"decay": (_EMA_DECAY, None)})["decay"],
        auto_scale_lr_enabled=scale["enable"],
        base_batch_size=scale["base_batch_size"] or 16,
    )
    return replace(schedule, notes=tuple(idle_schedulers(schedule)))


_TRAIN_LOOPS: dict[str, Keys] = {
    "EpochBasedTrainLoop": {
        "max_epochs": whole(1, MOST_EPOCHS),
        "by_epoch": (choice(True), True),
        "val_begin": (whole(0), 1),
        "val_interval": (whole(1), 1),
        "dynamic_intervals": (optional(rising_pairs), None),
    },
    "IterBasedTrainLoop": {
        "max_iters": whole(1, 100_000_000),
        "by_epoch": (choice(False), False),
        "val_begin": (choice(1, hint=" here"), 1),
        "val_interval": (whole(1), 1000),
        "dynamic_intervals": (choice(None, hint=" here"), None),
    },
}


_EMA_DECAY = number(above=0, at_most=0.999999)


def _train_loop(value: Any, place: Place) -> dict[str, Any]:
    """The loop. One that counts iterations has epochs that end with its validations."""
    loop = read_typed(value, place, _TRAIN_LOOPS, "EpochBasedTrainLoop")
    if loop["type"] == "IterBasedTrainLoop":
        total, part = loop["max_iters"], loop["val_interval"]
        if total % part:
            message = f"must divide max_iters {total} here, as every part ends with a validation and a checkpoint"
            raise place.at("val_interval").unfit(message, part)
        if total // part > MOST_EPOCHS:
            raise place.at("val_interval").unfit(f"must leave at most {MOST_EPOCHS:,} parts of max_iters", part)
        loop |= {"max_epochs": total // part, "epoch_iterations": part, "val_interval": 1}
    return loop


_TEST_LOOP: Keys = {"fp16": (choice(False, hint=" (--amp sets the precision)"), False)}


def _schedulers(values: Any, place: Place, loop: Mapping[str, Any]) -> tuple[Scheduler, ...]:
    if isinstance(values, dict):  # MMEngine takes a single one without the list
        values = [values]
    if not isinstance(values, (list, tuple, type(None))):
        raise place.unfit("must be a list of dict(type=...)", values)
    schedulers = tuple(_scheduler(one, place.at(i), loop["max_epochs"]) for i, one in enumerate(values or ()))
    for i, scheduler in enumerate(schedulers):
        if scheduler.by_epoch and "epoch_iterations" in loop:
            raise place.at(i).at("by_epoch").error("must be False beside an IterBasedTrainLoop")
    return schedulers


def _scheduler(value: Any, place: Place, max_epochs: int) -> Scheduler:
    convert = dictionary(value, place).get("convert_to_iter_based") is True
    count = _epochs if convert else whole(0)
    shared: Keys = {
        "by_epoch": (flag, True),
        "convert_to_iter_based": (flag, False),
        "begin": (count, 0),
        "end": (optional(count), None),
        "last_step": (choice(-1, hint=" (a resume needs no state here)"), -1),
        "verbose": (flag, False),
    }
    found = read_typed(value, place, {name: {**shared, **checked_fields(kind)} for name, kind in KINDS.items()})
    if convert and not found["by_epoch"]:
        raise place.at("convert_to_iter_based").error("only by_epoch=True can be converted")
    begin, end = found["begin"], found["end"]
    if end is None and found["by_epoch"]:
        end = found["end"] = max_epochs
    if end is not None and end <= begin:
        raise place.error(f"ends at {end}, which is not after its begin {begin}; give a larger end or a smaller begin")
    if found.get("eta_min") is not None and found.get("eta_min_ratio") is not None:
        raise place.error("has both eta_min and eta_min_ratio; keep one")
    return made(KINDS[found["type"]], found)


def _epochs(value: Any, place: Place) -> int | float:
    return (number(at_least=0, at_most=NO_END) if type(value) is float else whole(0))(value, place)


def _optim_wrapper(value: Any, place: Place) -> dict[str, Any]:
    """The fields of Schedule that optim_wrapper sets."""
    found = read_typed(value, place, _OPTIM_WRAPPERS, "OptimWrapper")
    settings = {key: found[key] for key in ("optimizer", "clip_grad", "accumulative_counts")}
    settings["paramwise"] = found["paramwise_cfg"] or ParamwiseSettings()
    rules = value.get("paramwise_cfg") or {}
    decaying = [key for key, rule in rules.items() if key.endswith("_decay_mult") and rule is not None]
    decaying += ["custom_keys" for rule in rules.get("custom_keys", {}).values() if "decay_mult" in rule]
    if decaying and "weight_decay" not in value["optimizer"]:
        message = "multiplies the weight decay, but optimizer has no weight_decay; add it"
        raise place.at("paramwise_cfg").at(decaying[0]).error(message)
    if found["type"] == "AmpOptimWrapper":
        dtype = found["dtype"] or "float16"
        settings |= {"amp": AMP_NAMES[dtype], "loss_scale": found["loss_scale"]}
        if dtype == "bfloat16" and found["loss_scale"] != "dynamic":
            raise place.at("loss_scale").error("bfloat16 needs no loss scaling and none is done; leave it out")
    return settings


def _optimizer(value: Any, place: Place) -> OptimizerSettings:
    found = read_typed(value, place, OPTIMIZERS)
    kind, lr = found.pop("type"), found.pop("lr")
    kwargs = {key: setting for key, setting in found.items() if setting is not None}
    if kwargs.get("foreach") and kwargs.get("fused"):
        raise place.at("fused").error("foreach and fused exclude each other; keep one")
    if kwargs.get("fused") and kwargs.get("dampening"):
        raise place.at("fused").error("does not go with dampening: its first step would be another; leave fused out")
    if kwargs.get("nesterov") and (kwargs["momentum"] == 0 or kwargs["dampening"] != 0):
        raise place.at("nesterov").error("needs a momentum above 0 and no dampening")
    return OptimizerSettings(kind, lr, kwargs)


def _betas(value: Any, place: Place) -> tuple[float, float]:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        first, second = (number(at_least=0)(item, place) for item in value)
        if first < 1 and second < 1:
            return first, second
    raise place.unfit("must be two numbers >= 0 and < 1", value)


_LR = number(above=0, at_most=1000)
_RATIO = number(at_least=0, at_most=1000)
_SHARE = number(at_least=0, at_most=1)
_LOSS_SCALE = number(at_least=1e-6, at_most=1e30)  # what float32 holds, with room for gradients
_IMPLEMENTATION: Keys = {"foreach": (optional(flag), None), "fused": (optional(flag), None)}
_ADAM: Keys = {
    "lr": _LR,
    "betas": (_betas, (0.9, 0.999)),
    "eps": (_RATIO, 1e-8),
    "weight_decay": (_RATIO, 0.0),
    "amsgrad": (flag, False),
    **_IMPLEMENTATION,
}
OPTIMIZERS: dict[str, Keys] = {  # the defaults are torch's own
    "SGD": {
        "lr": _LR,
        "momentum": (_SHARE, 0.0),
        "dampening": (_SHARE, 0.0),
        "weight_decay": (_RATIO, 0.0),
        "nesterov": (flag, False),
        **_IMPLEMENTATION,
    },
    "Adam": _ADAM,
    "AdamW": {**_ADAM, "weight_decay": (_RATIO, 1e-2)},
}


def _clip_grad(value: Any, place: Place) -> ClipGrad:
    keys = {**checked_fields(ClipGrad), "error_if_nonfinite": (choice(False), False)}
    return made(ClipGrad, read_typed(value, place, {"norm": keys}, "norm", " (clipping by value is not done here)"))


def _loss_scale(value: Any, place: Place) -> str | float | dict[str, Any]:
    if isinstance(value, dict):
        keys: Keys = {
            "init_scale": (_LOSS_SCALE, None),
            "growth_factor": (number(above=1, at_most=1000), None),
            "backoff_factor": (number(at_least=0.001, at_most=1), None),
            "growth_interval": (whole(1), None),
            # Without a scale, small float16 gradients become 0; bfloat16 is what needs none.
            "enabled": (choice(True, hint=" (dtype='bfloat16' trains without a loss scale)"), None),
        }
        found = read_dict(value, place, keys)
        return {key: setting for key, setting in found.items() if setting is not None and key != "enabled"}
    if value == "dynamic":
        return "dynamic"
    try:
        return _LOSS_SCALE(value, place)
    except ScheduleError:
        raise place.unfit("must be 'dynamic', a number from 1e-6 to 1e30, or dict(init_scale=...)", value) from None


def _paramwise(value: Any, place: Place) -> ParamwiseSettings:
    no_offsets = optional(choice(1, 1.0, hint=" (no model here has deformable convolutions)"))
    keys = {**checked_fields(ParamwiseSettings), "dcn_offset_lr_mult": (no_offsets, None)}
    return made(ParamwiseSettings, read_dict(value, place, keys))


_WRAPPER_KEYS: Keys = {
    "constructor": (optional(choice("DefaultOptimWrapperConstructor")), None),
    "optimizer": _optimizer,
    "clip_grad": (optional(_clip_grad), None),
    "accumulative_counts": (whole(1, 4096), 1),
    "paramwise_cfg": (optional(_paramwise), None),
}
_OPTIM_WRAPPERS: dict[str, Keys] = {
    "OptimWrapper": _WRAPPER_KEYS,
    "AmpOptimWrapper": {
        **_WRAPPER_KEYS,
        "dtype": (optional(choice(*AMP_NAMES)), None),
        "loss_scale": (_loss_scale, "dynamic"),
        "use_fsdp": (choice(False), False),
    },
}
