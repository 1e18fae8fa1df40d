"""Kills, damages, stops and starves small trainings, resumes them, and compares them with undisturbed ones.

A kill is lost where the resume failed or went back further than the newest checkpoint on the disk; a training is
different where its weights, states, records, curves or detections are not bit for bit those of the undisturbed one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import full_record, headline, write_json
from checkout import empty_folder
from data import make_shapes
from fault_injection.corruptions import all_broken, corrupt_and_resume
from fault_injection.disk import fill_and_resume
from fault_injection.interruptions import (
    Durations,
    InterruptedTraining,
    Interruption,
    interrupt_and_resume,
    interrupt_twice,
    kills,
    stop_signals,
)
from fault_injection.report import MergeError, faults, merged, page
from fault_injection.training import (
    ITERATIONS_PER_EPOCH,
    FaultTestError,
    Life,
    Training,
    newest_on_disk,
    position,
)

KILLS_PER_TRAINING = 20
EPOCHS_FOR_SIGNALS = 6
"""One for each validation that is stopped, one for the other case, and one to continue in."""
SLOW_DISK_SECONDS = 0.2
"""A checkpoint takes some seconds then: a file and a folder to flush, and up to four names."""
TRAININGS = ("1", "2", "3", "4", "loader", "slow-disk")


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.merge:
        try:
            record = merged([json.loads(path.read_text()) for path in arguments.merge])
        except (OSError, ValueError, MergeError) as error:
            parser.error(f"--merge: {error}")
        return _show(arguments, record)
    if not Path("/proc/self/environ").exists():
        parser.error("it needs Linux (/proc), to find the processes that it kills")
    if arguments.signals and arguments.epochs < EPOCHS_FOR_SIGNALS:
        remedy = f"give --epochs {EPOCHS_FOR_SIGNALS} or more, or --no-signals"
        parser.error(f"the signals need trainings of {EPOCHS_FOR_SIGNALS} epochs: {remedy}")
    with tempfile.TemporaryDirectory(prefix="fault_test_") as temporary:
        try:
            found = _run(arguments, arguments.work_dir or Path(temporary).resolve())
        except FaultTestError as error:
            print(f"fault_test: {error}", file=sys.stderr)
            return 1
    return _show(arguments, full_record("faults", vars(arguments), found, arguments.device))


def _show(arguments: argparse.Namespace, record: dict[str, Any]) -> int:
    text = page(record, headline(record).replace("\n", "\n\n"))
    print(f"\n{text}")
    if arguments.report is not None:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(text)
    if arguments.json is not None:
        write_json(arguments.json, record)
    return 1 if faults(record) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=100, help="SIGKILLs in all [100]")
    add("--minutes", type=float, help="after these minutes nothing more is killed [no limit]")
    add("--corruptions", type=int, default=30, help="damaged checkpoints in all [30]")
    add("--signals", action=argparse.BooleanOptionalAction, default=True, help="[on]")
    add("--disk", action=argparse.BooleanOptionalAction, default=True, help="fill the disk [on]")
    kinds = "a number of processes, loader (a loader process), slow-disk (writes that take seconds)"
    add("--trainings", nargs="+", type=_kind, default=TRAININGS, metavar="KIND", help=f"{kinds} [all, 1 to 4]")
    add("--epochs", type=int, default=6, help="of a training, 10 iterations each [6]")
    add("--checkpoint-iterations", type=int, default=2, help="[2]")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="[cpu]")
    add("--seed", type=int, default=0, help="of the moments and damages [0]")
    add("--jobs", type=int, default=1, help="trainings that are killed at a time [1]")
    add("--work-dir", type=empty_folder, metavar="DIR", help="an empty folder; stays afterwards [temporary]")
    add("--merge", nargs="+", type=Path, metavar="FILE", help="instead: one report of parts, from their --json")
    add("--report", type=Path, metavar="FILE", help="write the page there")
    add("--json", type=Path, metavar="FILE", help="write everything that was found there")
    return parser


def _kind(text: str) -> str:
    if text not in ("loader", "slow-disk") and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a number of processes, loader or slow-disk")
    return text


def say(line: str) -> None:
    """A line with the time; whole, from whatever thread."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def _run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    begun = time.monotonic()
    data = make_shapes(work / "shapes", seed=1, num_train=64, num_val=4, size=(128, 96))
    trainings = _trainings(arguments, data)
    references = [work / f"undisturbed_{number}" for number in range(len(trainings))]
    durations = [_undisturbed(training, output) for training, output in zip(trainings, references, strict=True)]
    until = math.inf if arguments.minutes is None else begun + 60 * arguments.minutes
    interrupted = _kill_all(arguments, trainings, references, durations, work, until)
    corruptions, broken, disk = [], "", []
    interrupted_twice: list[Interruption] = []
    first, reference = trainings[0], references[0]
    if arguments.corruptions:
        stopped = _stopped(first, work / "stopped")
        random_state = random.Random(f"{arguments.seed} corruptions")
        folder, count = work / "corruptions", arguments.corruptions
        corruptions = corrupt_and_resume(first, reference, stopped, folder, count, random_state, say)
        broken = all_broken(first, stopped, work)
        say(f"every checkpoint broken: {broken or 'refused'}")
    if arguments.signals:
        for number, (training, known) in enumerate(zip(trainings, durations, strict=True)):
            attempts = stop_signals(training, known, random.Random(f"{arguments.seed} signals {number}"))
            folder = work / f"signals_{number}"
            interrupted.append(interrupt_and_resume(training, references[number], folder, attempts, say))
        interrupted_twice.append(interrupt_twice(first, work / "interrupted_twice"))
    if arguments.disk:
        disk = fill_and_resume(first, reference, work / "disk", say)
    return {
        "device": arguments.device,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "trainings": [dataclasses.asdict(entry) for entry in interrupted],
        "interrupted_twice": [dataclasses.asdict(entry) for entry in interrupted_twice],
        "corruptions": [dataclasses.asdict(entry) for entry in corruptions],
        "disk": [dataclasses.asdict(entry) for entry in disk],
        "all_broken": broken,
    }


