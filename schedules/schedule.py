"""What a schedule says, as plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from schedules.errors import ScheduleError
from schedules.learning_rate import LearningRateCurve
from schedules.paramwise import ParamwiseSettings
from schedules.schedulers import CosineAnnealingLR, LinearLR, MultiStepLR, Scheduler

FLOAT16, BFLOAT16 = "float16", "bfloat16"
AMP_NAMES = {FLOAT16: "fp16", BFLOAT16: "bf16"}


@dataclass(frozen=True)
class OptimizerSettings:
    """type is SGD, Adam or AdamW; kwargs are further arguments of torch's optimizer of that name, defaults
    filled in.
    """

    type: str
    lr: float
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClipGrad:
    """Arguments of torch.nn.utils.clip_grad_norm_; norm_type may be inf."""

    max_norm: float
    norm_type: float = 2.0


@dataclass(frozen=True)
class Schedule:
    """How long to train, with which optimizer, and how the learning rate moves.

    Two schedules are equal where they say the same; name, source and notes are not compared.

    val_begin, val_interval, dynamic_intervals: see validates_after. amp: None, "fp16" or "bf16"; loss_scale:
    "dynamic", a fixed number, or arguments of a GradScaler. accumulative_counts: micro-batches per iteration.
    base_batch_size: the global batch that optimizer.lr belongs to. notes: lines that the start of a run
    prints, such as keys of the file that were ignored.
    """

    name: str = field(compare=False)
    source: str = field(compare=False)
    max_epochs: int
    optimizer: OptimizerSettings
    val_interval: int = 1
    val_begin: int = 1
    dynamic_intervals: tuple[tuple[int, int], ...] = ()
    param_schedulers: tuple[Scheduler, ...] = ()
    clip_grad: ClipGrad | None = None
    accumulative_counts: int = 1
    amp: str | None = None
    loss_scale: str | float | dict[str, Any] = "dynamic"
    paramwise: ParamwiseSettings = field(default_factory=ParamwiseSettings)
    auto_scale_lr_enabled: bool = False
    base_batch_size: int = 16
    notes: tuple[str, ...] = field(default=(), compare=False)
    _curves: dict[tuple[int, float], LearningRateCurve] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def learning_rate(self, iteration: int, iterations_per_epoch: int, lr_mult: float = 1.0) -> float:
        """The learning rate that optimizer step `iteration` (0-based, over the whole run) uses.

        lr_mult: of a parameter group (see parameter_multipliers). It multiplies the optimizer's lr before the
        schedulers, as in MMEngine: floors such as eta_min stay what they are. Raises ScheduleError for an
        iteration below 0 or an epoch without iterations.
        """
        curve = self._curves.get((iterations_per_epoch, lr_mult))
        if curve is None or iteration >= curve.horizon:
            curve = self._curve(iteration, iterations_per_epoch, lr_mult)
        if iteration < 0:
            raise ScheduleError(f"iteration must be 0 or more, not {iteration}")
        return curve(iteration)

    def _curve(self, iteration: int, iterations_per_epoch: int, lr_mult: float) -> LearningRateCurve:
        if iterations_per_epoch < 1:
            raise ScheduleError(f"an epoch must have at least one iteration, not {iterations_per_epoch}")
        beyond = 2 * iteration if iteration >= self.max_epochs * iterations_per_epoch else 0
        curve = LearningRateCurve(
            self.param_schedulers, self.optimizer.lr * lr_mult, self.max_epochs, iterations_per_epoch, beyond
        )
        self._curves[iterations_per_epoch, lr_mult] = curve  # what is kept is a function of what is frozen
        return curve

    def validates_after(self, finished_epochs: int) -> bool:
        """Whether a validation follows the epoch after which `finished_epochs` (1-based) are done."""
        interval = self.val_interval
        for epoch, later_interval in self.dynamic_intervals:
            if finished_epochs + 1 >= epoch:
                interval = later_interval
        due = finished_epochs % interval == 0 or finished_epochs == self.max_epochs
        return due and finished_epochs >= self.val_begin

    def scaled(self, global_batch_size: int) -> Schedule:
        """The same schedule with lr x global_batch_size / base_batch_size.

        The global batch is the number of images one optimizer step sees: processes x images per process x
        accumulated micro-batches. A floor eta_min is a learning rate of its own and stays.
        """
        if global_batch_size < 1:
            raise ScheduleError(f"a global batch must have at least one image, not {global_batch_size}")
        lr = self.optimizer.lr * (global_batch_size / self.base_batch_size)
        return replace(self, optimizer=replace(self.optimizer, lr=lr))

    def with_overrides(self, overrides: Mapping[str, str]) -> tuple[Schedule, list[str]]:
        """A copy with other values, and lines that say what changed; see schedules/overrides.py."""
        from schedules.overrides import with_overrides  # the parser of values sits above this file

        return with_overrides(self, overrides)

    def to_dict(self) -> dict[str, Any]:
        """The resolved schedule file as a dict fit for JSON; equal dicts mean equal schedules and the other
        way round.
        """
        amp = {"dtype": _key_of(AMP_NAMES, self.amp), "loss_scale": self.loss_scale} if self.amp else {}
        paramwise = {f.name: getattr(self.paramwise, f.name) for f in fields(self.paramwise)}
        paramwise["custom_keys"] = {
            key: {"lr_mult": lr_mult, "decay_mult": decay_mult}
            for key, (lr_mult, decay_mult) in self.paramwise.custom_keys.items()
        }
        clip = None if self.clip_grad is None else _clip_dict(self.clip_grad)
        return _plain(
            {
                "train_cfg": {
                    "type": "EpochBasedTrainLoop",
                    "max_epochs": self.max_epochs,
                    "val_begin": self.val_begin,
                    "val_interval": self.val_interval,
                    "dynamic_intervals": self.dynamic_intervals,
                },
                "val_cfg": {"type": "ValLoop"},
                "test_cfg": {"type": "TestLoop"},
                "param_scheduler": [
                    {"type": s.kind} | {f.name: getattr(s, f.name) for f in fields(s)} for s in self.param_schedulers
                ],
                "optim_wrapper": {
                    "type": "AmpOptimWrapper" if self.amp else "OptimWrapper",
                    "optimizer": {"type": self.optimizer.type, "lr": self.optimizer.lr} | self.optimizer.kwargs,
                    "clip_grad": clip,
                    "accumulative_counts": self.accumulative_counts,
                    "paramwise_cfg": paramwise,
                    **amp,
                },
                "auto_scale_lr": {
                    "enable": self.auto_scale_lr_enabled,
                    "base_batch_size": self.base_batch_size,
                },
            }
        )

    @staticmethod
    def from_dict(values: Mapping[str, Any], name: str = "schedule", source: str = "") -> Schedule:
        """The schedule of a dict in the file's vocabulary, such as to_dict gives. Raises ScheduleError."""
        from schedules.vocabulary import schedule_from_values  # the vocabulary sits above this file

        return schedule_from_values(values, name, source)

    def describe(self) -> list[str]:
        """A few lines for people: length, optimizer, learning rate, validation."""
        settings = ", ".join(f"{key} {_short(value)}" for key, value in self.optimizer.kwargs.items() if value)
        lines = [
            f"{self.name}: {self.max_epochs} epoch{'s' if self.max_epochs != 1 else ''}",
            f"{self.optimizer.type}, lr {self.optimizer.lr:g}" + (f", {settings}" if settings else ""),
        ]
        lines += [_describe_scheduler(scheduler) for scheduler in self.param_schedulers] or ["constant learning rate"]
        if self.clip_grad is not None:
            lines.append(f"gradients clipped to norm {self.clip_grad.max_norm:g}")
        if self.accumulative_counts > 1:
            lines.append(f"{self.accumulative_counts} micro-batches per iteration")
        if self.amp:
            lines.append(f"mixed precision {self.amp}")
        if not self.paramwise.is_default:
            lines.append("learning rate or weight decay differs by parameter (paramwise_cfg)")
        often = "every epoch" if self.val_interval == 1 else f"every {self.val_interval} epochs"
        begin = f" from epoch {self.val_begin} on" if self.val_begin > 1 else ""
        later = "".join(f", from epoch {e} on every {i}" for e, i in self.dynamic_intervals)
        lines.append(f"validation {often}{begin}{later}, and after the last one")
        return lines


