"""The learning rate of a schedule at every iteration, as a table (CSV) and as an image (PNG)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from checkout import exit_status, program_parser
from detection.config.arg_types import png_file, positive_int
from schedules import MultiStepLR, Schedule, ScheduleError, load_schedule, with_overrides

MOST_ITERATIONS = 20_000_000
"""A list of as many rates takes half a gigabyte, and a minute."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return exit_status(lambda: _plot(arguments), ScheduleError)


def _parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add(
        "--schedule",
        default="1x",
        metavar="NAME|FILE",
        help="1x, 2x, 20e, or a file of MMDetection: a schedule or a configuration",
    )
    text = "optimizer steps in an epoch (default 7330: COCO train2017 at a global batch of 16)"
    add("--iterations-per-epoch", type=positive_int, default=7330, metavar="N", help=text)
    text = "images per optimizer step over all processes: scales the learning rate by N / base_batch_size"
    add("--batch-size-total", type=positive_int, metavar="N", help=text)
    add("--csv", type=Path, metavar="FILE", help="write iteration,epoch,lr (both counted from 0)")
    add("--png", type=png_file, metavar="FILE", help="draw the curve (needs matplotlib)")
    add("--set", action="append", default=[], type=_assignment, metavar="KEY=VALUE", help="override, as in train.py")
    return parser


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, not {text}")
    return key.strip(), value


def _plot(arguments: argparse.Namespace) -> int:
    length = arguments.iterations_per_epoch
    schedule, lines = with_overrides(load_schedule(arguments.schedule), dict(arguments.set))
    if arguments.batch_size_total is not None:
        schedule = schedule.scaled(arguments.batch_size_total)
    iterations = schedule.max_epochs * length
    if iterations > MOST_ITERATIONS:
        raise ScheduleError(
            f"{schedule.max_epochs} epochs of {length:,} iterations are {iterations:,} learning rates; at most "
            f"{MOST_ITERATIONS:,} are computed: give a smaller --iterations-per-epoch"
        )
    rates = [schedule.learning_rate(i, length) for i in range(iterations)]
    for line in [*schedule.notes, *lines, *schedule.describe()]:
        print(line)
    if arguments.csv:
        rows = "".join(f"{i},{i // length},{rate!r}\n" for i, rate in enumerate(rates))
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        arguments.csv.write_text("iteration,epoch,lr\n" + rows, encoding="utf-8")
        print(f"{arguments.csv}: {len(rates)} iterations")
    if arguments.png:
        try:
            _draw(arguments.png, schedule, rates, length)
        except ModuleNotFoundError as error:
            raise ScheduleError(f"{error}; the image needs matplotlib: pip install matplotlib") from error
        print(arguments.png)
    return 0


def _draw(path: Path, schedule: Schedule, rates: list[float], iterations_per_epoch: int) -> None:
    """The whole run over epochs, its milestones marked, and beside it the warmup where the run starts with one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    warmup = max(range(len(rates)), key=rates.__getitem__)  # the first iteration at the highest rate
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    whole, *starts = figure.subplots(1, 1 + bool(warmup), squeeze=False, width_ratios=(5, 3)[: 1 + bool(warmup)])[0]
    whole.plot([i / iterations_per_epoch for i in range(len(rates))], rates, linewidth=1.8)
    whole.set(title="whole run", xlabel="epoch", ylabel="learning rate", ylim=(0, 1.2 * max(rates)))
    for number, iteration in enumerate(_milestones(schedule, iterations_per_epoch)):
        epoch = iteration / iterations_per_epoch
        whole.axvline(epoch, color="tab:red", linestyle="--", linewidth=1)
        # Neighbors at one height would run into each other.
        height = (1.15 - 0.12 * (number % 2)) * max(rates)
        text = f"after epoch {epoch:g}\nlr {rates[iteration]:.3g} "
        whole.text(epoch, height, text, color="tab:red", fontsize=9, ha="right", va="top")
    for start in starts:
        start.plot(rates[: round(1.25 * warmup) + 2], linewidth=1.8)
        start.set(title=f"warmup: {rates[0]:.3g} at iteration 0, {rates[warmup]:.3g} at {warmup}", xlabel="iteration")
    for panel in (whole, *starts):
        panel.grid(alpha=0.3)
    figure.suptitle(
        f"schedule {schedule.name}: {schedule.optimizer.type}, lr {schedule.optimizer.lr:g}, "
        f"{schedule.max_epochs} epochs of {iterations_per_epoch} iterations"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _milestones(schedule: Schedule, iterations_per_epoch: int) -> list[int]:
    """The milestones inside the run, in iterations."""
    found = set()
    for scheduler in schedule.param_schedulers:
        if isinstance(scheduler, MultiStepLR):
            unit = iterations_per_epoch if scheduler.by_epoch else 1
            end = min(schedule.max_epochs * iterations_per_epoch, (scheduler.end or sys.maxsize) * unit)
            found |= {place for one in scheduler.milestones if (place := round((scheduler.begin + one) * unit)) < end}
    return sorted(found)


if __name__ == "__main__":
    raise SystemExit(main())