def _trainings(arguments: argparse.Namespace, data: Path) -> list[Training]:
    ema = ("--ema", "0.9")
    # The first layers take most of the time, and nothing differs in them.
    half = (*ema, "--model-set", "frozen_stages=3")
    kinds: dict[str, tuple[str, int, tuple[str, ...], float]] = {
        "1": ("1 process, EMA", 1, ema, 0.0),
        "2": ("2 processes, EMA, bf16, 2 micro-steps", 2, (*half, "--amp", "bf16", "--accumulate", "2"), 0.0),
        "loader": ("1 process, a loader process", 1, ("--workers", "1", "--checkpoint-minutes", "0.02"), 0.0),
        "slow-disk": ("1 process, a slow disk", 1, half, SLOW_DISK_SECONDS),
    }
    for several in arguments.trainings:
        if several.isdigit():
            kinds.setdefault(several, (f"{several} processes, EMA", int(several), half, 0.0))
    more = (data, arguments.device, arguments.epochs, arguments.checkpoint_iterations)
    chosen = [kinds[kind] for kind in arguments.trainings]
    return [Training(name, count, options, *more, seconds) for name, count, options, seconds in chosen]


def _undisturbed(training: Training, output: Path) -> Durations:
    """Train without a fault; how long its parts took."""
    life = Life(training, output, output.with_suffix(".txt"), resume=False).start()
    marks = (
        lambda: position(output).iterations >= 1,
        lambda: position(output).iterations >= ITERATIONS_PER_EPOCH,
        lambda: position(output).validated >= ITERATIONS_PER_EPOCH,
    )
    times = []
    for has_come in marks:
        life.wait_until(has_come)
        times.append(time.monotonic() - life.began)
    life.finish()
    first, epoch, validated = times
    iteration = (epoch - first) / (ITERATIONS_PER_EPOCH - 1)
    durations = Durations(round(first, 2), round(iteration, 3), round(validated - epoch, 2))
    say(f"{training.name}: undisturbed, {durations}")
    return durations


def _stopped(training: Training, folder: Path) -> Path:
    """Output of a training that was killed in its second half, with a checkpoint before the newest."""
    output = folder / "run"
    life = Life(training, output, folder / "log.txt").start()
    life.reach(lambda: newest_on_disk(output)[0] >= training.num_iterations - 7)
    life.send(signal.SIGKILL)
    life.wait()
    return output


def _kill_all(
    arguments: argparse.Namespace,
    trainings: list[Training],
    references: list[Path],
    durations: list[Durations],
    work: Path,
    until: float,
) -> list[InterruptedTraining]:
    """Trainings with kills, in turn, until there were as many kills as wanted, or time.monotonic() is `until`."""
    results: list[InterruptedTraining] = []
    # Few kills are spread over all kinds of training.
    at_most = min(KILLS_PER_TRAINING, -(-arguments.kills // len(trainings)))
    started = 0
    with concurrent.futures.ThreadPoolExecutor(max(arguments.jobs, 1)) as pool:
        while time.monotonic() < until:
            left = arguments.kills - sum(len(result.interruptions) for result in results)
            if left <= 0:
                break
            pending: list[concurrent.futures.Future[InterruptedTraining]] = []
            while left > 0 and len(pending) < max(arguments.jobs, 1):
                kind, wanted = started % len(trainings), min(at_most, left)
                attempts = kills(wanted, until, durations[kind], random.Random(f"{arguments.seed} kills {started}"))
                known = trainings[kind], references[kind], work / f"killed_{started}"
                pending.append(pool.submit(interrupt_and_resume, *known, attempts, say))
                left, started = left - wanted, started + 1
            round_results = [future.result() for future in pending]
            for result in round_results:
                outcome = result.failure or "; ".join(result.differences[:3]) or "same bits"
                say(f"{result.training}: {len(result.interruptions)} kills, {outcome}")
            results += round_results
            if not any(result.interruptions for result in round_results) and time.monotonic() < until:
                raise FaultTestError("no training could be killed: all of them ended before")
    return results


if __name__ == "__main__":
    sys.exit(main())
