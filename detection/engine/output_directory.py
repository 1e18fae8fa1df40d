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
                aside = self.path.with_name(f"{self.path.name}.before_{time.strftime('%Y%m%d_%H%M%S')}")
                self.release()
                self.path.rename(aside)
                self.path.mkdir()
                self._take_lock()
                moved = f"the run that was in {self.path} is now in {aside}"
        except OSError as error:
            raise OutputDirectoryError(f"{self.path}: cannot be used as output directory: {error}") from error
        if self.holds_a_run and not resume:
            raise OutputDirectoryError(
                f"{self.path} already holds a run. Go on with it: --resume. Start anew, the old one moved aside: "
                "--overwrite. Or give another --output-dir."
            )
        return moved

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            raise OutputDirectoryError(
                f"{self.path}: another run is writing here (process {owner or 'unknown'}). "
                "Wait for it, or give another --output-dir."
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}")
        lock.flush()
        self._lock = lock


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=True) + "\n")
    temporary.replace(path)
