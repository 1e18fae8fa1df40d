"""What is done with the gradients of an iteration: unscale, clip, step or skip, average the weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from detection.engine.optim.amp import Precision, gradient_norm
from detection.engine.optim.ema import AveragedModel
from detection.engine.optim.nonfinite import NonFiniteGuard
from detection.engine.optim.optimizer import set_learning_rate, trained_parameters
from schedules import Schedule


class ParameterUpdate:
    """The optimizer step, with the schedule's learning rate and gradient clipping."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        precision: Precision,
        guard: NonFiniteGuard,
        *,
        iterations_per_epoch: int,
        ema: AveragedModel | None = None,
    ) -> None:
        """
        Args:
            model: the detector itself, whose weights `ema` averages.
        """
        self._model = model
        self._optimizer = optimizer
        self._parameters = trained_parameters(optimizer)
        self._schedule = schedule
        self._precision = precision
        self._guard = guard
        self._iterations_per_epoch = iterations_per_epoch
        self._ema = ema
        clip = schedule.clip_grad
        self._norm_type = clip.norm_type if clip else 2.0
        self._clip_to = clip.max_norm if clip else None
        self.can_skip = precision.amp == "fp16" or all(group["fused"] for group in optimizer.param_groups)
        """Whether a step that is not finite leaves the model as it was; foreach=True and fused=False cannot."""

    def apply(self, iteration: int, place: int | None = None) -> tuple[float, Tensor]:
        """One optimizer step; its learning rate, and the gradients' norm (scalar on the device, before clipping).

        place: the iteration of the schedule that the learning rate is of; None: the same.
        """
        place = iteration if place is None else place
        learning_rate = set_learning_rate(self._optimizer, self._schedule, place, self._iterations_per_epoch)
        self._precision.unscale(self._optimizer)
        norm = gradient_norm(self._parameters, norm_type=self._norm_type, clip_to=self._clip_to)
        skip = self._guard.finish(norm)
        self._precision.step(self._optimizer, skip if self.can_skip else None)
        if self._ema is not None:
            # A run that ends there needs no average any more.
            self._ema.update(self._model, iteration, skip if self._guard.skips else None)
        return learning_rate, norm
