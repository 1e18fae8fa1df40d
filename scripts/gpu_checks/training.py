"""A short training in bf16 that is killed and stopped on its way and resumed, beside the same one left alone.

Bit for bit where that is promised: on a CPU, and on a GPU with --deterministic. Elsewhere the losses are to stay close.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where checkout.py and the other parts are

import checkout
from benchmarks.figures import full_record, headline, write_json
from data import make_shapes
from fault_injection.comparison import differences
from fault_injection.interruptions import STOPPED
from fault_injection.training import FaultTestError, Life, Training, newest_on_disk, position, starts

CLOSE = 0.05
"""Median over the iterations of a loss's relative difference, where bits are not promised."""
EPOCHS = 2


@dataclass(frozen=True)
class RealTraining(Training):
    """train.py with a model and images of ordinary size (or tiny ones), without downloaded weights."""

    short: bool = False

    def command(self, output: Path, *more: str, resume: bool = True) -> list[str]:
        if self.short:
            return [*super().command(output, *more, resume=resume), "--amp", "bf16"]
        settings = (
            "--model faster_rcnn_r50_fpn --weights none --schedule 1x --amp bf16 --batch-size 8 --log-interval 1 "
            f"--limit-train-batches 30 --limit-val-batches 4 --max-epochs {self.epochs} --device {self.device} "
            f"--checkpoint-iterations {self.checkpoint_iterations}"
        )
        places = ["--data-path", str(self.data), "--output-dir", str(output)]
        options = [*self.options, *more, *(["--resume", "auto"] if resume else [])]
        return [str(checkout.ROOT / "train.py"), *places, *settings.split(), *options]


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    work, data = arguments.work_dir, arguments.data_path
    if data is None:
        number, size = ((64, 4), (128, 96)) if arguments.short else ((240, 32), (640, 480))
        data = make_shapes(work / "shapes", seed=1, num_train=number[0], num_val=number[1], size=size)
    check = repeated if arguments.repeat_deterministic else interrupted
    try:
        found = check(data, arguments.device, arguments.short, work)
    except FaultTestError as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    record = full_record("interrupted training", vars(arguments), found, arguments.device)
    print(f"{headline(record)}\n\n{json.dumps(found, indent=1)}")
    if arguments.json is not None:
        write_json(arguments.json, record)
    return 1 if found["faults"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work-dir", type=checkout.empty_folder, required=True, metavar="DIR", help="an empty or new folder")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="[cuda]")
    add("--data-path", type=Path, metavar="DIR", help="a set in COCO's layout [generated images]")
    add("--short", action="store_true", help="a tiny model and tiny images")
    add("--repeat-deterministic", action="store_true", help="instead: 3 iterations with --deterministic, twice")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def interrupted(data: Path, device: str, short: bool, work: Path) -> dict[str, Any]:
    """Killed in the first epoch, stopped with SIGINT in the second; {"faults": [...], figures}."""
    training = RealTraining("bf16", 1, (), data, device, EPOCHS, 4, short=short)
    alone, disturbed, log = work / "alone", work / "disturbed", work / "disturbed.txt"
    Life(training, alone, work / "alone.txt", resume=False).start().finish()
    num_iterations = position(alone).iterations
    faults: list[str] = []

    life = Life(training, disturbed, log).start()
    life.reach(lambda: newest_on_disk(disturbed)[0] >= training.checkpoint_iterations)
    life.send(signal.SIGKILL)
    life.wait()
    saved = newest_on_disk(disturbed)[0]
    in_second_epoch = num_iterations * 3 // 4
    life = Life(training, disturbed, log).start()
    life.reach(lambda: len(starts(disturbed)) == 2 and position(disturbed).iterations >= in_second_epoch)
    if starts(disturbed)[-1] != saved:
        faults.append(f"resumed at iteration {starts(disturbed)[-1]}, though a checkpoint had {saved}")
    life.send(signal.SIGINT)
    statuses = life.wait()
    if statuses != [STOPPED]:
        faults.append(f"SIGINT ended the training with {statuses} instead of {STOPPED}")
    Life(training, disturbed, log).start().finish()

    ours, theirs = _train_records(disturbed), _train_records(alone)
    recorded = [record["iteration"] for record in ours]
    if not recorded == [record["iteration"] for record in theirs] == list(range(num_iterations)):
        return {"faults": [*faults, f"iterations recorded: {recorded}"]}
    pairs = [(one["loss"], other["loss"]) for one, other in zip(ours, theirs, strict=True)]
    relative = [abs(one - other) / abs(other) for one, other in pairs]
    unequal = differences(alone, disturbed)
    promised = device == "cpu"
    faults += unequal[:5] if promised else []
    if statistics.median(relative) > CLOSE:
        faults.append(f"the losses are {statistics.median(relative):.1%} apart (median)")
    return {
        "faults": faults,
        "device": device,
        "iterations": num_iterations,
        "resumed_at": starts(disturbed),
        "same_bits": not unequal,
        "same_bits_promised": promised,
        "loss_difference_median": statistics.median(relative),
        "loss_difference_largest": max(relative),
        "first_and_last_loss": [theirs[0]["loss"], theirs[-1]["loss"]],
        "images_per_second": _images_per_second(alone),
    }


def repeated(data: Path, device: str, short: bool, work: Path) -> dict[str, Any]:
    """A few iterations with --deterministic, twice; {"faults": [...], figures}."""
    training = RealTraining("bf16", 1, ("--deterministic",), data, device, 1, 4, short=short)
    outputs = [work / "first", work / "second"]
    for output in outputs:
        more = ("--limit-train-batches", "3")
        Life(training, output, output.with_suffix(".txt"), more=more, resume=False).start().finish()
    unequal = differences(*outputs)
    rate = _images_per_second(outputs[0])
    return {"faults": unequal[:5], "device": device, "same_bits": not unequal, "images_per_second": rate}


def _train_records(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def _images_per_second(output: Path) -> float:
    """Median over the later half: the first iterations are slower than what follows."""
    rates = [record["images_per_second"] for record in _train_records(output)]
    return statistics.median(rates[len(rates) // 2 :])


if __name__ == "__main__":
    sys.exit(main())
