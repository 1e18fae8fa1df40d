"""The output directory of a run: one run in it, one process group at work on it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any


class OutputDirectoryError(ValueError):
    """The output directory belongs to another run, or cannot be written."""


class OutputDirectory:
    """Paths of a run's files, and the lock that keeps a second run out while this one works."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.log = path / "train.log"
        self.config = path / "config.json"
        self._lock: IO[str] | None = None

    def detections(self, split: str) -> Path:
        return self.path / f"detections_{split}.json"

    @property
    def holds_a_run(self) -> bool:
        """Something was trained here: iterations were logged, or a checkpoint was written."""
        return any(self.checkpoints.glob("*.pt")) or (self.metrics.is_file() and self.metrics.stat().st_size > 0)

    def claim(self, *, overwrite: bool, resume: bool) -> str | None:
        """Make the folder and lock it for this process; main process only.

        Args:
            overwrite: an earlier run in the folder is moved aside, into a folder beside it.
            resume: an earlier run in the folder is gone on with.

        Returns:
            A line saying where an earlier run was moved to; None where there was none.

        Raises:
            OutputDirectoryError: another process works in the folder, it holds a run and neither is asked for, or it
                cannot be made.
        """
        moved = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self.holds_a_run and overwrite:
                moved = f"the run that was in {self.path} is now in {self._move_aside()}"
        except OSError as error:
            raise OutputDirectoryError(f"{self.path}: cannot be used as output directory: {error}") from error
        self.check(overwrite=overwrite, resume=resume)
        return moved

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Raises OutputDirectoryError where the folder holds a run and is to be neither gone on with nor moved."""
        if self.holds_a_run and not (resume or overwrite):
            raise OutputDirectoryError(
                f"{self.path} already holds a run. Go on with it: --resume. Start anew, the old one moved aside: "
                "--overwrite. Or give another --output-dir."
            )

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _move_aside(self) -> Path:
        name = f"{self.path.name}.before_{time.strftime('%Y%m%d_%H%M%S')}"
        aside = self.path.with_name(name)
        number = 1
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{name}_{number}")
        # The old folder's lock is held until the new one's is, so that nobody slips in between.
        old_lock = self._lock
        self.path.rename(aside)
        self.path.mkdir()
        self._take_lock()
        if old_lock is not None:
            old_lock.close()
        return aside

    def _take_lock(self) -> None:
        while True:
            lock = (self.path / ".lock").open("a+")
            try:
                # A record lock, not flock: loader processes, which outlive a killed run for a few seconds, do not
                # inherit it.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                lock.seek(0)
                owner = lock.read().strip()
                lock.close()
                raise OutputDirectoryError(
                    f"{self.path}: another run is writing here (process {owner or 'unknown'}). "
                    "Wait for it, or give another --output-dir."
                ) from error
            if self._is_ours(lock):
                break
            lock.close()
        lock.truncate(0)
        lock.write(f"{os.getpid()}")
        lock.flush()
        self._lock = lock

    def _is_ours(self, lock: IO[str]) -> bool:
        # Another run may have moved the folder aside between the opening and the locking.
        try:
            return os.path.samestat(os.fstat(lock.fileno()), (self.path / ".lock").stat())
        except FileNotFoundError:
            return False


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=True) + "\n")
    temporary.replace(path)
