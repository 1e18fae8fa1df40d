"""One iteration of the largest batch before the first: whether a training fits into memory, and how many images do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from data import DevicePrefetcher, RawBatch, TrainLoader
from detection.engine.accelerate.device_memory import GIB, REMEDIES, DeviceMemory, is_out_of_memory
from detection.engine.distributed.agreement import RunError
from detection.engine.distributed.comm import Processes
from detection.engine.distributed.sync_batch_norm import local_batch_norm
from detection.engine.optim.gradients import GradientComputer
from detection.engine.optim.update import ParameterUpdate
from detection.engine.state.checkpoint_store import copy_to_cpu
from detection.engine.state.train_state import TrainState

MARGIN = 0.1
"""Part of the memory that --batch-size auto leaves: for the library that exchanges gradients, which a trial does
without, and for memory that breaks up into pieces over time."""

BuildStep = Callable[[TrainState, Processes], tuple[GradientComputer, ParameterUpdate]]
"""What computes and applies the gradients of a state, for the processes given."""


@dataclass(frozen=True)
class Taken:
    """What an iteration took of this process's memory, in bytes."""

    capacity: int
    """What the process can have in all."""
    peak: int | None
    """None: it did not fit."""

    @property
    def left(self) -> int:
        return 0 if self.peak is None else self.capacity - self.peak


class MemoryTrial:
    """Tries the largest batch of a training with the training's own code. Every process calls it alike."""

    def __init__(self, processes: Processes, memory: DeviceMemory, build_step: BuildStep, *, passes: int = 1) -> None:
        """
        Args:
            passes: how often gradients are computed before memory is as in the middle of a training.
        """
        self._processes = processes
        self._memory = memory
        self._build_step = build_step
        self._passes = passes

    def run(self, state: TrainState, loader: TrainLoader) -> Taken:
        """A whole iteration: forward, backward, optimizer step, average of the weights.

        It leaves nothing behind: `state` and random numbers are afterwards what they were, bit for bit. No process
        waits for another here, so one that has too little memory leaves none behind.
        """
        before = copy_to_cpu(state.state_dict())
        was_training = state.model.training
        batch = loader.largest_batch(state.schedule.max_epochs)
        capacity = self._memory.begin()
        device = self._processes.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), local_batch_norm(state.model):
            peak = self._memory.peak() if self._fits(state, batch) else None
        for parameter in state.model.parameters():
            parameter.grad = None
        state.model.train(was_training)
        state.model.load_state_dict(before["model"])
        state.optimizer.state.clear()
        state.load_state_dict(before)
        self._memory.give_back()
        return Taken(capacity, peak)

    def fits_with_margin(self, state: TrainState, loader: TrainLoader) -> bool:
        """Whether MARGIN of the memory is left on every process; collective."""
        taken = self.run(state, loader)
        fits = taken.peak is not None and taken.left >= MARGIN * taken.capacity
        return all(self._processes.gather_objects(fits))

    def require_fit(self, state: TrainState, loader: TrainLoader) -> str:
        """A line for people: what the largest batch takes, and what is left, on the process with the least; collective.

        Raises:
            RunError: on every process, where it does not fit on one of them.
        """
        mine = self.run(state, loader)
        everyones = self._processes.gather_objects((mine.capacity, mine.peak))
        taken = [Taken(*one) for one in everyones]
        batch = describe_batch(loader.largest_batch(state.schedule.max_epochs))
        short = [rank for rank, one in enumerate(taken) if one.peak is None]
        if short:
            capacity = min(taken[rank].capacity for rank in short) / GIB
            raise RunError(
                f"out of memory: the largest batch of this training, {batch}, does not fit on process "
                f"{', '.join(map(str, short))}, which can have {capacity:.1f} GiB.\n{REMEDIES}"
            )
        least = min(taken, key=lambda one: one.left)
        return (
            f"memory: the largest batch of this training, {batch}, takes {(least.peak or 0) / GIB:.1f} GiB a process; "
            f"{least.left / GIB:.1f} GiB of {least.capacity / GIB:.1f} are left"
        )

    def _fits(self, state: TrainState, batch: RawBatch) -> bool:
        try:
            alone = replace(self._processes, world_size=1, control_group=None, heartbeat=None)
            # Where there are several, gradients are copied for the exchange.
            several = self._processes.world_size > 1
            exchanged = [torch.empty_like(each) for each in state.model.parameters() if several and each.requires_grad]
            gradients, update = self._build_step(state, alone)
            state.model.train()
            for _ in range(self._passes):
                # As in a training, one batch more is assembled while the device computes the last.
                gradients.compute(DevicePrefetcher(iter([batch] * (gradients.accumulate + 1)), alone.device))
            update.apply(state.progress.iteration)
            del exchanged
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def describe_batch(batch: RawBatch) -> str:
    """The batch's size for people."""
    height, width = batch.padded_size
    return f"{len(batch)} x {height} x {width} pixels with up to {batch.plan.num_box_rows} boxes each"


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 1 to `most` that fits, where any smaller one than one that fits does; None: none does."""
    if not fits(1):
        return None
    best, too_many = 1, most + 1
    while best * 2 < too_many:
        if not fits(best * 2):
            too_many = best * 2
            break
        best *= 2
    while too_many - best > 1:
        middle = (best + too_many) // 2
        if fits(middle):
            best = middle
        else:
            too_many = middle
    return best
