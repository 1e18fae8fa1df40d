"""The training loop: epochs of iterations, a checkpoint and a validation where the schedule says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from data import DevicePrefetcher, TrainLoader, UnreadableImage
from detection.engine.accelerate.cuda_graphs import StepGraphs
from detection.engine.checkpoint import BEST, LAST, CheckpointStore, epoch_file
from detection.engine.distributed.comm import Processes, without_gradient_exchange
from detection.engine.inputs.bad_images import BadImages
from detection.engine.inputs.data_stall import DataAdvice, DataStallWatch
from detection.engine.metrics.logger import MetricLogger
from detection.engine.metrics.step_metrics import NonFiniteLoss, StepMetrics
from detection.engine.optim.amp import Precision, gradient_norm
from detection.engine.optim.ema import AveragedModel
from detection.engine.optim.flat_gradients import FlatGradients
from detection.engine.optim.nonfinite import NonFiniteGuard
from detection.engine.optim.optimizer import optimizer_state, set_learning_rate, trained_parameters
from detection.engine.signals import StopRequest
from detection.models import ImageBatch, TargetBatch
from schedules import Schedule


class Stopped(Exception):
    """The run was asked to stop; its state is in last.pt."""


@dataclass
class Progress:
    """How far a run is. All of it is in every checkpoint."""

    iteration: int = 0
    """Iterations done; the next one's index."""
    validation_due: bool = False
    """The epoch that just ended has not been validated yet."""
    best_map: float | None = None
    best_epoch: int | None = None
    """Both None until a validation gave an mAP."""
    skipped_steps: int = 0
    """Iterations that made no step because they were not finite."""


@dataclass(frozen=True)
class SavePlan:
    """When checkpoints are written besides the ends of epochs."""

    minutes: float | None = None
    iterations: int | None = None


