"""A full disk during a training: a small tmpfs where one can be mounted, else a limit on the size of files."""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fault_injection.comparison import differences
from fault_injection.training import (
    ITERATIONS_PER_EPOCH,
    FaultTestError,
    Life,
    Training,
    newest_on_disk,
    position,
    send,
)

SPARE_BYTES = 20 * 2**20
"""Room for logs, curves and detections."""


@dataclass
class DiskCase:
    """One full disk and what the run did."""

    what: str
    way: str
    """tmpfs or RLIMIT_FSIZE."""
    statuses: list[int] | None = None
    kept: int | None = None
    """Iterations of the checkpoint that the full disk left."""
    said: bool = False
    differences: list[str] = field(default_factory=list)
    fault: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


def fill_and_resume(training: Training, reference: Path, work: Path, say: Callable[[str], None]) -> list[DiskCase]:
    """Room for one epoch's checkpoints and no more: until the end, and until room is made in mid-run."""
    file_bytes = max(path.stat().st_size for path in (reference / "checkpoints").glob("*.pt"))
    cases = []
    for case_name, is_freed in (("full until the end, then resumed with room", False), ("full, room in mid-run", True)):
        folder = work / ("freed" if is_freed else "full")
        folder.mkdir(parents=True)
        # last, previous and one epoch, and half of the file that comes next
        with _limited(folder, int(3.5 * file_bytes) + SPARE_BYTES) as disk:
            case = DiskCase(case_name, disk.way)
            _run_full(case, training, reference, disk, folder, is_freed)
        say(f"disk ({disk.way}): {case.what}: {case.statuses} {case.fault or 'kept what it had'}")
        cases.append(case)
    return cases


@dataclass
class _Disk:
    way: str
    prefix: tuple[str, ...]
    enlarge: Callable[[Life | None], None]


@contextmanager
def _limited(folder: Path, num_bytes: int) -> Iterator[_Disk]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "fault_test", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        is_mounted = False
    if not is_mounted:
        # Smaller than any checkpoint and larger than any other file: the first save fails already.
        def enlarge(life: Life | None) -> None:
            for pid in life.rank_ids() if life is not None else []:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        yield _Disk("RLIMIT_FSIZE", ("prlimit", f"--fsize={SPARE_BYTES}:unlimited"), enlarge)
        return
    try:

        def remount(life: Life | None) -> None:
            options = f"remount,size={20 * num_bytes}"
            subprocess.run(["mount", "-o", options, str(folder)], check=True, capture_output=True)

        yield _Disk("tmpfs", (), remount)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def _run_full(case: DiskCase, training: Training, reference: Path, disk: _Disk, folder: Path, is_freed: bool) -> None:
    output, log = folder / "run", folder.with_suffix(".txt")
    life = Life(training, output, log, launcher="direct", prefix=disk.prefix).start()
    if is_freed:
        half = training.num_iterations - ITERATIONS_PER_EPOCH
        if not life.wait_until(lambda: position(output).iterations >= half):
            raise FaultTestError(f"the run on a full disk ended too early:\n{life.last_words()}")
        for pid in life.rank_ids():  # so that the room is there before the next save
            send(pid, signal.SIGSTOP)
        disk.enlarge(life)
        for pid in life.rank_ids():
            send(pid, signal.SIGCONT)
    case.statuses = life.wait()
    text = log.read_text()
    case.said = "checkpoint not written" in text
    case.kept = newest_on_disk(output)[0]
    wanted = 0 if is_freed else 1
    if case.statuses is None or any(status != wanted for status in case.statuses):
        case.fault = f"ended with {case.statuses}, expected {wanted}: {life.last_words()}"
    elif not case.said:
        case.fault = "nothing was said of checkpoints that could not be written"
    elif not is_freed and "NOT saved" not in text:
        case.fault = "the end does not say that the newest state is not saved"
    elif not is_freed and disk.way == "tmpfs" and case.kept == 0:
        case.fault = "no checkpoint was left"
    if case.fault:
        return
    if not is_freed:
        disk.enlarge(None)
        life = Life(training, output, log, launcher="direct").start()
        if (statuses := life.wait()) is None or any(statuses):
            case.fault = f"the resume with room ended with {statuses}: {life.last_words()}"
            return
    case.differences = differences(reference, output)
