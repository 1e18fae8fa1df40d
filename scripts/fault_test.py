"""Kills, damages, stops and starves small trainings, resumes them, and compares them with undisturbed ones.

A kill is lost where the resume failed or went back further than the newest checkpoint on the disk; a training is
different where its weights, states, records, curves or detections are not bit for bit those of the undisturbed one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from benchmarks.machine import full_record, headline, write_json
from data import make_shapes
from fault_injection.corruptions import all_broken, corrupt_and_resume
from fault_injection.disk import fill_and_resume
from fault_injection.kills import Durations, kill_and_resume
from fault_injection.report import num_faults, page, write_page
from fault_injection.signals import stop_and_resume
from fault_injection.training import FaultTestError, Life, Training, newest_on_disk, position, send, starts

KILLS_PER_TRAINING = 20
EPOCHS_FOR_SIGNALS = 5
"""One for each validation that is stopped, and one to go on in."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if not Path("/proc/self/environ").exists():
        print("fault_test: it needs Linux (/proc), to find the processes that it kills", file=sys.stderr)
        return 2
    if arguments.signals and arguments.epochs < EPOCHS_FOR_SIGNALS:
        print(
            f"fault_test: the signals need trainings of {EPOCHS_FOR_SIGNALS} epochs: give --epochs "
            f"{EPOCHS_FOR_SIGNALS} or more, or --no-signals",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="fault_test_") as temporary:
        work = (arguments.work_dir or Path(temporary)).resolve()
        if work.is_dir() and any(work.iterdir()):
            print(f"fault_test: {work} is not empty; give another --work-dir", file=sys.stderr)
            return 2
        try:
            found = _run(arguments, work)
        except FaultTestError as error:
            print(f"fault_test: {error}", file=sys.stderr)
            return 1
    record = full_record("faults", vars(arguments), found, "cuda" if arguments.device == "cuda" else "cpu")
    text = page(record, headline(record).replace("\n", "\n\n"))
    print(f"\n{text}")
    if arguments.report is not None:
        write_page(arguments.report, text)
    if arguments.json is not None:
        write_json(arguments.json, record)
    return 1 if num_faults(record) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs in all [100]")
    parser.add_argument("--corruptions", type=int, default=30, help="damaged checkpoints in all [30]")
    parser.add_argument("--signals", action=argparse.BooleanOptionalAction, default=True, help="[on]")
    parser.add_argument("--disk", action=argparse.BooleanOptionalAction, default=True, help="fill the disk [on]")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="of the trainings with several processes; 1: none [2]"
    )
    parser.add_argument("--epochs", type=int, default=6, help="of a training, 10 iterations each [6]")
    parser.add_argument("--checkpoint-iterations", type=int, default=2, help="[2]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="[cpu]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and damages [0]")
    parser.add_argument("--jobs", type=int, default=1, help="trainings that are killed at a time [1]")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="an empty folder; stays afterwards [temporary]")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found there")
    return parser


def _run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    say = _Reporter()
    begun = time.monotonic()
    data = make_shapes(work / "shapes", seed=1, num_train=64, num_val=4, size=(128, 96))
    trainings = _trainings(arguments, data)
    references = {training.name: work / f"undisturbed_{number}" for number, training in enumerate(trainings)}
    durations = {}
    for training in trainings:
        durations[training.name] = _undisturbed(training, references[training.name])
        say(f"{training.name}: undisturbed, {durations[training.name]}")
    killed = _kill_all(arguments, trainings, references, durations, work, say)

    corruptions, broken = [], ""
    if arguments.corruptions:
        first = trainings[0]
        stopped = _stopped(first, work / "stopped")
        corruptions = corrupt_and_resume(
            first, references[first.name], stopped, work / "corruptions",
            count=arguments.corruptions, random_state=random.Random(f"{arguments.seed} corruptions"), say=say,
        )  # fmt: skip
        broken = all_broken(first, stopped, work)
        say(f"every checkpoint broken: {broken or 'refused'}")
    signals = []
    if arguments.signals:
        for number, training in enumerate(trainings[:2]):
            random_state = random.Random(f"{arguments.seed} signals {number}")
            folder = work / f"signals_{number}"
            signals.append(
                stop_and_resume(training, references[training.name], folder, random_state=random_state, say=say)
            )
    disk = fill_and_resume(trainings[0], references[trainings[0].name], work / "disk", say) if arguments.disk else []
    return {
        "device": arguments.device,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "trainings": [entry.record() for entry in killed],
        "corruptions": [entry.record() for entry in corruptions],
        "all_broken": broken,
        "signals": [
            {"training": e.training, "cases": [c.record() for c in e.cases], "differences": e.differences}
            for e in signals
        ],
        "disk": [entry.record() for entry in disk],
    }


