"""Kills, damages, stops and starves small trainings, resumes them, and compares them with undisturbed ones.

A kill is lost where the resume failed or went back further than the newest checkpoint on the disk; a training is
different where its weights, states, records, curves or detections are not bit for bit those of the undisturbed one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
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
from fault_injection.kills import Durations, KilledTraining, kill_and_resume
from fault_injection.report import faults, page
from fault_injection.signals import stop_and_resume
from fault_injection.training import (
    ITERATIONS_PER_EPOCH,
    FaultTestError,
    Life,
    Training,
    newest_on_disk,
    position,
)

KILLS_PER_TRAINING = 20
EPOCHS_FOR_SIGNALS = 5
"""One for each validation that is stopped, and one to go on in."""


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
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
    record = full_record("faults", vars(arguments), found, arguments.device)
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
    add("--corruptions", type=int, default=30, help="damaged checkpoints in all [30]")
    add("--signals", action=argparse.BooleanOptionalAction, default=True, help="[on]")
    add("--disk", action=argparse.BooleanOptionalAction, default=True, help="fill the disk [on]")
    add("--processes", type=int, default=2, metavar="N", help="of the trainings with several processes; 1: none [2]")
    add("--epochs", type=int, default=6, help="of a training, 10 iterations each [6]")
    add("--checkpoint-iterations", type=int, default=2, help="[2]")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="[cpu]")
    add("--seed", type=int, default=0, help="of the moments and damages [0]")
    add("--jobs", type=int, default=1, help="trainings that are killed at a time [1]")
    add("--work-dir", type=empty_folder, metavar="DIR", help="an empty folder; stays afterwards [temporary]")
    add("--report", type=Path, metavar="FILE", help="write the page there")
    add("--json", type=Path, metavar="FILE", help="write everything that was found there")
    return parser


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
    killed = _kill_all(arguments, trainings, references, durations, work)
    corruptions, broken, signals, disk = [], "", [], []
    first, reference = trainings[0], references[0]
    if arguments.corruptions:
        stopped = _stopped(first, work / "stopped")
        random_state = random.Random(f"{arguments.seed} corruptions")
        folder, count = work / "corruptions", arguments.corruptions
        corruptions = corrupt_and_resume(first, reference, stopped, folder, count, random_state, say)
        broken = all_broken(first, stopped, work)
        say(f"every checkpoint broken: {broken or 'refused'}")
    if arguments.signals:
        for number, training in enumerate(trainings[:2]):
            random_state = random.Random(f"{arguments.seed} signals {number}")
            folder = work / f"signals_{number}"
            signals.append(stop_and_resume(training, references[number], folder, random_state, say))
    if arguments.disk:
        disk = fill_and_resume(first, reference, work / "disk", say)
    found: dict[str, list[Any]] = {"trainings": killed, "corruptions": corruptions, "signals": signals, "disk": disk}
    return {
        "device": arguments.device,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        **{name: [dataclasses.asdict(entry) for entry in entries] for name, entries in found.items()},
        "all_broken": broken,
    }


def _trainings(arguments: argparse.Namespace, data: Path) -> list[Training]:
    several, ema = arguments.processes, ("--ema", "0.9")
    kinds: list[tuple[str, int, tuple[str, ...]]] = [("1 process, EMA", 1, ema)]
    if several > 1:
        name = f"{several} processes, EMA, bf16, 2 micro-steps"
        kinds.append((name, several, (*ema, "--amp", "bf16", "--accumulate", "2")))
    kinds.append(("1 process and a loader process", 1, ("--workers", "1", "--checkpoint-minutes", "0.02")))
    more = (data, arguments.device, arguments.epochs, arguments.checkpoint_iterations)
    return [Training(name, count, options, *more) for name, count, options in kinds]


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
) -> list[KilledTraining]:
    """Trainings with kills, in turn, until there were as many kills as wanted."""
    results: list[KilledTraining] = []
    # Few kills are spread over all kinds of training.
    at_most = min(KILLS_PER_TRAINING, -(-arguments.kills // len(trainings)))
    started = 0
    with concurrent.futures.ThreadPoolExecutor(max(arguments.jobs, 1)) as pool:
        while (left := arguments.kills - sum(len(result.kills) for result in results)) > 0:
            pending: list[concurrent.futures.Future[KilledTraining]] = []
            while left > 0 and len(pending) < max(arguments.jobs, 1):
                kind, wanted = started % len(trainings), min(at_most, left)
                random_state = random.Random(f"{arguments.seed} kills {started}")
                known = trainings[kind], references[kind], durations[kind]
                folder = work / f"killed_{started}"
                pending.append(pool.submit(kill_and_resume, *known, folder, wanted, random_state, say))
                left, started = left - wanted, started + 1
            round_results = [future.result() for future in pending]
            for result in round_results:
                outcome = result.failure or result.differences or "same bits"
                say(f"{result.training}: {len(result.kills)} kills, {outcome}")
            results += round_results
            if not any(result.kills for result in round_results):
                raise FaultTestError("no training could be killed: all of them ended before")
    return results


if __name__ == "__main__":
    sys.exit(main())
