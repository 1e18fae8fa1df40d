"""Writing checkpoints: whole or not at all, in a thread beside the training."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from detection.engine.distributed.comm import Processes
from detection.engine.metrics.logger import MetricLogger
from detection.engine.state.best_weights import write_best_weights
from detection.engine.state.checkpoint import (
    BEST,
    FORMAT,
    LAST,
    PREVIOUS,
    VERSION,
    CheckpointError,
    LoadedCheckpoint,
    checkpoint_files,
    epoch_file,
    epoch_of,
    is_of_best,
    is_runs_own,
    place_of,
)
from detection.engine.state.run_dir import unused_path
from detection.engine.state.train_state import Progress, TrainState
from detection.reporting import sync_folder


class CheckpointStore:
    """The checkpoints folder of a run.

    last.pt is the newest, previous.pt the one before it, best.pt the one with the highest mAP, epoch_NNNN.pt the
    ends of epochs, of which the newest `keep` stay. Files with other names are left alone. A file appears under its
    name only when it is complete and on the disk. Writing happens in a thread of its own, one file at a time.
    """

    def __init__(self, directory: Path, keep: int, best_weights: Path | None = None) -> None:
        """best_weights: a file that gets the weights of best.pt alone."""
        self.directory = directory
        self.best_weights = best_weights
        self.keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._unwritten: list[tuple[dict[str, Any], list[str]]] = []

    def save(self, state: dict[str, Any], names: list[str]) -> str | None:
        """Copy `state` (tensors and plain types) and start writing it under `names`.

        Returns:
            What went wrong with the save before this one; None if nothing did.
        """
        problem = self.wait()
        # Of what could not be written only the best weights are still wanted; this state is newer than the rest.
        owed = [(snapshot, [BEST]) for snapshot, missed in self._unwritten if BEST in missed and BEST not in names]
        self._start([*owed, (copy_to_cpu(state), names)])
        return problem

    def wait(self) -> str | None:
        """Wait for the write that is under way; what went wrong with it, None if nothing did."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        error = pending.exception()
        if error is None:
            self._unwritten = []
            return None
        if isinstance(error, (OSError, RuntimeError)):
            return f"checkpoint not written into {self.directory}: {error}"
        raise error

    def close(self) -> str | None:
        """Wait for the last write, and try it once more if it failed; what went wrong then."""
        try:
            problem = self.wait()
            if problem is not None:
                self._start(self._unwritten)
                problem = self.wait()
            return problem
        finally:
            self._writer.shutdown()

    def _start(self, files: list[tuple[dict[str, Any], list[str]]]) -> None:
        self._unwritten = files
        self._pending = self._writer.submit(self._write_all, files)

    def _write_all(self, files: list[tuple[dict[str, Any], list[str]]]) -> None:
        for snapshot, names in files:
            self._write(snapshot, names)

    def _write(self, state: dict[str, Any], names: list[str]) -> None:
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync_folder(self.directory.parent)
        temporary = self.directory / ".writing"
        # What a killed run left: it may be another name of last.pt, which must not be written into, and takes room.
        staged = [path for path in self.directory.glob(".*.new") if is_runs_own(path.name[1 : -len(".new")])]
        for left in (temporary, *staged):
            left.unlink(missing_ok=True)
        try:
            with temporary.open("wb") as stream:
                _save({"format": FORMAT, "version": VERSION, **state}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            last = self.directory / LAST
            if LAST in names and last.exists():
                _link(last, self.directory / PREVIOUS)
            # After a kill between two names a resume takes the furthest file, whatever its name, and keeps best.pt.
            for name in sorted(names, key=lambda name: (name != BEST, name == LAST)):
                _link(temporary, self.directory / name)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self.directory)
        if BEST in names and self.best_weights is not None:
            write_best_weights(self.best_weights, state)
        for old in _epoch_files(self.directory)[: -self.keep]:
            old.unlink(missing_ok=True)


