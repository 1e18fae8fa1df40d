"""SIGKILL at random moments of a training, resumed until it ends, and what became of it."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from fault_injection.comparison import differences
from fault_injection.training import FaultTestError, Life, Say, Training, newest_on_disk, position, send, starts

WRITING = ".writing"
MOMENTS = {"start-up": 0.2, "training": 0.3, "validation": 0.15, "save": 0.35}
"""How often each is aimed at. What was hit is told by the files afterwards."""


@dataclass
class Kill:
    """One kill and what it left."""

    training: str
    aimed_at: str
    hit: str
    scope: str
    """all, or the rank that was killed (the others must end by themselves)."""
    iterations: int
    """Iterations recorded when it died."""
    newest: int
    """Iterations of the newest checkpoint that it left."""
    half_written: bool
    """An unfinished file was left in the folder of checkpoints."""
    resumed_at: int | None = None
    """Iteration at which the next start went on; None where that one was killed before it began."""
    lost: str = ""
    """Why the kill cost more than it may."""


@dataclass
class KilledTraining:
    """One training with all its kills."""

    training: str
    kills: list[Kill] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True)
class Durations:
    """Seconds in the undisturbed training, from which random delays are drawn."""

    start_up: float
    iteration: float
    validation: float


def kill_and_resume(
    training: Training,
    reference: Path,
    durations: Durations,
    work: Path,
    wanted: int,
    random_state: random.Random,
    say: Say,
) -> KilledTraining:
    """Kill a training up to `wanted` times, let it end, compare it with `reference`."""
    output, log = work / "run", work / "log.txt"
    result = KilledTraining(training.name)
    newest, pending = newest_on_disk(output), None
    try:
        while True:
            num_starts = len(starts(output))
            life = Life(training, output, log).start()
            kill = _kill(life, num_starts, durations, random_state) if len(result.kills) < wanted else None
            statuses = life.wait()
            began = starts(output)[num_starts:]
            if pending is not None and began:
                pending.resumed_at = began[0]
                if began[0] != newest[0]:
                    pending.lost = f"resumed at {began[0]}, the newest checkpoint had {newest[0]}"
            if statuses is None:
                raise FaultTestError("hung: " + life.last_words())
            if kill is None:
                if any(statuses):
                    raise FaultTestError(f"ended with {statuses}: {life.last_words()}")
                break
            before, newest = newest, newest_on_disk(output)
            kill.newest = newest[0]
            kill.lost = loss(kill, before, newest, training.checkpoint_iterations)
            result.kills.append(kill)
            pending = kill
            say(
                f"{training.name}: kill {len(result.kills)} in {kill.hit} ({kill.scope}) at iteration "
                f"{kill.iterations}, checkpoint at {kill.newest}{'  LOST: ' + kill.lost if kill.lost else ''}"
            )
        result.differences = differences(reference, output)
    except FaultTestError as error:
        result.failure = str(error)
        if pending is not None and not pending.lost:
            pending.lost = f"the run did not go on: {error}"
    if not result.failure and not result.differences:
        shutil.rmtree(work)
    return result


def loss(kill: Kill, before: tuple[int, bool], after: tuple[int, bool], checkpoint_iterations: int) -> str:
    """Why this kill cost more than the iterations since the last finished save; empty where it did not."""
    if after < before:
        return f"the newest checkpoint was {before}, now {after}"
    # A save waits for the one before it: of the last two that were due, one at least is on the disk.
    each = checkpoint_iterations
    at_least = max(0, kill.iterations - 1) // each * each - each
    return f"no checkpoint at or after {at_least} of {kill.iterations}" if after[0] < at_least else ""


def _kill(life: Life, num_starts: int, durations: Durations, random_state: random.Random) -> Kill | None:
    """Kill a life at a random moment; None where it ended before."""
    output = life.output
    aimed_at = random_state.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    unfinished = _unfinished(output)
    if not _await(aimed_at, life, num_starts, durations, random_state):
        return None
    ranks, scope = life.rank_ids(), "all"
    if len(ranks) > 1 and random_state.random() < 0.5:
        victim = random_state.randrange(len(ranks))
        scope = f"rank {victim}"
        send(ranks[victim], signal.SIGKILL)
    else:
        life.kill_all()
    if life.wait() is None:
        raise FaultTestError(f"the other ranks went on for minutes after {scope} was killed\n{life.last_words()}")
    if all(process.returncode == 0 for process in life.processes):
        return None  # it was done already
    reached, began = position(output), starts(output)[num_starts:]
    half_written = any(unfinished.get(name) != when for name, when in _unfinished(output).items())
    if half_written:
        hit = "save"
    elif not began or (reached.iterations == began[0] and not reached.in_validation):
        hit = "start-up"
    else:
        hit = "validation" if reached.in_validation else "training"
    return Kill(life.training.name, aimed_at, hit, scope, reached.iterations, 0, half_written)


def _await(moment: str, life: Life, num_starts: int, durations: Durations, random_state: random.Random) -> bool:
    """Wait for a random point in a moment; whether it came before the training's end."""
    output = life.output
    if moment == "start-up":
        delay = random_state.uniform(0, durations.start_up)
        return life.wait_until(lambda: time.monotonic() - life.began >= delay)
    if moment == "save":
        unfinished = _unfinished(output).get(WRITING)
        delay = random_state.uniform(0, 0.2)
        came = life.wait_until(lambda: _unfinished(output).get(WRITING) not in (None, unfinished))
    else:
        # Records past the checkpoint are there until the new start cuts them off, which it does before it counts.
        came = life.wait_until(lambda: len(starts(output)) > num_starts)
        if moment == "training":
            wanted = position(output).iterations + random_state.randint(1, 4)
            delay = random_state.uniform(0, 2 * durations.iteration)
            came = came and life.wait_until(lambda: position(output).iterations >= wanted)
        else:
            delay = random_state.uniform(0, durations.validation)
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
