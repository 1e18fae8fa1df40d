"""SIGTERM, SIGINT and SIGUSR1 in training, validation and the wait for data, to a rank or torchrun; a second SIGINT."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fault_injection.comparison import differences
from fault_injection.training import (
    FaultTestError,
    Life,
    Training,
    finish,
    newest_on_disk,
    position,
    send,
    starts,
)

STOPPED = 75
INTERRUPTED_TWICE = 130
SECONDS_BETWEEN_INTERRUPTS = 2.2


@dataclass
class SignalCase:
    """One signal and what the run did."""

    training: str
    signal: str
    moment: str
    to: str
    statuses: list[int] | None = None
    iterations_after: int | None = None
    """Iterations that were still recorded after the signal."""
    seconds: float | None = None
    fault: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class SignalledTraining:
    """A training stopped by one signal after the other, each time resumed."""

    training: str
    cases: list[SignalCase] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def stop_and_resume(
    training: Training, reference: Path, work: Path, *, random_state: random.Random, say: Callable[[str], None]
) -> SignalledTraining:
    """Stop a training by every signal in training and in validation, let it end, compare it with `reference`."""
    output, log = work / "run", work / "log.txt"
    result = SignalledTraining(training.name)
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    cases = [(number, moment) for number in signals for moment in ("training", "validation")]
    for number, moment in cases:
        rank = random_state.randrange(training.processes)
        to = f"rank {rank}" if training.processes > 1 else "the process"
        case = SignalCase(training.name, number.name, moment, to)
        life = Life(training, output, log, launcher="direct").start()
        if not _await(moment, life):
            raise FaultTestError(f"{training.name}: it ended before the {moment} to be stopped\n{life.last_words()}")
        before = position(output).iterations
        sent = time.monotonic()
        send(life.rank_ids()[rank], number)
        _judge(case, life, before, sent, [STOPPED] * training.processes)
        result.cases.append(case)
        say(f"{training.name}: {case.signal} in {moment}: {case.statuses} {case.fault}")
    if training.processes > 1:
        result.cases.append(_through_torchrun(training, output, log))
        say(f"{training.name}: SIGTERM to torchrun: {result.cases[-1].statuses} {result.cases[-1].fault}")
    else:
        for case in (_in_wait_for_data(training, output, log), _second_interrupt(training, output, log)):
            result.cases.append(case)
            say(f"{training.name}: {case.signal} in {case.moment}: {case.statuses} {case.fault}")
    finish(training, output, log)
    result.differences = differences(reference, output)
    return result


def _judge(case: SignalCase, life: Life, before: int, sent: float, expected: list[int]) -> None:
    """Statuses as documented, the stop within an iteration of every rank's next look, nothing unsaved."""
    case.statuses = life.wait()
    case.seconds = round(time.monotonic() - sent, 2)
    reached, newest = position(life.output), newest_on_disk(life.output)
    case.iterations_after = reached.iterations - before
    if case.statuses != expected:
        case.fault = f"statuses {case.statuses}, expected {expected}: {life.last_words()}"
    elif newest[0] != reached.iterations:
        case.fault = f"{reached.iterations} iterations recorded, {newest[0]} saved"
    elif case.iterations_after > 2:  # the one under way, and the one at whose start all ranks agree
        case.fault = f"{case.iterations_after} iterations after the signal"


def _await(moment: str, life: Life) -> bool:
    count = len(starts(life.output))
    if not life.wait_until(lambda: len(starts(life.output)) > count):
        return False
    first = position(life.output).iterations
    if moment == "validation":
        return life.wait_until(lambda: position(life.output).in_validation)
    return life.wait_until(lambda: position(life.output).iterations > first)


def _through_torchrun(training: Training, output: Path, log: Path) -> SignalCase:
    """A scheduler's SIGTERM reaches torchrun alone, which hands it on."""
    case = SignalCase(training.name, "SIGTERM", "training", "torchrun")
    life = Life(training, output, log, launcher="torchrun").start()
    _await("training", life)
    before, sent = position(output).iterations, time.monotonic()
    send(life.processes[0].pid, signal.SIGTERM)
    _judge(case, life, before, sent, [1])
    return case


def _in_wait_for_data(training: Training, output: Path, log: Path) -> SignalCase:
    """The loader's process stands still, as on a file system that does not answer, and goes on after the signal."""
    case = SignalCase(training.name, "SIGTERM", "the wait for data", "the process")
    life = Life(training, output, log, more=("--workers", "1")).start()
    _await("training", life)
    loaders = [pid for pid in life.all_ids() if pid != life.processes[0].pid]
    for pid in loaders:
        send(pid, signal.SIGSTOP)
    time.sleep(2.5)  # batches that were ready are used up
    before, sent = position(output).iterations, time.monotonic()
    send(life.processes[0].pid, signal.SIGTERM)
    time.sleep(1)
    if life.is_over:
        case.fault = "it did not wait for the data"
    for pid in loaders:
        send(pid, signal.SIGCONT)
    _judge(case, life, before, sent, [STOPPED])
    return case


def _second_interrupt(training: Training, output: Path, log: Path) -> SignalCase:
    """Two SIGINTs within one iteration: the first asks for a stop after it, the second ends the process at once."""
    case = SignalCase(training.name, "SIGINT, SIGINT", "training", "the process")
    # Iterations of seconds, in a run of its own.
    slow = ("--min-size", "480", "--max-size", "640", "--accumulate", "8")
    life = Life(training, output.with_name("interrupted_twice"), log, more=slow, resume=False).start()
    if not life.wait_until(lambda: len(starts(life.output)) > 0):
        raise FaultTestError(f"{training.name}: it ended before the iteration to be interrupted\n{life.last_words()}")
    pid = life.processes[0].pid
    send(pid, signal.SIGINT)
    time.sleep(0.1)
    # However fast the device is: the two seconds between the interrupts fall into one iteration.
    send(pid, signal.SIGSTOP)
    time.sleep(SECONDS_BETWEEN_INTERRUPTS)
    send(pid, signal.SIGINT)
    send(pid, signal.SIGCONT)
    sent = time.monotonic()
    case.statuses = life.wait()
    case.seconds = round(time.monotonic() - sent, 2)
    case.iterations_after = position(life.output).iterations
    if case.statuses != [INTERRUPTED_TWICE]:
        case.fault = f"statuses {case.statuses}, expected {[INTERRUPTED_TWICE]}"
    return case
