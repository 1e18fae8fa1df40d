"""Kills and stop signals at random moments of a training, each resumed, and what became of it."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fault_injection.comparison import differences
from fault_injection.training import FaultTestError, Life, Say, Training, newest_on_disk, position, send, starts

FAILED = 1
STOPPED = 75
INTERRUPTED_TWICE = 130
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS_BETWEEN_INTERRUPTS = 2.2
WRITING = ".writing"
MOMENTS = {"start-up": 0.2, "training": 0.3, "validation": 0.15, "save": 0.35}
"""How often a kill is aimed at each. What was hit is told by the files afterwards."""
LOADER_SHARE = 0.3
"""How often a kill hits a loader process, where there is one."""
LOADER_MESSAGE = "a process that loads images ended"


@dataclass
class Interruption:
    """One kill or signal, and what the run did."""

    training: str
    signal: str
    moment: str
    to: str
    """all, a rank, a loader process or torchrun: the others must end on their own."""
    before: int = 0
    """Iterations recorded when it was sent."""
    reached: int = 0
    """Iterations recorded at the end."""
    saved: int = 0
    """Iterations of the newest checkpoint that was left."""
    half_written: bool = False
    """An unfinished file was left in the folder of checkpoints."""
    statuses: list[int] | None = None
    resumed_at: int | None = None
    """Iteration at which the next start continued; None where that one was killed before it began."""
    fault: str = ""


@dataclass
class InterruptedTraining:
    """One training with all its interruptions, each resumed."""

    training: str
    interruptions: list[Interruption] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True)
class Durations:
    """Seconds in the undisturbed training, from which random delays are drawn."""

    start_up: float
    iteration: float
    validation: float


Strike = Callable[[Life], Interruption | None]
"""Waits for its moment, strikes, waits for the end, and judges; None where the training was done before."""


@dataclass(frozen=True)
class Attempt:
    """A start of the training that is to be interrupted."""

    strike: Strike
    more: tuple[str, ...] = ()
    torchrun: bool = False


def interrupt_and_resume(
    training: Training, reference: Path, work: Path, attempts: Iterable[Attempt], say: Say
) -> InterruptedTraining:
    """Interrupt a training by one attempt after the other, let it end, and compare it with `reference`."""
    output, log = work / "run", work / "log.txt"
    result = InterruptedTraining(training.name)
    newest, upcoming = newest_on_disk(output), iter(attempts)
    try:
        while True:
            num_starts, attempt = len(starts(output)), next(upcoming, None)
            more, torchrun = (attempt.more, attempt.torchrun) if attempt is not None else ((), False)
            life = Life(training, output, log, more=more, torchrun=torchrun).start()
            case = attempt.strike(life) if attempt is not None else None
            statuses = life.wait()
            began = starts(output)[num_starts:]
            if result.interruptions and began:
                last = result.interruptions[-1]
                last.resumed_at = began[0]
                if began[0] != newest[0]:
                    last.fault = f"resumed at {began[0]}, the newest checkpoint had {newest[0]}"
            if statuses is None:
                raise FaultTestError("hung: " + life.last_words())
            if case is None:
                if any(statuses):
                    raise FaultTestError(f"ended with {statuses}: {life.last_words()}")
                break
            before, newest = newest, newest_on_disk(output)
            case.saved = newest[0]
            if not case.fault and case.signal == "SIGKILL":
                case.fault = loss(case, before, newest, training.checkpoint_iterations)
            result.interruptions.append(case)
            say(
                f"{training.name}: {len(result.interruptions)}. {case.signal} in {case.moment} ({case.to}) at "
                f"iteration {case.before}, checkpoint at {case.saved}{'  FAULT: ' + case.fault if case.fault else ''}"
            )
        result.differences = differences(reference, output)
    except FaultTestError as error:
        result.failure = str(error)
        if result.interruptions and not result.interruptions[-1].fault:
            result.interruptions[-1].fault = f"the run did not continue: {error}"
    if not result.failure and not result.differences:
        shutil.rmtree(work)
    return result


def loss(kill: Interruption, before: tuple[int, bool], after: tuple[int, bool], checkpoint_iterations: int) -> str:
    """Why this kill cost more than the iterations since the last finished save; empty where it did not."""
    if after < before:
        return f"the newest checkpoint was {before}, now {after}"
    # A save waits for the one before it: of the last two that were due, one at least is on the disk.
    each = checkpoint_iterations
    at_least = max(0, kill.reached - 1) // each * each - each
    return f"no checkpoint at or after {at_least} of {kill.reached}" if after[0] < at_least else ""


def kills(count: int, until: float, durations: Durations, random_state: random.Random) -> Iterator[Attempt]:
    """SIGKILLs at random moments, to all processes, one rank or one loader process; none after `until` (monotonic)."""
    while count > 0 and time.monotonic() < until:
        count -= 1
        yield Attempt(lambda life: _kill(life, durations, random_state))


def stop_signals(training: Training, durations: Durations, random_state: random.Random) -> Iterator[Attempt]:
    """Every stop signal in training and in validation, to a random rank; SIGTERM to torchrun, or in a wait for data."""
    for number in STOP_SIGNALS:
        for moment in ("training", "validation"):

            def strike(life: Life, number: signal.Signals = number, moment: str = moment) -> Interruption:
                _require(_await(moment, life, durations, random_state), life)
                rank = random_state.randrange(training.processes)
                return _stop(life, number, moment, f"rank {rank}", life.rank_ids()[rank])

            yield Attempt(strike)
    if training.processes > 1:
        # A scheduler's SIGTERM reaches torchrun alone, which hands it on.
        yield Attempt(lambda life: _stop_torchrun(life, durations, random_state), torchrun=True)
    else:
        more = ("--workers", "1")
        yield Attempt(lambda life: _stop_in_wait_for_data(life, durations, random_state), more)


def interrupt_twice(training: Training, work: Path) -> Interruption:
    """Two SIGINTs within one iteration: the first asks for a stop after it, the second ends the process at once."""
    # Iterations of seconds, in a run of its own.
    slow = ("--min-size", "480", "--max-size", "640", "--accumulate", "8")
    life = Life(training, work / "run", work / "log.txt", more=slow, resume=False).start()
    life.reach(lambda: len(starts(life.output)) > 0)
    life.send(signal.SIGINT)
    time.sleep(0.1)
    # However fast the device is: the two seconds between the interrupts fall into one iteration.
    life.send(signal.SIGSTOP)
    time.sleep(SECONDS_BETWEEN_INTERRUPTS)
    life.send(signal.SIGINT)
    life.send(signal.SIGCONT)
    case = _ended(Interruption(training.name, "SIGINT, SIGINT", "training", "rank 0"), life)
    if case.statuses != [INTERRUPTED_TWICE]:
        case.fault = f"statuses {case.statuses}, expected {[INTERRUPTED_TWICE]}"
    return case


def _kill(life: Life, durations: Durations, random_state: random.Random) -> Interruption | None:
    aimed_at = random_state.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    unfinished, num_starts = _unfinished(life.output), len(starts(life.output))
    if not _await(aimed_at, life, durations, random_state):
        return None
    ranks, to, said = life.rank_ids(), "all", life.log.stat().st_size
    loaders = life.loader_ids() if random_state.random() < LOADER_SHARE else []
    reached = position(life.output).iterations
    if loaders:
        to = "a loader process"
        send(random_state.choice(loaders), signal.SIGKILL)
    elif len(ranks) > 1 and random_state.random() < 0.5:
        victim = random_state.randrange(len(ranks))
        to = f"rank {victim}"
        send(ranks[victim], signal.SIGKILL)
        if len(starts(life.output)) == num_starts:
            # Before they have met, a rank misses none: torchrun, whose part this plays, ends the others.
            life.send(signal.SIGTERM)
    else:
        life.kill_all()
    case = _ended(Interruption(life.training.name, "SIGKILL", aimed_at, to, reached), life)
    if case.statuses is None:
        raise FaultTestError(f"the others went on for minutes after {to} was killed\n{life.last_words()}")
    if not any(case.statuses):
        return None  # it was done already
    text = life.log.read_bytes()[said:].decode(errors="replace")
    if loaders and (case.statuses != [FAILED] or LOADER_MESSAGE not in text or "Traceback" in text):
        case.fault = f"statuses {case.statuses}, expected {[FAILED]} and a message: {life.last_words()}"
    at_end, began = position(life.output), starts(life.output)[num_starts:]
    case.half_written = any(unfinished.get(name) != when for name, when in _unfinished(life.output).items())
    if case.half_written:
        case.moment = "save"
    elif not began or (at_end.iterations == began[0] and not at_end.in_validation):
        case.moment = "start-up"
    else:
        case.moment = "validation" if at_end.in_validation else "training"
    return case


def _stop(life: Life, number: signal.Signals, moment: str, to: str, pid: int) -> Interruption:
    """Statuses as documented, the stop within an iteration of every rank's next look, nothing unsaved."""
    case = Interruption(life.training.name, number.name, moment, to, position(life.output).iterations)
    send(pid, number)
    _ended(case, life)
    saved = newest_on_disk(life.output)[0]
    expected = [1] if to == "torchrun" else [STOPPED] * life.training.processes
    if case.statuses != expected:
        case.fault = f"statuses {case.statuses}, expected {expected}: {life.last_words()}"
    elif saved != case.reached:
        case.fault = f"{case.reached} iterations recorded, {saved} saved"
    elif case.reached - case.before > 2:  # the one under way, and the one at whose start all ranks agree
        case.fault = f"{case.reached - case.before} iterations after the signal"
    return case


