"""Reading checkpoints: verified, and found again even when the newest one is broken."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.engine.state.train_state import Progress, find_fault
from detection.errors import DetectionError
from detection.models import read_archive

FORMAT = "detection-checkpoint"
VERSION = 1
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
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
    """Read one checkpoint, with every checksum verified; nothing in the file is executed, see read_archive.

    Raises:
        CheckpointOutOfReach: the file cannot be read at the moment.
        CheckpointError: missing, truncated, altered, or no checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'no such checkpoint'}")
    try:
        # torch.save writes a zip file; its CRC-32 of every entry is what tells a flipped bit.
        state = read_archive(path, verified=True)
    except Exception as error:  # a damaged file fails in the zip reader or the unpickler, with any error of theirs
        _refuse_to_judge(path, error)
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a training checkpoint of this project (give weights with --weights)")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {state.get('version')}, this program reads version {VERSION}"
        )
    if fault := find_fault(state):
        raise CheckpointError(f"{path}: an incomplete or altered checkpoint: {fault}")
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
    for path in checkpoint_files(directory):
        try:
            candidates.append((place_of(path), int(path.name == LAST), path))
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


def is_of_best(path: Path, progress: Progress) -> bool:
    """Whether a file is the state after the validation that is the best of `progress`."""
    if progress.best_epoch is None or not path.is_file():
        return False
    try:
        state = _glance_at(path)
        end = progress.ending.best_iteration or progress.best_epoch * int(state["iterations_per_epoch"])
        is_its_end = int(state["iteration"]) == end
        best = (progress.best_epoch, progress.best_map, False)
        return is_its_end and (state["best_epoch"], state["best_map"], state["validation_due"]) == best
    except Exception:  # whatever a broken file raises
        return False


def checkpoint_files(directory: Path) -> list[Path]:
    """The files that a run has written there, by name; not what somebody keeps beside them under another name."""
    return sorted(path for path in directory.glob("*.pt") if is_runs_own(path.name) and path.is_file())


def is_runs_own(name: str) -> bool:
    """Whether a run gives this name to its checkpoints."""
    return name in (LAST, PREVIOUS, BEST) or epoch_of(name) is not None


def epoch_of(name: str) -> int | None:
    """The number of epochs that `epoch_file` made this name of; None for any other name."""
    digits = re.fullmatch(r"epoch_([0-9]{4,18})\.pt", name)
    return int(digits[1]) if digits and name == epoch_file(int(digits[1])) else None


def _glance_at(path: Path) -> dict[str, Any]:
    # Only the small pickled part is read here, the tensors when one is chosen.
    state: dict[str, Any] = read_archive(path, with_tensors=False)
    return state


def place_of(path: Path) -> tuple[int, int]:
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
            f"{path}: cannot be read now ({reason}). Try again when it can be; to resume from an "
            "earlier checkpoint instead, give it with --resume FILE, or move this one away."
        ) from error


def epoch_file(epochs_done: int) -> str:
    """Name of the checkpoint at the end of an epoch, counted from 1."""
    return f"epoch_{epochs_done:04d}.pt"