class Checkpointer:
    """Saves a training's state at the ends of epochs, and inside an epoch where minutes or iterations ask for it."""

    def __init__(
        self,
        store: CheckpointStore,
        processes: Processes,
        metric_logger: MetricLogger,
        *,
        minutes: float | None = None,
        iterations: int | None = None,
    ) -> None:
        self._store = store
        self._processes = processes
        self._logger = metric_logger
        self._minutes = minutes
        self._iterations = iterations
        self._last_save = time.monotonic()
        self.saved_iteration: int | None = None
        """Iterations done in the newest checkpoint; None where there is none."""

    def is_due(self, iteration: int, *, may_ask: bool) -> bool:
        """Whether an iteration inside an epoch ends with a checkpoint; the same on every process, which `may_ask` each
        other by the clock in the same iterations."""
        if self._iterations is not None and iteration % self._iterations == 0:
            return True
        if self._minutes is None or not may_ask:
            return False
        return bool(self._processes.broadcast(time.monotonic() - self._last_save >= self._minutes * 60))

    def save(self, state: TrainState, names: list[str]) -> None:
        """Write a checkpoint on the main process; what goes wrong is reported, and the run continues."""
        self._last_save = time.monotonic()
        self.saved_iteration = state.progress.iteration
        if not self._processes.is_main:
            return
        self._logger.flush()
        problem = self._store.save(state.state_dict(), names)
        if problem is not None:
            self._logger.warn(f"{problem}\nThe run continues, and tries again at the next checkpoint.")

    def advice(self) -> str:
        """What to do about a training that is no longer finite."""
        if self.saved_iteration is None:
            kept, again = "No checkpoint was written yet.", "then start anew with --overwrite"
        else:
            kept = f"{self._store.directory / LAST} is from before it (after {self.saved_iteration} iterations)."
            again = "then resume with --resume"
        return (
            f"{kept} Lower --lr (or give --auto-scale-lr: the schedule's learning rate is meant for its own batch "
            "size), add --clip-grad 35, or use --amp bf16 instead of fp16; where single images do it, "
            f"--skip-nonfinite leaves out such steps; {again}."
        )


@dataclass(frozen=True)
class Continued:
    """What `continue_from` did."""

    aside: Path | None
    """The folder with what was moved; None where there was nothing to move."""
    has_best: bool
    """best.pt is there, with the weights of the best validation so far."""


def continue_from(directory: Path, chosen: LoadedCheckpoint, progress: Progress) -> Continued:
    """Make `chosen` the newest checkpoint of `directory`, so that the next automatic resume cannot miss it.

    Files that are further on (of a future that the run now leaves) or broken are moved into a folder of their own, and
    a best.pt that is not of the best validation of `progress`. The right one is linked from that epoch's file.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    here = (int(chosen.state["iteration"]), int(not chosen.state["validation_due"]))
    moved: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in checkpoint_files(directory):
            try:
                is_foreign = place_of(path) > here
            except CheckpointError:
                is_foreign = True
            if path.name == BEST and not is_of_best(path, progress):
                is_foreign = True
            if is_foreign and path.resolve() != chosen.path.resolve():
                moved.append(path)
        aside = unused_path(directory / f"set_aside_{time.strftime('%Y%m%d_%H%M%S')}")
        for path in moved:
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
        last = directory / LAST
        if not (last.exists() and last.samefile(chosen.path)):
            _link(chosen.path, last)
        target, source = directory / BEST, chosen.path.parent
        if progress.best_epoch is not None and not target.exists():
            name = epoch_file(progress.best_epoch)
            for path in (source / name, source / BEST, directory / name):
                if is_of_best(path, progress):
                    _link(path, target)
                    break
        sync_folder(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: checkpoints cannot be written there: {error}") from error
    return Continued(aside if moved else None, target.exists())


def _epoch_files(directory: Path) -> list[Path]:
    """The ends of epochs, the oldest first."""
    numbered = ((epoch_of(path.name), path) for path in checkpoint_files(directory))
    return [path for _, path in sorted((epoch, path) for epoch, path in numbered if epoch is not None)]


def _save(state: dict[str, Any], stream: BinaryIO) -> None:
    """torch.save, with the file system's own error where writing fails, which torch replaces by one of its own."""
    errors: list[OSError] = []

    class Stream:
        def write(self, data: Any) -> int:
            try:
                return stream.write(data)
            except OSError as error:
                errors.append(error)
                raise

        def flush(self) -> None:
            stream.flush()

    try:
        torch.save(state, Stream())  # type: ignore[arg-type]
    except RuntimeError:
        if errors:
            raise errors[0] from None
        raise


def _link(source: Path, target: Path) -> None:
    """`target` becomes another name of `source`, at once and whole."""
    staging = target.with_name(f".{target.name}.new")
    staging.unlink(missing_ok=True)
    try:
        os.link(source, staging)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, staging)
        with staging.open("rb") as stream:
            os.fsync(stream.fileno())
    staging.replace(target)
    staging.unlink(missing_ok=True)  # renaming one name of a file to another name of it does nothing


def copy_to_cpu(value: Any) -> Any:
    """`value` (tensors, plain types, and dictionaries, lists and tuples of them) with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_cpu(item) for item in value)
    return value
