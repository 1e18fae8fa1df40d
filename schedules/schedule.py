"""What a schedule says, as plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from schedules.checks import number
from schedules.errors import Place, ScheduleError
from schedules.paramwise import ParamwiseSettings
from schedules.schedulers import CosineAnnealingLR, LearningRateCurve, LinearLR, MultiStepLR, Scheduler

AMP_NAMES = {"float16": "fp16", "bfloat16": "bf16"}

_curve = lru_cache(maxsize=256)(LearningRateCurve)  # made once for each learning rate of a run


@dataclass(frozen=True)
class OptimizerSettings:
    """type is SGD, Adam or AdamW; kwargs are further arguments of torch's optimizer of that name, defaults
    filled in.
    """

    type: str
    lr: float
    kwargs: dict[str, Any] = field(default_factory=dict)


def _norm_type(value: Any, place: Place) -> float:
    return float("inf") if value in ("inf", float("inf")) else number(at_least=0.1, at_most=100)(value, place)


@dataclass(frozen=True)
class ClipGrad:
    """Arguments of torch.nn.utils.clip_grad_norm_; norm_type may be inf."""

    max_norm: float = field(metadata={"check": number(above=0)})
    norm_type: float = field(default=2.0, metadata={"check": _norm_type})


@dataclass(frozen=True)
class Schedule:
    """How long to train, with which optimizer, and how the learning rate moves.

    Two schedules are equal where they say the same; name, source and notes are not compared.

    epoch_iterations: of a schedule that counts iterations, how many are an epoch here; None: a pass over the data.
    val_begin, val_interval, dynamic_intervals: see validates_after. amp: None, "fp16" or "bf16"; loss_scale:
    "dynamic", a fixed number, or arguments of a GradScaler. accumulative_counts: micro-batches per iteration.
    ema_decay: of averaged weights; None: there are none.
    base_batch_size: the global batch that optimizer.lr belongs to. notes: lines that the start of a run
    prints, such as keys of the file that were ignored.
    """

    name: str = field(compare=False)
    source: str = field(compare=False)
    max_epochs: int
    optimizer: OptimizerSettings
    epoch_iterations: int | None = None
    val_interval: int = 1
    val_begin: int = 1
    dynamic_intervals: tuple[tuple[int, int], ...] = ()
    param_schedulers: tuple[Scheduler, ...] = ()
    clip_grad: ClipGrad | None = None
    accumulative_counts: int = 1
    amp: str | None = None
    loss_scale: str | float | dict[str, Any] = "dynamic"
    paramwise: ParamwiseSettings = field(default_factory=ParamwiseSettings)
    ema_decay: float | None = None
    auto_scale_lr_enabled: bool = False
    base_batch_size: int = 16
    notes: tuple[str, ...] = field(default=(), compare=False)

    def learning_rate(self, iteration: int, iterations_per_epoch: int, lr_mult: float = 1.0) -> float:
        """The learning rate that optimizer step `iteration` (0-based, over the whole run) uses.

        lr_mult: of a parameter group (see parameter_multipliers). It multiplies the optimizer's lr before the
        schedulers, as in MMEngine: floors such as eta_min stay what they are. Raises ScheduleError for an
        iteration below 0 or an epoch without iterations.
        """
        if iterations_per_epoch < 1:
            raise ScheduleError(f"an epoch must have at least one iteration, not {iterations_per_epoch}")
        if iteration < 0:
            raise ScheduleError(f"iteration must be 0 or more, not {iteration}")
        base_lr = self.optimizer.lr * lr_mult
        return _curve(self.param_schedulers, base_lr, self.max_epochs, iterations_per_epoch)(iteration)

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

    def to_dict(self) -> dict[str, Any]:
        """The resolved schedule file as a dict fit for JSON; equal dicts mean equal schedules and the other
        way round. schedule_from_dict() reads it.
        """
        custom_keys = {
            key: {"lr_mult": lr_mult, "decay_mult": decay_mult}
            for key, (lr_mult, decay_mult) in self.paramwise.custom_keys.items()
        }
        optim_wrapper: dict[str, Any] = {
            "type": "AmpOptimWrapper" if self.amp else "OptimWrapper",
            "optimizer": {"type": self.optimizer.type, "lr": self.optimizer.lr} | self.optimizer.kwargs,
            "clip_grad": asdict(self.clip_grad) if self.clip_grad else None,
            "accumulative_counts": self.accumulative_counts,
            "paramwise_cfg": asdict(self.paramwise) | {"custom_keys": custom_keys},
        }
        if self.clip_grad and self.clip_grad.norm_type == float("inf"):
            optim_wrapper["clip_grad"]["norm_type"] = "inf"  # as torch and MMEngine take it; JSON has no infinity
        if self.amp:
            optim_wrapper["dtype"] = next(key for key, name in AMP_NAMES.items() if name == self.amp)
            optim_wrapper["loss_scale"] = self.loss_scale
        validation = {key: getattr(self, key) for key in ("val_begin", "val_interval", "dynamic_intervals")}
        train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": self.max_epochs, **validation}
        if (part := self.epoch_iterations) is not None:
            train_cfg = {"type": "IterBasedTrainLoop", "max_iters": self.max_epochs * part, "val_interval": part}
        # Not a key of MMDetection's: its schedules read back as they were written.
        averaging = {} if self.ema_decay is None else {"ema": {"decay": self.ema_decay}}
        return _plain(
            {
                "train_cfg": train_cfg,
                "val_cfg": {"type": "ValLoop"},
                "test_cfg": {"type": "TestLoop"},
                "param_scheduler": [{"type": s.kind, **asdict(s)} for s in self.param_schedulers],
                "optim_wrapper": optim_wrapper,
                "auto_scale_lr": {"enable": self.auto_scale_lr_enabled, "base_batch_size": self.base_batch_size},
                **averaging,
            }
        )

    def describe(self) -> list[str]:
        """A few lines for people: length, optimizer, learning rate, validation."""
        settings = "".join(
            f", {key} {value:g}" if isinstance(value, float) else f", {key} {value}"
            for key, value in self.optimizer.kwargs.items()
            if value
        )
        lines = [
            f"{self.name}: {self.max_epochs} epoch{'s' if self.max_epochs != 1 else ''}"
            + (f" of {self.epoch_iterations:,} iterations" if self.epoch_iterations else ""),
            f"{self.optimizer.type}, lr {self.optimizer.lr:g}{settings}",
        ]
        lines += [_describe_scheduler(scheduler) for scheduler in self.param_schedulers] or ["constant learning rate"]
        if self.clip_grad is not None:
            lines.append(f"gradients clipped to norm {self.clip_grad.max_norm:g}")
        if self.accumulative_counts > 1:
            lines.append(f"{self.accumulative_counts} micro-batches per iteration")
        if self.amp:
            lines.append(f"mixed precision {self.amp}")
        if self.ema_decay is not None:
            lines.append(f"averaged weights, decay {self.ema_decay:g}")
        if self.paramwise != ParamwiseSettings(bypass_duplicate=self.paramwise.bypass_duplicate):
            lines.append("learning rate or weight decay differs by parameter (paramwise_cfg)")
        often = "every epoch" if self.val_interval == 1 else f"every {self.val_interval} epochs"
        begin = f" from epoch {self.val_begin} on" if self.val_begin > 1 else ""
        later = "".join(f", from epoch {e} on every {i}" for e, i in self.dynamic_intervals)
        lines.append(f"validation {often}{begin}{later}, and after the last one")
        return lines


def _describe_scheduler(scheduler: Scheduler) -> str:
    unit = "epoch" if scheduler.by_epoch else "iteration"
    span = f"{unit} {scheduler.begin} to {'the end' if scheduler.end is None else scheduler.end}"
    span += ", moving every iteration" if scheduler.convert_to_iter_based else ""
    if isinstance(scheduler, LinearLR):
        return f"linear x{scheduler.start_factor:g} to x{scheduler.end_factor:g}, {span}"
    if isinstance(scheduler, MultiStepLR):
        after = "" if scheduler.begin == 0 else f" (counted from {unit} {scheduler.begin})"
        return f"x{scheduler.gamma:g} after {unit} {', '.join(map(str, scheduler.milestones))}{after}"
    if isinstance(scheduler, CosineAnnealingLR):
        ratio = scheduler.eta_min_ratio
        floor = f"{ratio:g} of the lr" if ratio is not None else f"{scheduler.eta_min or 0:g}"
        return f"cosine down to {floor}, {span}"
    own = [f.name for f in fields(scheduler) if f.metadata]
    return " ".join([scheduler.kind, *(f"{name} {getattr(scheduler, name):g}" for name in own)]) + f", {span}"


def idle_schedulers(schedule: Schedule) -> list[str]:
    """Lines on schedulers that never act, or not fully, because the run ends before."""
    lines = []
    for place, scheduler in enumerate(schedule.param_schedulers):
        key = f"param_scheduler.{place}"
        if not scheduler.by_epoch:
            continue
        if scheduler.begin >= schedule.max_epochs:
            lines.append(
                f"warning: {key} ({scheduler.kind}) begins at epoch {scheduler.begin} and never acts in "
                f"{schedule.max_epochs} epochs"
            )
        elif isinstance(scheduler, MultiStepLR):
            end = min(schedule.max_epochs, scheduler.end or schedule.max_epochs)
            if idle := [str(m) for m in scheduler.milestones if scheduler.begin + m >= end]:
                lines.append(f"warning: {key}.milestones: {', '.join(idle)} never act, the end is epoch {end}")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
