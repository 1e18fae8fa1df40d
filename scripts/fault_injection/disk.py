"""A full disk during a training: a small tmpfs where one can be mounted, else a limit on the size of files."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fault_injection.comparison import differences
from fault_injection.training import ITERATIONS_PER_EPOCH, Life, Say, Training, newest_on_disk, position

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


def fill_and_resume(training: Training, reference: Path, work: Path, say: Say) -> list[DiskCase]:
    """Room for one epoch's checkpoints and no more: until the end, and until room is made in mid-run."""
    file_bytes = max(path.stat().st_size for path in (reference / "checkpoints").glob("*.pt"))
    cases = []
    for what, is_freed in (("full until the end, then resumed with room", False), ("full, room in mid-run", True)):
        folder = work / ("freed" if is_freed else "full")
        folder.mkdir(parents=True)
        # last, previous and one epoch, and half of the file that comes next
        with _limited(folder, int(3.5 * file_bytes) + SPARE_BYTES) as (way, file_limit, enlarge):
            case = DiskCase(what, way)
            life = Life(training, folder / "run", folder.with_suffix(".txt"), file_limit=file_limit).start()
            if is_freed:
                _make_room_in_mid_run(life, enlarge)
            _judge(case, life, is_freed)
            if not case.fault and not is_freed:
                enlarge([])
                life = Life(training, life.output, life.log).start()
                if (statuses := life.wait()) is None or any(statuses):
                    case.fault = f"the resume with room ended with {statuses}: {life.last_words()}"
            if not case.fault:
                case.differences = differences(reference, life.output)
        say(f"disk ({way}): {what}: {case.statuses} {case.fault or 'kept what it had'}")
        cases.append(case)
    return cases


Enlarge = Callable[[list[int]], object]
"""Makes room, for the given processes."""


@contextlib.contextmanager
def _limited(folder: Path, num_bytes: int) -> Iterator[tuple[str, int | None, Enlarge]]:
    """The way in which it is limited, the largest file that a process may write, and what makes room."""

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "fault_test", str(folder)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def lift_limit(pids: list[int]) -> None:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    if mount(f"size={num_bytes}"):
        try:
            yield "tmpfs", None, lambda pids: mount(f"remount,size={20 * num_bytes}")
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
    else:
        # Smaller than any checkpoint and larger than any other file: the first save fails already.
        yield "RLIMIT_FSIZE", SPARE_BYTES, lift_limit


def _make_room_in_mid_run(life: Life, enlarge: Enlarge) -> None:
    last_epoch = life.training.num_iterations - ITERATIONS_PER_EPOCH
    life.reach(lambda: position(life.output).iterations >= last_epoch)
    life.send(signal.SIGSTOP)  # so that the room is there before the next save
    enlarge(life.rank_ids())
    life.send(signal.SIGCONT)


def _judge(case: DiskCase, life: Life, is_freed: bool) -> None:
    case.statuses = life.wait()
    text = life.log.read_text()
    case.said = "checkpoint not written" in text
    case.kept = newest_on_disk(life.output)[0]
    wanted = 0 if is_freed else 1
    if case.statuses is None or any(status != wanted for status in case.statuses):
        case.fault = f"ended with {case.statuses}, expected {wanted}: {life.last_words()}"
    elif not case.said:
        case.fault = "nothing was said of checkpoints that could not be written"
    elif not is_freed and "NOT saved" not in text:
        case.fault = "the end does not say that the newest state is not saved"
    elif not is_freed and case.way == "tmpfs" and case.kept == 0:
        case.fault = "no checkpoint was left"
