"""The output directory of a run: one run in it, one process group at work on it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from detection.errors import DetectionError
from detection.reporting import check_writable, write_whole

LEASE_SECONDS = 120.0
"""How long a run waits for the lock of a process on another machine, which may be dead."""
_POLL_SECONDS = 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


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
        self.nonfinite = path / "nonfinite"
        self._begun_by = path / ".begun_by"
        self._lock: IO[str] | None = None

    def detections(self, split: str) -> Path:
        return self.path / f"detections_{split}.json"

    def tracker(self, name: str) -> Path:
        """The file that holds what a tracker calls the run."""
        return self.path / f"tracker_{name}.txt"

    @property
    def holds_a_run(self) -> bool:
        """Something was trained here: iterations were logged, or a checkpoint was written."""
        return any(self.checkpoints.glob("*.pt")) or (self.metrics.is_file() and self.metrics.stat().st_size > 0)

    def claim(self, *, overwrite: bool, resume: bool) -> list[str]:
        """Make the folder and lock it for this process; main process only.

        Args:
            overwrite: an earlier run in the folder is moved aside, into a folder beside it.
            resume: an earlier run in the folder is continued.

        Returns:
            Remarks for the start of the run: where an earlier one was moved to, and those of `lock`.

        Raises:
            RunDirError: another process works in the folder, it holds a run and neither is asked for, or it
                cannot be made.
        """
        remarks = self.lock()
        if self.holds_a_run and overwrite:
            with self._must_be_usable():
                remarks.append(f"the run that was in {self.path} is now in {self._move_aside()}")
        self.check(overwrite=overwrite, resume=resume)
        return remarks

    def was_begun_by_torchrun(self, nodes: Iterable[str]) -> bool:
        """Whether the run in the folder is of an earlier start by the torchrun that starts it again now.

        nodes: the machines of all processes, with their torchruns (Processes.nodes). Machines may have left since, and
        others have joined: one that stayed is enough, whichever has process 0 now.
        """
        try:
            begun_by = self._begun_by.read_text().splitlines()
        except OSError:
            return False
        return "TORCHELASTIC_RUN_ID" in os.environ and not set(nodes).isdisjoint(begun_by)

    def mark_as_begun(self, nodes: Iterable[str]) -> None:
        """Note which torchruns' run this is, once its first checkpoint, if it resumes from one, is in the folder."""
        self._begun_by.write_text("\n".join(dict.fromkeys(nodes)))

    def lock(self) -> list[str]:
        """Make the folder and keep others out, for as long as this process works in it; main process only.

        Returns:
            A warning where the file system has no locks.

        Raises:
            RunDirError: another process works in the folder, or it cannot be made.
        """
        with self._must_be_usable():
            self.path.mkdir(parents=True, exist_ok=True)
            return self._take_lock()

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

    def _take_lock(self) -> list[str]:
        begun, remarks = time.monotonic(), []
        for attempt in itertools.count():
            lock = (self.path / ".lock").open("a+")
            try:
                # A record lock, not flock: loader processes, which outlive a killed run for a few seconds, do not
                # inherit it.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                lock.seek(0)
                owner = lock.read().strip() or "an unknown process"
                lock.close()
                # A machine that died keeps its locks on a network's file system for a while: 90 seconds over NFS 4.
                is_here = owner.endswith(f" on {platform.node()}")
                if is_here or time.monotonic() - begun > LEASE_SECONDS:
                    raise RunDirError(
                        f"{self.path}: another run is writing here ({owner}; lock: {lock.name}). "
                        "Wait for it, or give another --output-dir (an evaluation beside a training: --resume FILE, "
                        "too)."
                    ) from error
                if attempt == 0:
                    waiting = f"waiting, {LEASE_SECONDS / 60:g} minutes at most"
                    print(f"{self.path}: {owner} holds the lock {lock.name}; {waiting}", file=sys.stderr)
                time.sleep(_POLL_SECONDS)
                continue
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                reason = os.strerror(error.errno)
                remarks = [
                    f"warning: {self.path}: the file system has no locks ({reason}): nothing keeps a second run out of "
                    "this folder"
                ]
            if self._is_ours(lock):
                break
            lock.close()
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        os.fsync(lock.fileno())  # so that another machine reads it
        self._lock = lock
        return remarks

    def _is_ours(self, lock: IO[str]) -> bool:
        # Another run may have moved the folder aside between the opening and the locking.
        try:
            return os.path.samestat(os.fstat(lock.fileno()), (self.path / ".lock").stat())
        except FileNotFoundError:
            return False


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_whole(path, (json.dumps(value, indent=1, allow_nan=True) + "\n").encode())


def unused_path(path: Path) -> Path:
    """`path`, or the same with _2, _3, ... behind it: the first that does not exist."""
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())
