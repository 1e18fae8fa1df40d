"""MMDetection's schedule vocabulary: plain values in, a checked Schedule out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from schedules.errors import nearest
from schedules.fields import (
    Section,
    Unfit,
    betas,
    choice,
    flag,
    increasing,
    number,
    optional,
    pairs_of_whole,
    whole,
)
from schedules.literals import Origin
from schedules.paramwise import ParamwiseSettings
from schedules.schedule import AMP_NAMES, BFLOAT16, FLOAT16, ClipGrad, OptimizerSettings, Schedule
from schedules.schedulers import KINDS, NO_END, MultiStepLR, Scheduler

SCHEDULE_KEYS = ("train_cfg", "val_cfg", "test_cfg", "param_scheduler", "optim_wrapper", "auto_scale_lr")

# Keys of whole MMDetection 3.x configurations that say nothing about the schedule, and what says it here.
_NO_SAY = "this product has its own"
_DATA = "the data set is named on the command line (--dataset, --data-path, --train-images, ...)"
IGNORED_KEYS = {
    **dict.fromkeys(
        (
            "default_scope",
            "default_hooks",
            "custom_hooks",
            "custom_imports",
            "env_cfg",
            "vis_backends",
            "visualizer",
            "log_processor",
            "log_level",
            "launcher",
            "experiment_name",
        ),
        _NO_SAY,
    ),
    **dict.fromkeys(
        (
            "dataset_type",
            "data_root",
            "backend_args",
            "train_dataloader",
            "val_dataloader",
            "test_dataloader",
            "train_pipeline",
            "test_pipeline",
            "val_evaluator",
            "test_evaluator",
        ),
        _DATA,
    ),
    **dict.fromkeys(("tta_model", "tta_pipeline", "img_scales"), "there is no test-time augmentation"),
    "model": "use --model",
    "data_preprocessor": "use --model",
    "load_from": "use --weights",
    "resume": "use --resume",
    "randomness": "use --seed and --deterministic",
    "work_dir": "use --output-dir",
}

_OLD_KEYS = ("optimizer", "optimizer_config", "lr_config", "runner", "total_epochs", "evaluation", "fp16")

_LOOP = "EpochBasedTrainLoop"
_OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {  # torch's own
    "SGD": {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    "Adam": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False},
    "AdamW": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False},
}
_OPTIMIZER_CHECKS: dict[str, Any] = {
    "momentum": number(at_least=0),
    "dampening": number(),
    "weight_decay": number(at_least=0),
    "nesterov": flag,
    "betas": betas,
    "eps": number(at_least=0),
    "amsgrad": flag,
}


def optimizer_keys(kind: str) -> tuple[str, ...]:
    """The keys that an optimizer=dict(type=kind, ...) may hold; none where there is no such kind."""
    known = _OPTIMIZER_DEFAULTS.get(kind)
    return ("type", "lr", *known, "foreach", "fused") if known else ()


def is_ignored(key: str) -> bool:
    return key in IGNORED_KEYS


def schedule_from_values(
    values: Mapping[str, Any],
    name: str,
    source: str,
    origin: Origin | None = None,
    notes: tuple[str, ...] = (),
) -> Schedule:
    """The Schedule that `values` (a schedule file's keys) describe; raises ScheduleError."""
    origin = origin or Origin(source or name)
    for key in values:
        _refuse_unknown(key, origin)
    top = Section(dict(values), (), origin)
    train = top.section("train_cfg")
    max_epochs = train.take("max_epochs", whole(1))
    train.take("type", choice(_LOOP, hint=" (training by epoch is the only kind here)"), _LOOP)
    train.take("by_epoch", choice(True), True)
    validation: dict[str, Any] = {
        "val_begin": train.take("val_begin", whole(0), 1),
        "val_interval": train.take("val_interval", whole(1), 1),
        "dynamic_intervals": train.take("dynamic_intervals", optional(pairs_of_whole), None) or (),
    }
    train.finish()
    for key, kind in (("val_cfg", "ValLoop"), ("test_cfg", "TestLoop")):
        loop = top.section(key, {})
        loop.take("type", choice(kind), kind)
        loop.take("fp16", choice(False, hint=" (--amp sets the precision)"), False)
        loop.finish()

    scale = top.section("auto_scale_lr", {})
    enabled = scale.take("enable", flag, False)
    if enabled and "base_batch_size" not in scale:
        raise scale.error("enable=True needs base_batch_size, the global batch that lr belongs to")
    base_batch_size = scale.take("base_batch_size", whole(1), 16)
    scale.finish()

    schedule = Schedule(
        name=name,
        source=source,
        max_epochs=max_epochs,
        **validation,
        **_optim_wrapper(top.section("optim_wrapper")),
        param_schedulers=_schedulers(values.get("param_scheduler"), max_epochs, origin),
        auto_scale_lr_enabled=enabled,
        base_batch_size=base_batch_size,
    )
    return replace(schedule, notes=(*notes, *settings_without_effect(schedule)))


def _refuse_unknown(key: str, origin: Origin) -> None:
    if key in SCHEDULE_KEYS:
        return
    if key == "_base_":
        raise origin.error(
            "a schedule is one flat file and inherits from no other; copy what the base files say into it",
            (key,),
        )
    if key in _OLD_KEYS:
        raise origin.error(
            "is a key of MMDetection 2.x; write the schedule with 3.x's train_cfg, param_scheduler and optim_wrapper",
            (key,),
        )
    raise origin.error(f"unknown key{nearest(key, SCHEDULE_KEYS)}", (key,))


def _schedulers(values: Any, max_epochs: int, origin: Origin) -> tuple[Scheduler, ...]:
    if values is None:
        return ()
    if isinstance(values, dict):  # MMEngine takes a single one without the list
        values = [values]
    if not isinstance(values, (list, tuple)):
        raise origin.error(f"must be a list of dict(type=...), not {values!r}", ("param_scheduler",))
    sections = [Section(one, ("param_scheduler", str(place)), origin) for place, one in enumerate(values)]
    return tuple(_scheduler(section, max_epochs) for section in sections)


def _scheduler(section: Section, max_epochs: int) -> Scheduler:
    kind = KINDS[section.take("type", choice(*KINDS))]
    by_epoch = section.take("by_epoch", flag, True)
    convert = section.take("convert_to_iter_based", flag, False)
    if convert and not by_epoch:
        raise section.error("only by_epoch=True can be converted", "convert_to_iter_based")
    count = _epochs if convert else whole(0)
    begin = section.take("begin", count, 0)
    end = section.take("end", optional(count), None)
    if end is None and by_epoch:
        end = max_epochs
    if end is not None and end <= begin:
        raise section.error(
            f"ends at {end}, which is not after its begin {begin}; give a larger end or a smaller begin"
        )
    section.take("last_step", choice(-1, hint=" (a resume needs no state here)"), -1)
    section.take("verbose", flag, False)
    own = {key: section.take(key, check, *default) for key, (check, *default) in _SCHEDULER_FIELDS[kind.kind].items()}
    section.finish()
    if own.get("eta_min") is not None and own.get("eta_min_ratio") is not None:
        raise section.error("has both eta_min and eta_min_ratio; keep one")
    return kind(begin=begin, end=end, by_epoch=by_epoch, convert_to_iter_based=convert, **own)


def _epochs(value: Any) -> int | float:
    if type(value) is float:
        return number(at_least=0, at_most=NO_END)(value)
    return whole(0)(value)


_GAMMA = number(above=0)
_SCHEDULER_FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {  # key: (check,) or (check, default)
    # MMEngine divides by these factors, so 0 breaks its steps; only the end of a ramp may be 0.
    "LinearLR": {
        "start_factor": (number(above=0, at_most=1), 1 / 3),
        "end_factor": (number(at_least=0, at_most=1), 1.0),
    },
    "ConstantLR": {"factor": (number(above=0, at_most=1), 1 / 3)},
    "MultiStepLR": {"milestones": (increasing(0),), "gamma": (_GAMMA, 0.1)},
    "StepLR": {"step_size": (whole(1),), "gamma": (_GAMMA, 0.1)},
    "ExponentialLR": {"gamma": (_GAMMA,)},
    "CosineAnnealingLR": {
        "T_max": (optional(whole(1)), None),
        "eta_min": (optional(number(at_least=0)), None),
        "eta_min_ratio": (optional(number(at_least=0)), None),
    },
    "PolyLR": {"power": (number(above=0), 1.0), "eta_min": (number(at_least=0), 0.0)},
}


def _optim_wrapper(section: Section) -> dict[str, Any]:
    kind = section.take("type", choice("OptimWrapper", "AmpOptimWrapper"), "OptimWrapper")
    constructor = "DefaultOptimWrapperConstructor"
    section.take("constructor", optional(choice(constructor)), constructor)
    settings: dict[str, Any] = {
        "optimizer": _optimizer(section.section("optimizer")),
        "clip_grad": _clip_grad(section),
        "accumulative_counts": section.take("accumulative_counts", whole(1), 1),
        "paramwise": _paramwise(section),
    }
    if kind == "AmpOptimWrapper":
        dtype = section.take("dtype", optional(choice(*AMP_NAMES)), None) or FLOAT16
        settings["amp"] = AMP_NAMES[dtype]
        settings["loss_scale"] = section.take("loss_scale", _loss_scale, "dynamic")
        if dtype == BFLOAT16 and settings["loss_scale"] != "dynamic":
            raise section.error("bfloat16 needs no loss scaling and none is done; leave it out", "loss_scale")
        section.take("use_fsdp", choice(False), False)
    section.finish()
    return settings


def _optimizer(section: Section) -> OptimizerSettings:
    kind = section.take("type", choice(*_OPTIMIZER_DEFAULTS))
    lr = section.take("lr", number(above=0))
    kwargs = {
        key: section.take(key, _OPTIMIZER_CHECKS[key], default) for key, default in _OPTIMIZER_DEFAULTS[kind].items()
    }
    for key in ("foreach", "fused"):
        chosen = section.take(key, optional(flag), None)
        if chosen is not None:
            kwargs[key] = chosen
    section.finish()
    if kwargs.get("foreach") and kwargs.get("fused"):
        raise section.error("foreach and fused exclude each other; keep one", "fused")
    if kwargs.get("nesterov") and (kwargs["momentum"] == 0 or kwargs["dampening"] != 0):
        raise section.error("needs a momentum above 0 and no dampening", "nesterov")
    return OptimizerSettings(kind, lr, kwargs)


def _clip_grad(parent: Section) -> ClipGrad | None:
    if parent.values.get("clip_grad") is None:
        return parent.take("clip_grad", optional(choice(None)), None)
    section = parent.section("clip_grad")
    section.take("type", choice("norm", hint=" (clipping by value is not done here)"), "norm")
    section.take("error_if_nonfinite", choice(False), False)
    clip = ClipGrad(
        max_norm=section.take("max_norm", number(above=0)),
        norm_type=section.take("norm_type", _norm_type, 2.0),
    )
    section.finish()
    return clip


def _norm_type(value: Any) -> float:
    if value in ("inf", float("inf")):
        return float("inf")
    return number(above=0)(value)


def _loss_scale(value: Any) -> str | float | dict[str, Any]:
    if value == "dynamic":
        return "dynamic"
    if not isinstance(value, dict):
        try:
            return number(above=0)(value)
        except Unfit:
            raise Unfit("must be 'dynamic', a finite number > 0, or dict(init_scale=...)") from None
    checks: dict[str, Any] = {
        "init_scale": number(above=0),
        "growth_factor": number(above=1),
        "backoff_factor": number(above=0, at_most=1),
        "growth_interval": whole(1),
        "enabled": flag,
    }
    for key, item in value.items():
        if key not in checks:
            raise Unfit(f"has the unknown key {key!r}{nearest(key, checks)}; must be arguments of GradScaler")
        try:
            checks[key](item)
        except Unfit as unfit:
            raise Unfit(f"{key} {unfit}") from None
    return {key: checks[key](item) for key, item in value.items()}


def _paramwise(parent: Section) -> ParamwiseSettings:
    values = parent.values.get("paramwise_cfg")
    section = parent.section("paramwise_cfg") if values is not None else Section({}, parent.path, parent.origin)
    parent.take("paramwise_cfg", lambda value: value, None)
    mult = optional(number(at_least=0))
    decays = ("norm_decay_mult", "bias_decay_mult", "dwconv_decay_mult", "flat_decay_mult")
    given: dict[str, Any] = {key: section.take(key, mult, None) for key in (*decays, "bias_lr_mult")}
    given["bypass_duplicate"] = section.take("bypass_duplicate", flag, False)
    section.take(
        "dcn_offset_lr_mult",
        optional(choice(1, 1.0, hint=" (no model here has deformable convolutions)")),
        None,
    )
    decaying = [key for key in decays if given[key] is not None]
    custom_keys = {}
    custom = section.section("custom_keys", {})
    for key in custom.values:
        one = custom.section(key)
        if "decay_mult" in one:
            decaying.append("custom_keys")
        custom_keys[key] = (
            one.take("lr_mult", number(at_least=0), 1.0),
            one.take("decay_mult", number(at_least=0), 1.0),
        )
        one.finish()
    section.finish()
    optimizer = parent.values.get("optimizer")
    if decaying and isinstance(optimizer, dict) and "weight_decay" not in optimizer:
        raise section.error("multiplies the weight decay, but optimizer has no weight_decay; add it", decaying[0])
    return ParamwiseSettings(**given, custom_keys=custom_keys)


def settings_without_effect(schedule: Schedule) -> list[str]:
    """Lines on schedulers that never act, or not fully, because the run ends before."""
    lines = []
    for place, scheduler in enumerate(schedule.param_schedulers):
        key = f"param_scheduler.{place}"
        if not scheduler.by_epoch:
            continue
        end = min(schedule.max_epochs, scheduler.end if scheduler.end is not None else schedule.max_epochs)
        if scheduler.begin >= schedule.max_epochs:
            lines.append(
                f"warning: {key} ({scheduler.kind}) begins at epoch {scheduler.begin} and never acts in "
                f"{schedule.max_epochs} epochs"
            )
        elif isinstance(scheduler, MultiStepLR):
            idle = [str(m) for m in scheduler.milestones if scheduler.begin + m >= end]
            if idle:
                lines.append(f"warning: {key}.milestones: {', '.join(idle)} never act, the end is epoch {end}")
    return lines
