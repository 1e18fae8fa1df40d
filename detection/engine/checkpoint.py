"""Checkpoints: written whole or not at all, found again even when the newest one is broken."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import time
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from detection.errors import DetectionError

FORMAT = "detection-checkpoint"
VERSION = 1
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
REQUIRED = (
    *("iteration", "iterations_per_epoch", "validation_due", "best_map", "best_epoch"),
    *("model", "ema", "optimizer", "scaler", "model_config", "schedule"),
    *("class_names", "category_ids", "preprocessing", "run", "config"),
)
"""What every checkpoint holds: how far the run is, its weights and states, and what describes the run."""

_WORDS_OF_MEMORY = ("not enough memory", "allocate memory", "unable to mmap")


class CheckpointError(DetectionError):
    """A checkpoint that cannot be read or written. The message names the file and the remedy."""


class CheckpointOutOfReach(CheckpointError):
    """A checkpoint of which nobody can say whether it is intact: disk, network or permissions keep it away."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The content of a checkpoint file, tensors on the CPU."""

    path: Path
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()
    """A line for each newer file that was broken."""


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Read one checkpoint, with every checksum verified; nothing in the file is executed.

    Raises:
        CheckpointError: missing, truncated, altered, or no checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        # torch.save writes a zip file; its CRC-32 of every entry is what tells a flipped bit.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True) if broken is None else None
    except Exception as error:  # a damaged file fails in the zip reader or the unpickler, with any error of theirs
        _refuse_to_judge(path, error)
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
    if broken is not None:
        raise CheckpointError(f"{path}: the checksum of {broken} is wrong, the file was altered")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a training checkpoint of this project (give weights with --weights)")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {state.get('version')}, this program reads version {VERSION}"
        )
    missing = [key for key in REQUIRED if key not in state]
    if missing:
        raise CheckpointError(f"{path}: an incomplete checkpoint, it lacks {', '.join(missing)}")
    return LoadedCheckpoint(path, state)


def newest_checkpoint(directory: Path) -> LoadedCheckpoint | None:
    """The intact checkpoint of `directory` that is furthest on; None where there is no checkpoint file at all.

    Files that are broken are skipped and named in `skipped`.

    Raises:
        CheckpointOutOfReach: a file cannot be read at the moment: it may be the one that is furthest on.
        CheckpointError: there are checkpoint files and every one is broken.
    """
    skipped: list[str] = []
    candidates: list[tuple[tuple[int, int], int, Path]] = []
    for path in _files(directory):
        try:
            candidates.append((_place_of(path), int(path.name == LAST), path))
        except CheckpointOutOfReach:
            raise
        except CheckpointError as error:
            skipped.append(str(error))
    for *_, path in sorted(candidates, reverse=True):
        try:
            loaded = load_checkpoint(path)
        except CheckpointOutOfReach:
            raise
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return LoadedCheckpoint(path, loaded.state, tuple(skipped))
    if skipped:
        raise CheckpointError(
            f"{directory}: no checkpoint is intact:\n  " + "\n  ".join(skipped) + "\nStart anew with --overwrite."
        )
    return None


class Best(NamedTuple):
    """The validation with the highest mAP so far."""

    epoch: int
    """Counted from 1"""
    map: float


@dataclass(frozen=True)
class Continued:
    """What `continue_from` did."""

    aside: Path | None
    """The folder with what was moved; None where there was nothing to move."""
    has_best: bool
    """best.pt is there and has the weights that the run takes for its best so far."""