class _Reporter:
    """Lines with the time, from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, line: str) -> None:
        with self._lock:
            print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _trainings(arguments: argparse.Namespace, data: Path) -> list[Training]:
    several = arguments.processes
    kinds: list[tuple[str, int, tuple[str, ...]]] = [("1 process, EMA", 1, ("--ema", "0.9"))]
    if several > 1:
        kinds.append(
            (
                f"{several} processes, EMA, bf16, 2 micro-steps",
                several,
                ("--ema", "0.9", "--amp", "bf16", "--accumulate", "2"),
            )
        )
    kinds.append(("1 process and a loader process", 1, ("--workers", "1", "--checkpoint-minutes", "0.02")))
    return [
        Training(name, count, options, data, arguments.device, arguments.epochs, arguments.checkpoint_iterations)
        for name, count, options in kinds
    ]


def _undisturbed(training: Training, output: Path) -> Durations:
    """Train without a fault; how long its parts took."""
    life = Life(training, output, output.with_suffix(".txt"), resume=False).start()
    times: dict[str, float] = {}
    marks = {
        "first": lambda: position(output).iterations >= 1,
        "epoch": lambda: position(output).iterations >= 10,
        "validated": lambda: position(output).validated >= 10,
    }
    for name, has_come in marks.items():
        life.wait_until(has_come)
        times[name] = time.monotonic() - life.began
    statuses = life.wait()
    if statuses is None or any(statuses):
        raise FaultTestError(f"{training.name}: the undisturbed training failed ({statuses}):\n{life.last_words(30)}")
    iteration = (times["epoch"] - times["first"]) / 9
    return Durations(round(times["first"], 2), round(iteration, 3), round(times["validated"] - times["epoch"], 2))


def _stopped(training: Training, folder: Path) -> Path:
    """Output of a training that was killed in its second half, with a checkpoint before the newest."""
    import signal

    output = folder / "run"
    life = Life(training, output, folder / "log.txt").start()
    wanted = training.num_iterations - 7
    if not life.wait_until(lambda: newest_on_disk(output)[0] >= wanted):
        raise FaultTestError(f"{training.name}: it ended before it could be killed\n{life.last_words()}")
    for pid in life.rank_ids():
        send(pid, signal.SIGKILL)
    life.wait()
    assert starts(output)
    return output


def _kill_all(
    arguments: argparse.Namespace,
    trainings: list[Training],
    references: dict[str, Path],
    durations: dict[str, Durations],
    work: Path,
    say: _Reporter,
) -> list[Any]:
    """Trainings with kills, in turn, until there were as many kills as wanted."""
    results: list[Any] = []
    number = 0
    # Few kills are spread over all kinds of training.
    at_most = min(KILLS_PER_TRAINING, -(-arguments.kills // len(trainings)))
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        while (left := arguments.kills - sum(len(result.kills) for result in results)) > 0:
            round_results = []
            for _ in range(min(max(arguments.jobs, 1), -(-left // at_most))):
                training = trainings[number % len(trainings)]
                wanted = min(at_most, left)
                left -= wanted
                round_results.append(
                    pool.submit(
                        kill_and_resume,
                        training,
                        references[training.name],
                        durations[training.name],
                        work / f"killed_{number}",
                        wanted=wanted,
                        random_state=random.Random(f"{arguments.seed} kills {number}"),
                        say=say,
                        keep=False,
                    )
                )
                number += 1
            for future in round_results:
                result = future.result()
                outcome = result.failure or result.differences or "same bits"
                say(f"{result.training}: {len(result.kills)} kills, {outcome}")
                results.append(result)
            if all(not result.kills for result in results[-len(round_results) :]):
                raise FaultTestError("no training could be killed: all of them ended before")
    return results


if __name__ == "__main__":
    sys.exit(main())