class Trainer:
    """Trains to the schedule's last epoch, from any iteration.

    An iteration is one optimizer step: `accumulate` micro-steps of one batch each on every process.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        loader: TrainLoader,
        accumulate: int,
        precision: Precision,
        ema: AveragedModel | None,
        processes: Processes,
        metric_logger: MetricLogger,
        store: CheckpointStore,
        stop: StopRequest,
        log_interval: int,
        save_plan: SavePlan,
        bad_images: BadImages,
        skip_nonfinite: bool,
        validate: Callable[[int, nn.Module], dict[str, Any]] | None,
        extra_state: dict[str, Any],
        graphs: StepGraphs | None = None,
    ) -> None:
        """
        Args:
            model: the detector, wrapped for the run's processes; with `graphs` the detector itself.
            skip_nonfinite: an iteration that is not finite makes no step, instead of ending the run.
            validate: (iteration, model) -> metrics; collective. None: the run has no validation set.
            extra_state: what describes the run and goes into every checkpoint as it is.
            graphs: what records and replays the forward and backward passes.
        """
        self.model = model
        self.detector: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.optimizer = optimizer
        self.parameters = trained_parameters(optimizer)
        self.schedule = schedule
        self.loader = loader
        self.accumulate = accumulate
        self.precision = precision
        self.ema = ema
        self.processes = processes
        self.metric_logger = metric_logger
        self.store = store
        self.stop = stop
        self.log_interval = log_interval
        self.save_plan = save_plan
        self.bad_images = bad_images
        self.guard = NonFiniteGuard(self.detector) if skip_nonfinite else None
        self.validate = validate
        self.extra_state = extra_state
        self.graphs = graphs
        self.gradients = FlatGradients(self.parameters) if graphs is not None else None
        self.iterations_per_epoch = loader.iterations_per_epoch
        self.num_iterations = schedule.max_epochs * self.iterations_per_epoch
        self.records = StepMetrics(
            processes,
            images_per_iteration=loader.global_batch_size,
            gradient_may_overflow=precision.amp == "fp16",
            skips_nonfinite=skip_nonfinite,
        )
        self.data_stall: DataStallWatch | None = None
        self._told_of_graphs = False
        self._saved_iteration: int | None = None
        self._last_save = time.monotonic()

    def run(self, progress: Progress) -> None:
        """Train from `progress` to the end.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            NonFiniteLoss: see StepMetrics.
            TooManyBadImages: see BadImages.
        """
        self.records.skipped_steps = progress.skipped_steps
        self._saved_iteration = progress.iteration or None
        batches = DevicePrefetcher(self.loader.batches(progress.iteration, self.num_iterations), self.processes.device)
        self.records.take_idle_seconds = batches.take_idle_seconds
        self.data_stall = DataStallWatch(
            self.loader.global_batch_size,
            lambda: DataAdvice.of(self.loader, self.processes).text(batches.load_times),
        )
        if progress.validation_due and self.validate is not None:
            self.run_validation(progress)
        progress.validation_due = False
        self.model.train()
        self.records.restart_clock()
        with self.metric_logger.training_bar(self.num_iterations, progress.iteration):
            while progress.iteration < self.num_iterations:
                stop_wanted = self.processes.all_reduce_max_async(int(self.stop.requested))
                self.train_iteration(progress.iteration, batches)
                progress.iteration += 1
                self.read_records(progress)
                stopping = stop_wanted.result() == 1
                if progress.iteration % self.iterations_per_epoch == 0:
                    self.save_epoch(progress)
                elif self.save_is_due(progress) or stopping:
                    self.save(progress, [LAST])
                if stopping:
                    raise Stopped(f"with {progress.iteration} of {self.num_iterations} iterations done")
                if progress.validation_due:
                    self.run_validation(progress)
                    self.model.train()
                    self.records.restart_clock()

    def train_iteration(self, iteration: int, batches: DevicePrefetcher) -> None:
        """One optimizer step."""
        self.processes.at(f"in iteration {iteration}")
        learning_rate = set_learning_rate(self.optimizer, self.schedule, iteration, self.iterations_per_epoch)
        if self.gradients is not None:
            self.gradients.zero()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        image_ids: list[int] = []
        unreadable: list[UnreadableImage] = []
        data_seconds = 0.0
        if self.guard is not None:
            self.guard.begin()
        for micro_step in range(self.accumulate):
            batch = next(batches)
            data_seconds += batches.data_seconds
            images = ImageBatch(batch.pixels, batch.sizes)
            targets = TargetBatch(batch.boxes_xyxy, batch.labels, batch.valid, batch.sample_keys)
            if micro_step < self.accumulate - 1:
                with without_gradient_exchange(self.model):
                    losses = self.forward_backward(images, targets)
            else:
                with self.processes.waiting("the gradients of every process"):
                    losses = self.forward_backward(images, targets)
            total = {name: total[name] + value for name, value in losses.items()} if total else losses
            image_ids += batch.image_ids.tolist()
            unreadable += batch.unreadable
            # While the device is at work; a validation may come between this batch and the next iteration's.
            batches.prepare()
        if self.gradients is not None:
            self.gradients.average(self.processes)
        self.precision.unscale(self.optimizer)
        clip = self.schedule.clip_grad
        grad_norm = gradient_norm(
            self.parameters, norm_type=clip.norm_type if clip else 2.0, clip_to=clip.max_norm if clip else None
        )
        skip = self.guard.finish(grad_norm) if self.guard is not None else None
        self.precision.step(self.optimizer, skip)
        if self.ema is not None:
            self.ema.update(self.detector, iteration, skip)
        self.records.add(
            total,
            grad_norm,
            image_ids,
            unreadable,
            epoch=iteration // self.iterations_per_epoch,
            iteration=iteration,
            lr=learning_rate,
            data_seconds=data_seconds,
        )

    def forward_backward(self, images: ImageBatch, targets: TargetBatch) -> dict[str, Tensor]:
        """Gradients of one micro-step; its share of the iteration's losses, detached."""
        if self.graphs is None:
            return self.plain_forward_backward(images, targets)
        return self.graphs.run(self.plain_forward_backward, images, targets)

    def plain_forward_backward(self, images: ImageBatch, targets: TargetBatch) -> dict[str, Tensor]:
        with self.precision.autocast():
            losses = self.model(images, targets)
        shares = {name: value / self.accumulate for name, value in losses.items()}
        total = torch.stack(list(shares.values())).sum()
        self.precision.backward(total if self.guard is None else self.guard.carry(total))
        return {name: value.detach() for name, value in shares.items()}

    def read_records(self, progress: Progress) -> None:
        """Fetch and write what is due to be read after the iteration just done."""
        done = progress.iteration
        at_interval = done == 1 or done % self.log_interval == 0 or done % self.iterations_per_epoch == 0
        if at_interval:
            self.write_records(progress)

    def write_records(self, progress: Progress) -> None:
        """Fetch and write the records since the last time; what is wrong with them ends the run on every process."""
        try:
            records = self.records.read()
        except NonFiniteLoss as error:
            self.metric_logger.train(error.records)
            raise NonFiniteLoss(f"{error}\n{self.advice()}") from None
        self.metric_logger.train(records)
        for line in self.records.warnings if self.processes.is_main else ():
            self.metric_logger.warn(line)
        waited = self.data_stall.note(records) if self.data_stall is not None else None
        if waited is not None and self.processes.is_main:
            self.metric_logger.warn(waited)
        if self.graphs is not None and self.graphs.problem is not None and not self._told_of_graphs:
            self._told_of_graphs = True
            self.metric_logger.warn(
                f"CUDA graphs cannot be recorded here, the run goes on without: {self.graphs.problem}"
            )
        progress.skipped_steps = self.records.skipped_steps
        if any("replaced_images" in record for record in records):
            self.bad_images.agree("train", self.records.unreadable)

    def advice(self) -> str:
        """What to do about a training that is no longer finite."""
        if self._saved_iteration is None:
            kept, again = "No checkpoint was written yet.", "then start anew with --overwrite"
        else:
            kept = f"{self.store.directory / LAST} is from before it (after {self._saved_iteration} iterations)."
            again = "then go on with --resume"
        return (
            f"{kept} Lower --lr (or give --auto-scale-lr: the schedule's learning rate is meant for its own batch "
            "size), add --clip-grad 35, or use --amp bf16 instead of fp16; where single images do it, "
            f"--skip-nonfinite leaves out such steps; {again}."
        )

    def save_epoch(self, progress: Progress) -> None:
        """Write the checkpoint of an epoch's end. Before its validation, which may take long."""
        epochs_done = progress.iteration // self.iterations_per_epoch
        progress.validation_due = self.validate is not None and self.schedule.validates_after(epochs_done)
        self.save(progress, [LAST, epoch_file(epochs_done)])

    def run_validation(self, progress: Progress) -> None:
        """Validate the epoch that ended with the last iteration, and save with what came out."""
        assert self.validate is not None
        epochs_done = progress.iteration // self.iterations_per_epoch
        tested, tested_name = (
            (self.ema.module, "averaged weights") if self.ema is not None else (self.detector, "weights")
        )
        self.processes.broadcast_buffers(tested)
        metrics = self.validate(progress.iteration - 1, tested)
        names = [LAST, epoch_file(epochs_done)]
        is_best = metrics["mAP"] >= 0 and (progress.best_map is None or metrics["mAP"] > progress.best_map)
        if is_best:
            progress.best_map, progress.best_epoch = metrics["mAP"], epochs_done
            names.append(BEST)
        progress.validation_due = False
        self.metric_logger.validation(epochs_done - 1, progress.iteration - 1, metrics, tested_name)
        self.save(progress, names)

    def save_is_due(self, progress: Progress) -> bool:
        """Whether an iteration inside an epoch ends with a checkpoint; the same on every process."""
        plan = self.save_plan
        if plan.iterations is not None and progress.iteration % plan.iterations == 0:
            return True
        if plan.minutes is None:
            return False
        due = time.monotonic() - self._last_save >= plan.minutes * 60
        return bool(self.processes.broadcast(due)) if progress.iteration % self.log_interval == 0 else False

    def save(self, progress: Progress, names: list[str]) -> None:
        """Write a checkpoint; what goes wrong is reported, and the run goes on."""
        self.write_records(progress)
        self._last_save = time.monotonic()
        self._saved_iteration = progress.iteration
        if not self.processes.is_main:
            return
        self.metric_logger.flush()
        problem = self.store.save(self.state(progress), names)
        if problem is not None:
            self.metric_logger.warn(f"{problem}\nThe run goes on, and tries again at the next checkpoint.")

    def state(self, progress: Progress) -> dict[str, Any]:
        """Everything that must survive: tensors and plain types."""
        return {
            "iteration": progress.iteration,
            "validation_due": progress.validation_due,
            "best_map": progress.best_map,
            "best_epoch": progress.best_epoch,
            "skipped_steps": progress.skipped_steps,
            "iterations_per_epoch": self.iterations_per_epoch,
            "model": self.detector.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": optimizer_state(self.optimizer, self.detector),
            "scaler": self.precision.state_dict(),
            "schedule": self.schedule.to_dict(),
            **self.extra_state,
        }