def continue_from(directory: Path, chosen: LoadedCheckpoint, best: Best | None) -> Continued:
    """Make `chosen` the newest checkpoint of `directory`, so that the next automatic resume cannot miss it.

    Files that are further on (of a future that the run now leaves) or broken are moved into a folder of their own, and
    a best.pt that is not of the validation that the run takes for its best. Such a one is made of that epoch's file.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    here = (int(chosen.state["iteration"]), int(not chosen.state["validation_due"]))
    moved: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in _files(directory):
            try:
                is_foreign = _place_of(path) > here
            except CheckpointError:
                is_foreign = True
            if path.name == BEST and not _is_of(path, best):
                is_foreign = True
            if is_foreign and path.resolve() != chosen.path.resolve():
                moved.append(path)
        aside = _unused(directory / f"set_aside_{time.strftime('%Y%m%d_%H%M%S')}")
        for path in moved:
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
        last = directory / LAST
        if not (last.exists() and last.samefile(chosen.path)):
            _link(chosen.path, last)
        target, source = directory / BEST, chosen.path.parent
        if best is not None and not target.exists():
            name = epoch_file(best.epoch)
            for path in (source / name, source / BEST, directory / name):
                if _is_of(path, best):
                    _link(path, target)
                    break
        _sync_folder(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: checkpoints cannot be written there: {error}") from error
    return Continued(aside if moved else None, target.exists())


def _is_of(path: Path, best: Best | None) -> bool:
    """Whether a file is the state after the validation that was the best."""
    if best is None or not path.is_file():
        return False
    try:
        state = _glance_at(path)
        done = int(state["iteration"]) == best.epoch * int(state["iterations_per_epoch"])
        return done and (state["best_epoch"], state["best_map"]) == best and not state["validation_due"]
    except Exception:  # whatever a broken file raises
        return False


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.pt") if path.is_file())


def _glance_at(path: Path) -> dict[str, Any]:
    # mmap: only the small pickled part is read here, the tensors when one is chosen.
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def _place_of(path: Path) -> tuple[int, int]:
    """How far a checkpoint is: iterations done, and whether nothing is left to be validated."""
    try:
        state = _glance_at(path)
        return int(state["iteration"]), int(not state["validation_due"])
    except Exception as error:  # whatever a broken file raises
        _refuse_to_judge(path, error)
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error


def _refuse_to_judge(path: Path, error: Exception) -> None:
    """Raises CheckpointOutOfReach where it was not the file's content that failed."""
    # Readers of a damaged file seek to places that cannot be: EINVAL.
    is_systems = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
    # torch has no type of its own for it on the CPU.
    wants_memory = isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS_OF_MEMORY)
    if is_systems or wants_memory or isinstance(error, MemoryError):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointOutOfReach(
            f"{path}: cannot be read now ({reason}). Try again when it can be; to go on from an "
            "earlier checkpoint instead, give it with --resume FILE, or move this one away."
        ) from error


def _unused(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


class CheckpointStore:
    """The checkpoints folder of a run.

    last.pt is the newest, previous.pt the one before it, best.pt the one with the highest mAP, epoch_NNNN.pt the
    ends of epochs, of which the newest `keep` stay. A file appears under its name only when it is complete and on
    the disk. Writing happens in a thread of its own, one file at a time.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
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
        self._start([*owed, (_copy_to_cpu(state), names)])
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
            _sync_folder(self.directory.parent)
        temporary = self.directory / ".writing"
        # What a killed run left: it may be another name of last.pt, which must not be written into, and takes room.
        for left in (temporary, *self.directory.glob(".*.new")):
            left.unlink(missing_ok=True)
        try:
            with temporary.open("wb") as stream:
                _save({"format": FORMAT, "version": VERSION, **state}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            last = self.directory / LAST
            if LAST in names and last.exists():
                _link(last, self.directory / PREVIOUS)
            # A kill between two names: a resume goes on from the furthest file, whatever its name, and takes best.pt as
            # it is.
            for name in sorted(names, key=lambda name: (name != BEST, name == LAST)):
                _link(temporary, self.directory / name)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(self.directory)
        for old in _epoch_files(self.directory)[: -self.keep]:
            old.unlink(missing_ok=True)


def epoch_file(epochs_done: int) -> str:
    """Name of the checkpoint at the end of an epoch, counted from 1."""
    return f"epoch_{epochs_done:04d}.pt"


def _epoch_files(directory: Path) -> list[Path]:
    """The ends of epochs, the oldest first; not what somebody has put beside them under a name of his own."""
    numbered = ((re.fullmatch(r"epoch_(\d+)\.pt", path.name), path) for path in directory.iterdir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


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


def _sync_folder(folder: Path) -> None:
    # The names themselves must reach the disk too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_to_cpu(item) for item in value)
    return value