def _describe_scheduler(scheduler: Scheduler) -> str:
    unit = "epoch" if scheduler.by_epoch else "iteration"
    span = f"{unit} {scheduler.begin} to {'the end' if scheduler.end is None else scheduler.end}"
    by_iteration = ", moving every iteration" if scheduler.convert_to_iter_based else ""
    if isinstance(scheduler, LinearLR):
        return f"linear x{scheduler.start_factor:g} to x{scheduler.end_factor:g}, {span}{by_iteration}"
    if isinstance(scheduler, MultiStepLR):
        after = "" if scheduler.begin == 0 else f" (counted from {unit} {scheduler.begin})"
        return f"x{scheduler.gamma:g} after {unit} {', '.join(map(str, scheduler.milestones))}{after}"
    if isinstance(scheduler, CosineAnnealingLR):
        ratio = scheduler.eta_min_ratio
        floor = f"{ratio:g} of the lr" if ratio is not None else f"{scheduler.eta_min or 0:g}"
        return f"cosine down to {floor}, {span}{by_iteration}"
    own = [f.name for f in fields(scheduler) if f.name not in Scheduler.__dataclass_fields__]
    settings = " ".join(f"{name} {getattr(scheduler, name):g}" for name in own)
    return f"{scheduler.kind} {settings}, {span}{by_iteration}"


def _clip_dict(clip: ClipGrad) -> dict[str, Any]:
    # JSON has no infinity; "inf" is what torch and MMEngine take for it.
    return {
        "max_norm": clip.max_norm,
        "norm_type": "inf" if clip.norm_type == float("inf") else clip.norm_type,
    }


def _key_of(names: Mapping[str, str], wanted: str | None) -> str:
    return next(key for key, name in names.items() if name == wanted)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
