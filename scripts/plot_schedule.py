"""The learning rate of a schedule at every iteration, as a table (CSV) and as an image (PNG)."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import checkout  # noqa: F401
from detection.config.arg_types import positive_int
from schedules import LinearLR, MultiStepLR, Schedule, ScheduleError, load_schedule, with_overrides


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    length = arguments.iterations_per_epoch
    try:
        schedule, lines = with_overrides(load_schedule(arguments.schedule), dict(arguments.set))
        if arguments.batch_size_total is not None:
            schedule = schedule.scaled(arguments.batch_size_total)
        rates = [schedule.learning_rate(i, length) for i in range(schedule.max_epochs * length)]
    except ScheduleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in [*schedule.notes, *lines, *schedule.describe()]:
        print(line)
    if arguments.csv:
        write_csv(arguments.csv, rates, length)
        print(f"{arguments.csv}: {len(rates)} iterations")
    if arguments.png:
        try:
            draw(arguments.png, schedule, rates, length)
        except ModuleNotFoundError as error:
            print(f"error: {error}; the image needs matplotlib: pip install matplotlib", file=sys.stderr)
            return 2
        print(arguments.png)
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--schedule", default="1x", metavar="NAME|FILE", help="1x, 2x, 20e, or a schedule file")
    result.add_argument(
        "--iterations-per-epoch",
        type=positive_int,
        default=7330,
        metavar="N",
        help="optimizer steps in an epoch (default 7330: COCO train2017 at a global batch of 16)",
    )
    result.add_argument(
        "--batch-size-total",
        type=positive_int,
        metavar="N",
        help="images per optimizer step over all processes: scales the learning rate by N / base_batch_size",
    )
    result.add_argument("--csv", type=Path, metavar="FILE", help="write iteration,epoch,lr (both counted from 0)")
    result.add_argument("--png", type=Path, metavar="FILE", help="draw the curve (needs matplotlib)")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="KEY=VALUE",
        help="override, as in train.py",
    )
    return result


def assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, not {text}")
    return key.strip(), value


def write_csv(path: Path, rates: list[float], iterations_per_epoch: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("iteration", "epoch", "lr"))
        writer.writerows((i, i // iterations_per_epoch, repr(lr)) for i, lr in enumerate(rates))


def draw(path: Path, schedule: Schedule, rates: list[float], iterations_per_epoch: int) -> None:
    """The whole run over epochs with its milestones, and beside it the warmup, if there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    warmup = warmup_iterations(schedule, len(rates), iterations_per_epoch)
    figure = Figure(figsize=(12, 4.8) if warmup else (8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if warmup else 1, squeeze=False, width_ratios=(5, 3) if warmup else None)[0]
    whole = panels[0]
    whole.plot([i / iterations_per_epoch for i in range(len(rates))], rates, linewidth=1.8)
    whole.set(xlabel="epoch", ylabel="learning rate", ylim=(0, 1.2 * max(rates)), xlim=(0, schedule.max_epochs))
    whole.set_title("whole run")
    for number, epoch in enumerate(milestones(schedule, iterations_per_epoch)):
        rate = rates[round(epoch * iterations_per_epoch)]
        whole.axvline(epoch, color="tab:red", linestyle="--", linewidth=1)
        whole.annotate(
            f"after epoch {epoch:g}\nlr {rate:.3g}",
            (epoch, 0.98 - 0.1 * (number % 2)),  # neighbors would run into each other
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            color="tab:red",
            fontsize=9,
        )
    iteration_axis = whole.secondary_xaxis(
        -0.16, functions=(lambda e: e * iterations_per_epoch, lambda i: i / iterations_per_epoch)
    )
    iteration_axis.set_xlabel("iteration")
    if warmup:
        shown = min(len(rates), round(1.25 * warmup) + 1)
        start = panels[1]
        start.plot(range(shown), rates[:shown], linewidth=1.8)
        start.axvline(warmup - 1, color="tab:gray", linestyle=":", linewidth=1)
        start.annotate(
            f"{rates[0]:.3g} at iteration 0\n{rates[warmup - 1]:.3g} at iteration {warmup - 1}",
            (0.97, 0.05),
            xycoords="axes fraction",
            ha="right",
            va="bottom",
            fontsize=9,
            backgroundcolor="white",
        )
        start.set(xlabel="iteration", ylabel="learning rate", xlim=(0, shown), ylim=(0, None))
        start.set_title("warmup")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.suptitle(
        f"schedule {schedule.name}: {schedule.optimizer.type}, lr {schedule.optimizer.lr:g}, "
        f"{schedule.max_epochs} epochs of {iterations_per_epoch} iterations"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def milestones(schedule: Schedule, iterations_per_epoch: int) -> list[float]:
    """The milestones inside the run, in epochs."""
    found = set()
    for scheduler in schedule.param_schedulers:
        if isinstance(scheduler, MultiStepLR):
            unit = 1 if scheduler.by_epoch else iterations_per_epoch
            end = min(schedule.max_epochs, (scheduler.end or schedule.max_epochs * unit) / unit)
            found |= {epoch for m in scheduler.milestones if (epoch := (scheduler.begin + m) / unit) < end}
    return sorted(found)


def warmup_iterations(schedule: Schedule, total: int, iterations_per_epoch: int) -> int:
    """Number of iterations of the warmup that starts the run, 0 where there is none."""
    for scheduler in schedule.param_schedulers:
        if isinstance(scheduler, LinearLR) and scheduler.begin == 0 and scheduler.start_factor < scheduler.end_factor:
            unit = iterations_per_epoch if scheduler.by_epoch else 1
            return min(total, int((scheduler.end or total) * unit))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
