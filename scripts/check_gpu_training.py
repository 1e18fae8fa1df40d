"""A short training in bf16 that is killed and stopped on its way and resumed, beside the same one left alone.

Bit for bit where that is promised: on a CPU, and on a GPU with --deterministic. Elsewhere the losses are to stay close.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from benchmarks.machine import full_record, headline, write_json
from data import make_shapes
from fault_injection.comparison import differences
from fault_injection.training import FaultTestError, Life, Training, finish, newest_on_disk, position, send, starts

STOPPED = 75
CLOSE = 0.05
"""Median over the iterations of a loss's relative difference, where bits are not promised."""
EPOCHS = 2


@dataclass(frozen=True)
class RealTraining(Training):
    """train.py with a model and images of ordinary size (or tiny ones), without downloaded weights."""

    short: bool = False
    iterations_per_epoch: int = 30

    def command(self, output: Path, *more: str, resume: bool = True) -> list[str]:
        if self.short:
            return [*super().command(output, *more, resume=resume), "--amp", "bf16"]
        settings = {
            "--data-path": self.data,
            "--output-dir": output,
            "--model": "faster_rcnn_r50_fpn",
            "--weights": "none",
            "--schedule": "1x",
            "--amp": "bf16",
            "--device": self.device,
            "--batch-size": 8,
            "--max-epochs": self.epochs,
            "--limit-train-batches": self.iterations_per_epoch,
            "--limit-val-batches": 4,
            "--log-interval": 1,
            "--checkpoint-iterations": self.checkpoint_iterations,
        }
        words = [str(word) for pair in settings.items() for word in pair]
        options = [*self.options, *more, *(["--resume", "auto"] if resume else [])]
        return [str(checkout.ROOT / "train.py"), *words, *options]


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    work: Path = arguments.work_dir.resolve()
    if work.is_dir() and any(work.iterdir()):
        print(f"check_gpu_training: {work} is not empty; give another --work-dir", file=sys.stderr)
        return 2
    try:
        found = repeated(arguments, work) if arguments.repeat_deterministic else interrupted(arguments, work)
    except FaultTestError as error:
        print(f"check_gpu_training: {error}", file=sys.stderr)
        return 1
    record = full_record("interrupted training", vars(arguments), found, arguments.device)
    print(f"{headline(record)}\n")
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        write_json(arguments.json, record)
    return 1 if found["faults"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, metavar="DIR", help="an empty or new folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="[cuda]")
    parser.add_argument("--data-path", type=Path, metavar="DIR", help="a set in COCO's layout [generated images]")
    parser.add_argument("--short", action="store_true", help="a tiny model and tiny images")
    parser.add_argument(
        "--repeat-deterministic",
        action="store_true",
        help="instead: a few iterations with --deterministic, twice, to the same bits",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def interrupted(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Killed in the first epoch, stopped with SIGINT in the second; {"faults": [...], figures}."""
    training = _training(arguments, work, (), EPOCHS)
    alone, disturbed, log = work / "alone", work / "disturbed", work / "disturbed.txt"
    finish(training, alone, work / "alone.txt", resume=False)
    epoch = position(alone).iterations // EPOCHS
    faults: list[str] = []

    life = _started(training, disturbed, log, lambda: newest_on_disk(disturbed)[0] >= training.checkpoint_iterations)
    send(life.rank_ids()[0], signal.SIGKILL)
    life.wait()
    saved = newest_on_disk(disturbed)[0]

    in_second_epoch = epoch + epoch // 2
    life = _started(
        training,
        disturbed,
        log,
        lambda: len(starts(disturbed)) == 2 and position(disturbed).iterations >= in_second_epoch,
    )
    if starts(disturbed)[-1] != saved:
        faults.append(f"resumed at iteration {starts(disturbed)[-1]}, though a checkpoint had {saved}")
    send(life.rank_ids()[0], signal.SIGINT)
    statuses = life.wait()
    if statuses != [STOPPED]:
        faults.append(f"SIGINT ended the training with {statuses} instead of {STOPPED}")
    finish(training, disturbed, log)

    ours, theirs = _losses(disturbed), _losses(alone)
    if list(ours) != list(range(EPOCHS * epoch)) or list(theirs) != list(ours):
        faults.append(f"iterations recorded: {list(ours)}")
        return {"faults": faults}
    relative = [abs(ours[i] - theirs[i]) / abs(theirs[i]) for i in ours]
    unequal = differences(alone, disturbed)
    promised = training.device == "cpu"
    if promised and unequal:
        faults += unequal[:5]
    if statistics.median(relative) > CLOSE:
        faults.append(f"the losses are {statistics.median(relative):.1%} apart (median)")
    return {
        "faults": faults,
        "device": training.device,
        "iterations": EPOCHS * epoch,
        "resumed_at": starts(disturbed),
        "same_bits": not unequal,
        "same_bits_promised": promised,
        "loss_difference_median": statistics.median(relative),
        "loss_difference_largest": max(relative),
        "first_and_last_loss": [theirs[0], theirs[EPOCHS * epoch - 1]],
        "images_per_second": _images_per_second(alone),
    }


def repeated(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """A few iterations with --deterministic, twice; {"faults": [...], figures}."""
    training = _training(arguments, work, ("--deterministic",), 1)
    outputs = [work / "first", work / "second"]
    for output in outputs:
        finish(training, output, output.with_suffix(".txt"), more=("--limit-train-batches", "3"), resume=False)
    unequal = differences(*outputs)
    return {
        "faults": unequal[:5],
        "device": training.device,
        "same_bits": not unequal,
        "images_per_second": _images_per_second(outputs[0]),
    }


def _training(arguments: argparse.Namespace, work: Path, options: tuple[str, ...], epochs: int) -> RealTraining:
    data = arguments.data_path
    if data is None:
        number, size = ((64, 4), (128, 96)) if arguments.short else ((240, 32), (640, 480))
        data = make_shapes(work / "shapes", seed=1, num_train=number[0], num_val=number[1], size=size)
    return RealTraining("bf16", 1, options, data, arguments.device, epochs, 4, short=arguments.short)


def _started(training: Training, output: Path, log: Path, has_come: Callable[[], bool]) -> Life:
    """The training, started or gone on with, at the moment asked for."""
    life = Life(training, output, log).start()
    if not life.wait_until(has_come):
        raise FaultTestError(f"{output.name}: it ended before it could be disturbed\n{life.last_words(30)}")
    return life


def _records(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def _losses(output: Path) -> dict[int, float]:
    """By iteration, in the order of the file.

    Raises:
        FaultTestError: an iteration stands in it twice.
    """
    losses = {record["iteration"]: record["loss"] for record in _records(output)}
    if len(losses) != len(_records(output)):
        raise FaultTestError(f"{output.name}: metrics.jsonl has an iteration twice")
    return losses


def _images_per_second(output: Path) -> float:
    """Median over the later half: the first iterations are slower than what follows."""
    rates = [record["images_per_second"] for record in _records(output)]
    return statistics.median(rates[len(rates) // 2 :])


if __name__ == "__main__":
    sys.exit(main())