def _stop_torchrun(life: Life, durations: Durations, random_state: random.Random) -> Interruption:
    _require(_await("training", life, durations, random_state), life)
    agent = life.processes[0].pid
    assert agent is not None
    return _stop(life, signal.SIGTERM, "training", "torchrun", agent)


def _stop_in_wait_for_data(life: Life, durations: Durations, random_state: random.Random) -> Interruption:
    """The loader's process stands still, as on a file system that does not answer, until the run has ended."""
    _require(_await("training", life, durations, random_state), life)
    loaders = life.loader_ids()
    for pid in loaders:
        send(pid, signal.SIGSTOP)
    time.sleep(2.5)  # batches that were ready are used up

    try:
        return _stop(life, signal.SIGTERM, "the wait for data", "rank 0", life.rank_ids()[0])
    finally:
        for pid in loaders:
            send(pid, signal.SIGCONT)


def _ended(case: Interruption, life: Life) -> Interruption:
    case.statuses = life.wait()
    case.reached = position(life.output).iterations
    return case


def _require(came: bool, life: Life) -> None:
    if not came:
        raise FaultTestError(f"it ended before it could be interrupted\n{life.last_words()}")


def _await(moment: str, life: Life, durations: Durations, random_state: random.Random) -> bool:
    """Wait for a random point in a moment; whether it came before the training's end."""
    output, num_starts = life.output, len(starts(life.output))
    if moment == "start-up":
        delay = random_state.uniform(0, durations.start_up)
        return life.wait_until(lambda: time.monotonic() - life.began >= delay)
    if moment == "save":
        unfinished = _unfinished(output).get(WRITING)
        delay = random_state.uniform(0, 0.2 + 5 * life.training.disk_seconds)
        came = life.wait_until(lambda: _unfinished(output).get(WRITING) not in (None, unfinished))
    else:
        # Records past the checkpoint are there until the new start cuts them off, which it does before it counts.
        came = life.wait_until(lambda: len(starts(output)) > num_starts)
        if moment == "training":
            wanted = position(output).iterations + random_state.randint(1, 4)
            delay = random_state.uniform(0, 2 * durations.iteration)
            came = came and life.wait_until(lambda: position(output).iterations >= wanted)
        else:
            delay = random_state.uniform(0, durations.validation / 2)
            came = came and life.wait_until(lambda: position(output).in_validation)
    if came:
        time.sleep(delay)
    return came


def _unfinished(output: Path) -> dict[str, tuple[int, int]]:
    """Files in the folder of checkpoints that have no final name yet, and what tells one from an earlier one."""
    found = {}
    for path in (output / "checkpoints").glob(".*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found[path.name] = (status.st_ino, status.st_mtime_ns)
    return found
