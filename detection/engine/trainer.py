"""The training loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from data import DevicePrefetcher, TrainLoader
from detection.engine.accelerate.device_memory import naming_out_of_memory
from detection.engine.context import RunContext
from detection.engine.distributed.agreement import run_on_main_rank
from detection.engine.distributed.signals import Stopped
from detection.engine.inputs.agreed_batches import AgreedBatches
from detection.engine.metrics.step_metrics import NonFiniteLoss
from detection.engine.metrics.training_log import TrainingLog
from detection.engine.optim.gradients import GradientComputer
from detection.engine.optim.time_budget import TimeBudget
from detection.engine.optim.update import ParameterUpdate
from detection.engine.replay.captured_step import capture_step
from detection.engine.state.checkpoint import BEST, LAST, epoch_file
from detection.engine.state.checkpoint_store import Checkpointer
from detection.engine.state.train_state import TrainState


class Trainer:
    """Trains to the schedule's last epoch, or to an earlier end that patience or hours ask for, from any iteration. An
    iteration is one optimizer step."""

    def __init__(
        self,
        context: RunContext,
        state: TrainState,
        loader: TrainLoader,
        gradients: GradientComputer,
        update: ParameterUpdate,
        log: TrainingLog,
        checkpoints: Checkpointer,
        validate: Callable[[int, nn.Module], dict[str, Any]] | None,
    ) -> None:
        """
        Args:
            validate: (iteration, model) -> metrics; collective. None: the run has no validation set.
        """
        self.processes, self.stop, self.output = context.processes, context.stop, context.output
        settings = context.config.train
        self.patience = settings.patience
        self.budget = None if settings.max_hours is None else TimeBudget(settings.max_hours, context.processes)
        self.state = state
        self.loader = loader
        self.gradients = gradients
        self.update = update
        self.log = log
        self.checkpoints = checkpoints
        self.validate = validate

    def train(self) -> None:
        """Train to the end.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            NonFiniteLoss: see StepMetrics.
            TooManyBadImages: see BadImages.
        """
        state, progress = self.state, self.state.progress
        self.checkpoints.saved_iteration = progress.iteration or None
        self.log.metrics.skipped_steps = progress.skipped_steps
        loaded = self.loader.batches(progress.iteration, state.schedule_iterations)
        batches = AgreedBatches(loaded, self.processes, self.stop)
        self.run_validation_if_due()
        self.gradients.model.train()
        with (
            self.log.training_bar(batches, state.schedule_iterations, progress.iteration),
            naming_out_of_memory(lambda: self._place(batches)),
        ):
            while state.reason_to_end(self.patience) is None:
                try:
                    self.train_step(batches)
                except Stopped:
                    if progress.iteration != (self.checkpoints.saved_iteration or 0):
                        self.save([LAST])
                    words = f"with {progress.iteration} of {state.schedule_iterations} iterations done"
                    raise Stopped(words) from None
                if self.log.reads_after(progress.iteration):
                    self.write_log()
                    self.plan_end()
                if progress.iteration % state.iterations_per_epoch == 0 or progress.iteration == state.num_iterations:
                    self.save_epoch()
                elif self.checkpoint_is_due():
                    self.save([LAST])
                self.run_validation_if_due()
        if progress.iteration < state.schedule_iterations:
            self.log.logger.say(f"the run ends here: {state.reason_to_end(self.patience)}")

    def plan_end(self) -> None:
        """Where hours are given, count them and plan how the rest of the schedule fits into what is left of them."""
        if self.budget is None:
            return
        progress, was_planned = self.state.progress, self.state.progress.ending.last_iteration is not None
        progress.ending.seconds, left = self.budget.left(progress.iteration, progress.ending.seconds)
        if left is not None:
            self.state.end_in(left)
        if not was_planned and progress.ending.last_iteration is not None:
            self.log.logger.say(
                f"--max-hours {self.budget.hours:g}: the run ends after about {progress.ending.last_iteration:,} of "
                f"{self.state.schedule_iterations:,} iterations, and the learning rate drops as much sooner"
            )

    def train_step(self, batches: DevicePrefetcher) -> None:
        """One iteration: gradients of a global batch, and one optimizer step.

        Raises:
            Stopped: on every process; nothing of the iteration is left.
        """
        iteration = self.state.progress.iteration
        self.processes.at(f"in iteration {iteration}")
        fed = self.gradients.compute(batches)
        learning_rate, grad_norm = self.update.apply(iteration, int(self.state.schedule_iteration))
        self.log.metrics.add(
            fed.losses,
            grad_norm,
            fed.image_ids,
            fed.unreadable,
            epoch=iteration // self.state.iterations_per_epoch,
            iteration=iteration,
            lr=learning_rate,
            data_seconds=fed.data_seconds,
        )
        self.state.progress.iteration += 1

    def _place(self, batches: DevicePrefetcher) -> str:
        where = f"in iteration {self.state.progress.iteration}, process {self.processes.rank}"
        if (plan := batches.plan) is None:
            return where
        height, width = plan.padded_size
        num_boxes = self.loader.dataset.box_counts[plan.indices].sum()
        return f"{where}, batch of {len(plan.indices)} x {height} x {width} pixels with {num_boxes} boxes"

    def write_log(self) -> None:
        """Write the figures since the last time; on every process the run ends where one of them is not finite."""
        self.gradients.check()
        try:
            self.log.write()
        except NonFiniteLoss as error:
            state, kept = self.state, "The step is not kept: without a fused optimizer the weights before it are gone."
            if self.update.can_skip:
                folder, model = self.output.nonfinite, state.model
                keep = partial(capture_step, folder, error, self.loader, model, state.precision, state.facts)
                kept = run_on_main_rank(self.processes, keep)
            raise NonFiniteLoss(f"{error}\n{kept}\n{self.checkpoints.advice()}", error.step) from None
        self.state.progress.skipped_steps = self.log.metrics.skipped_steps

    def run_validation_if_due(self) -> None:
        """Validate the epoch that ended with the last iteration, and save with what came out."""
        progress, epochs_done = self.state.progress, self.state.epochs_done
        is_due, progress.validation_due = progress.validation_due and self.validate is not None, False
        if not is_due:
            return
        assert self.validate is not None
        tested, tested_name = self.state.validated_model
        self.processes.broadcast_buffers(tested)
        metrics = self.validate(progress.iteration - 1, tested)
        names = [LAST, epoch_file(epochs_done)]
        if progress.note_validation(metrics, epochs_done):
            names.append(BEST)
        if self.budget is not None:
            self.budget.note_validation(metrics["seconds"])
        self.log.logger.validation(epochs_done - 1, progress.iteration - 1, metrics, tested_name)
        self.save(names)
        self.gradients.model.train()
        self.log.metrics.restart_clock()

    def save_epoch(self) -> None:
        """Write the checkpoint of an epoch's end: before its validation, which may take long."""
        epochs_done = self.state.epochs_done
        is_end = self.state.progress.iteration == self.state.num_iterations
        validates = is_end or self.state.schedule.validates_after(epochs_done)
        self.state.progress.validation_due = self.validate is not None and validates
        self.save([LAST, epoch_file(epochs_done)])

    def checkpoint_is_due(self) -> bool:
        done = self.state.progress.iteration
        return self.checkpoints.is_due(done, may_ask=self.log.is_at_interval(done))

    def save(self, names: list[str]) -> None:
        """Write a checkpoint, with the figures up to here."""
        self.write_log()
        if self.budget is not None:
            ending = self.state.progress.ending
            ending.seconds = self.budget.counted(ending.seconds)
        self.checkpoints.save(self.state, names)
