"""The output directory of a run: one run in it, one process group at work on it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from detection.errors import DetectionError
from detection.reporting import check_writable, write_whole


class RunDirError(DetectionError):
    """The output directory belongs to another run, or cannot be written."""


class RunDir:
    """Paths of a run's files, and the lock that keeps a second run out while this one works."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.log = path / "train.log"
        self.config = path / "config.json"
        self._begun_by = path / ".begun_by"
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
            resume: an earlier run in the folder is continued.

        Returns:
            A line saying where an earlier run was moved to; None where there was none.

        Raises:
            RunDirError: another process works in the folder, it holds a run and neither is asked for, or it
                cannot be made.
        """
        moved = None
        self.lock()
        if self.holds_a_run and overwrite:
            with self._must_be_usable():
                moved = f"the run that was in {self.path} is now in {self._move_aside()}"
        self.check(overwrite=overwrite, resume=resume)
        return moved

    def was_begun_by_this_torchrun(self) -> bool:
        """Whether the run in the folder is of an earlier start of this process by the torchrun that starts it again."""
        try:
            return self._begun_by.read_text() == _launcher()
        except OSError:
            return False

    def mark_as_begun(self) -> None:
        """Note which torchrun's run this is, once its first checkpoint, if it resumes from one, is in the folder."""
        self._begun_by.write_text(_launcher() or "")

    def lock(self) -> None:
        """Make the folder and keep others out, for as long as this process works in it; main process only.

        Raises:
            RunDirError: another process works in the folder, or it cannot be made.
        """
        with self._must_be_usable():
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()

    def check_usable(self) -> None:
        """Raises RunDirError where the folder cannot be written, or not be made; leaves nothing behind."""
        with self._must_be_usable():
            check_writable(self.path)

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Raises RunDirError where the folder holds a run that is to be neither resumed nor moved."""
        if self.holds_a_run and not (resume or overwrite):
            raise RunDirError(
                f"{self.path} already holds a run. Continue it: --resume. Start anew, the old one moved aside: "
                "--overwrite. Or give another --output-dir."
            )

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def _must_be_usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirError(f"{self.path}: cannot be used as output directory: {error}") from error

    def _move_aside(self) -> Path:
        # Of a link the folder that it means is moved, and the link stays.
        path = self.path.resolve()
        if Path.cwd().is_relative_to(path):
            raise RunDirError(
                f"{self.path} is the folder that this program works in, which --overwrite would move aside: start it "
                "from another one, or give another --output-dir"
            )
        aside = unused_path(path.with_name(f"{path.name}.before_{time.strftime('%Y%m%d_%H%M%S')}"))
        # The old folder's lock is held until the new one's is, so that nobody slips in between.
        old_lock = self._lock
        path.rename(aside)
        path.mkdir()
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
                raise RunDirError(
                    f"{self.path}: another run is writing here (process {owner or 'unknown'}). "
                    "Wait for it, or give another --output-dir (an evaluation beside a training: --resume FILE, too)."
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


def _launcher() -> str | None:
    """The torchrun that has started this process, which is the same after a restart; None without one, or where the
    system does not tell.

    Its number and run id may come again: in a container torchrun is process 1. The moment of its start does not.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        # Fields of /proc/PID/stat after the name, which may have anything in it: the 22nd of all is the start.
        start = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"process {os.getppid()} on {platform.node()}, begun {start} after the start {boot}"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=1, allow_nan=True) + "\n").encode())


def unused_path(path: Path) -> Path:
    """`path`, or the same with _2, _3, ... behind it: the first that does not exist."""
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())
