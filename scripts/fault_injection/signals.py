"""SIGTERM, SIGINT and SIGUSR1 in training, validation and the wait for data, to a rank or torchrun; a second SIGINT."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from fault_injection.comparison import differences
from fault_injection.training import Life, Say, Training, newest_on_disk, position, send, starts

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


@dataclass
class SignalledTraining:
    """A training stopped by one signal after the other, each time resumed."""

    training: str
    cases: list[SignalCase] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def stop_and_resume(
    training: Training, reference: Path, work: Path, random_state: random.Random, say: Say
) -> SignalledTraining:
    """Stop a training by every signal in training and in validation, let it end, compare it with `reference`."""
    output, log = work / "run", work / "log.txt"
    result = SignalledTraining(training.name)

    def note(case: SignalCase) -> None:
        result.cases.append(case)
        say(f"{training.name}: {case.signal} to {case.to} in {case.moment}: {case.statuses} {case.fault}")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for moment in ("training", "validation"):
            rank = random_state.randrange(training.processes)
            to = f"rank {rank}" if training.processes > 1 else "the process"
            life = Life(training, output, log, direct=True).start()
            _await(moment, life)
            case = SignalCase(training.name, number.name, moment, to)
            note(_send_and_judge(case, life, life.rank_ids()[rank], number, [STOPPED] * training.processes))
    if training.processes > 1:
        # A scheduler's SIGTERM reaches torchrun alone, which hands it on.
        life = Life(training, output, log).start()
        _await("training", life)
        case = SignalCase(training.name, "SIGTERM", "training", "torchrun")
        note(_send_and_judge(case, life, life.processes[0].pid, signal.SIGTERM, [1]))
    else:
        note(_in_wait_for_data(training, output, log))
        note(_second_interrupt(training, output, log))
    Life(training, output, log).start().finish()
    result.differences = differences(reference, output)
    return result


def _await(moment: str, life: Life) -> None:
    count = len(starts(life.output))
    life.reach(lambda: len(starts(life.output)) > count)
    first = position(life.output).iterations
    if moment == "validation":
        life.reach(lambda: position(life.output).in_validation)
    else:
        life.reach(lambda: position(life.output).iterations > first)


def _send_and_judge(case: SignalCase, life: Life, pid: int, number: signal.Signals, expected: list[int]) -> SignalCase:
    before, sent = position(life.output).iterations, time.monotonic()
    send(pid, number)
    return _judge(case, life, before, sent, expected)


def _judge(case: SignalCase, life: Life, before: int, sent: float, expected: list[int]) -> SignalCase:
    """Statuses as documented, the stop within an iteration of every rank's next look, nothing unsaved."""
    case.statuses = life.wait()
    case.seconds = round(time.monotonic() - sent, 2)
    reached, saved = position(life.output).iterations, newest_on_disk(life.output)[0]
    case.iterations_after = reached - before
    if case.statuses != expected:
        case.fault = f"statuses {case.statuses}, expected {expected}: {life.last_words()}"
    elif saved != reached:
        case.fault = f"{reached} iterations recorded, {saved} saved"
    elif case.iterations_after > 2:  # the one under way, and the one at whose start all ranks agree
        case.fault = f"{case.iterations_after} iterations after the signal"
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
    life.send(signal.SIGTERM)
    time.sleep(1)
    if life.is_over:
        case.fault = "it did not wait for the data"
    for pid in loaders:
        send(pid, signal.SIGCONT)
    return _judge(case, life, before, sent, [STOPPED])


def _second_interrupt(training: Training, output: Path, log: Path) -> SignalCase:
    """Two SIGINTs within one iteration: the first asks for a stop after it, the second ends the process at once."""
    case = SignalCase(training.name, "SIGINT, SIGINT", "training", "the process")
    # Iterations of seconds, in a run of its own.
    slow = ("--min-size", "480", "--max-size", "640", "--accumulate", "8")
    life = Life(training, output.with_name("interrupted_twice"), log, more=slow, resume=False).start()
    life.reach(lambda: len(starts(life.output)) > 0)
    life.send(signal.SIGINT)
    time.sleep(0.1)
    # However fast the device is: the two seconds between the interrupts fall into one iteration.
    life.send(signal.SIGSTOP)
    time.sleep(SECONDS_BETWEEN_INTERRUPTS)
    life.send(signal.SIGINT)
    life.send(signal.SIGCONT)
    sent = time.monotonic()
    case.statuses = life.wait()
    case.seconds = round(time.monotonic() - sent, 2)
    case.iterations_after = position(life.output).iterations
    if case.statuses != [INTERRUPTED_TWICE]:
        case.fault = f"statuses {case.statuses}, expected {[INTERRUPTED_TWICE]}"
    return case
