"""Several runs beside each other: figures, curves, and what differs in their configurations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detection.errors import DetectionError
from detection.reporting.metrics_log import metric_of, read_metrics
from detection.reporting.tables import FIGURES, UNDEFINED, aligned, figure

NUM_LAST_LOSSES = 100  # the loss of a table is the mean over so many of the last records
SMOOTHING_FRACTION = 0.02  # a loss curve is averaged over this part of it


class RunsError(DetectionError):
    """Output directories that cannot be compared; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """What an output directory says of its run."""

    name: str
    config: dict[str, Any]
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]

    @property
    def best_metric(self) -> str:
        """The figure that --best-metric named."""
        return str(self.config.get("config", {}).get("train", {}).get("best_metric", "mAP"))

    def best(self) -> dict[str, Any] | None:
        """The first of the validation records that are best by it; None where it is defined in none."""
        values = [(metric_of(record, self.best_metric), record) for record in self.val]
        defined = [(value, record) for value, record in values if value is not None]
        return max(defined, key=lambda pair: pair[0], default=(None, None))[1]


def read_runs(directories: Sequence[str | Path]) -> list[Run]:
    """Reads metrics.jsonl and config.json of output directories; named by the parts of their paths that differ."""
    paths = [Path(directory) for directory in directories]
    names = _short_names(paths)
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def comparison_table(runs: Sequence[Run]) -> str:
    """One line a run: how far it came, its last loss and pace, and the figures of its best validation."""
    rows = [["run", "iterations", "loss", "images/s", "best epoch", *FIGURES, "last mAP"]]
    for run in runs:
        best = run.best() or {}
        losses = [record["loss"] for record in run.train[-NUM_LAST_LOSSES:] if "loss" in record]
        paces = [record["images_per_second"] for record in run.train if "images_per_second" in record]
        row = [
            run.name,
            str(run.train[-1]["iteration"] + 1) if run.train else "-",
            f"{np.mean(losses):.4f}" if losses else "-",
            f"{np.median(paces):.1f}" if paces else "-",
            str(best["epoch"] + 1) if best else "-",  # records count epochs from 0, people from 1
            *(figure(best.get(name)) for name in FIGURES),
            figure(run.val[-1].get("mAP")) if run.val else "-",
        ]
        rows.append(row)
    table = "\n".join(aligned(rows, left_columns={0}))
    for run in runs:
        if run.best_metric != "mAP":
            table += f"\nnote: the best epoch of {run.name} is that of {run.best_metric} (--best-metric)"
    sizes = {run.name: run.val[-1]["num_images"] for run in runs if run.val and "num_images" in run.val[-1]}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        table += f"\nnote: figures of different numbers of validation images do not compare: {listed}"
    return table


def configuration_differences(runs: Sequence[Run]) -> str:
    """One line a setting of config.json (dotted key) that is not the same in all runs; "-" where a run has none.

    When and with which command a run was started (`starts`) is no setting.
    """
    flat = [flattened({key: value for key, value in run.config.items() if key != "starts"}) for run in runs]
    rows = [["setting", *(run.name for run in runs)]]
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = [settings.get(key, "-") for settings in flat]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if len(rows) == 1:
        return "no setting differs"
    return "\n".join(aligned(rows, left_columns=set(range(len(rows[0])))))


def plot_runs(runs: Sequence[Run], path: str | Path) -> None:
    """Loss, learning rate and mAP of the runs over the iterations, as a PNG. Needs matplotlib (the extra "plots")."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RunsError("an image needs matplotlib: pip install matplotlib, or leave --png out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, (loss_axes, lr_axes, map_axes) = pyplot.subplots(1, 3, figsize=(18, 5), layout="constrained")
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        iterations, losses = series(run.train, "loss")
        loss_axes.plot(iterations, losses, color=color, alpha=0.2, linewidth=0.8)
        loss_axes.plot(iterations, _smoothed(losses), color=color, label=run.name)
        lr_axes.plot(*series(run.train, "lr"), color=color, label=run.name)
        map_axes.plot(*series(run.val, "mAP"), color=color, marker="o", markersize=4, label=run.name)
    for axes, title in ((loss_axes, "loss"), (lr_axes, "learning rate"), (map_axes, "mAP (IoU 0.50:0.95)")):
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.3)
    all_losses = np.concatenate([_smoothed(series(run.train, "loss")[1]) for run in runs])
    if len(all_losses):  # the noise and the first iterations may run out of the image; the curves may not
        loss_axes.set_ylim(0, 1.15 * float(np.quantile(all_losses, 0.995)))
    map_axes.set_ylim(bottom=0)
    map_axes.legend()
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)


def _read_run(path: Path, name: str) -> Run:
    metrics_file, config_file = path / "metrics.jsonl", path / "config.json"
    if not metrics_file.is_file():
        raise RunsError(f"{path}: no metrics.jsonl there; give the output directory of a run (its --output-dir)")
    records = read_metrics(metrics_file)
    try:
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    except ValueError as error:
        raise RunsError(f"{config_file}: not valid JSON ({error})") from error
    train, val = ([record for record in records if record.get("kind") == kind] for kind in ("train", "val"))
    return Run(name, config, train, val)


def _short_names(paths: Sequence[Path]) -> list[str]:
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) != len(resolved):
        raise RunsError("the same output directory is given twice")
    num_parts = 1
    while len({path.parts[-num_parts:] for path in resolved}) < len(resolved):
        num_parts += 1
    return ["/".join(path.parts[-num_parts:]) for path in resolved]


def flattened(settings: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as a person writes it; places in lists of anything but plain values are numbers."""
    if isinstance(settings, Mapping):
        pairs = list(settings.items())
    elif isinstance(settings, list) and any(isinstance(value, (Mapping, list)) for value in settings):
        # Those of --model-set are pairs of key and value.
        is_pairs = all(isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) for each in settings)
        pairs = settings if is_pairs else list(enumerate(settings))
    else:
        values = settings if isinstance(settings, list) else [settings]
        return {prefix: " ".join(each if isinstance(each, str) else json.dumps(each) for each in values) or "none"}
    flat: dict[str, str] = {}
    for key, value in pairs:
        flat |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations int64 [n] and values float64 [n] of the records where the figure is there, finite and defined."""
    iterations = np.array([record["iteration"] for record in records], dtype=np.int64)
    values = np.array([record.get(name) for record in records], dtype=np.float64)  # NaN where there is none
    shown = np.isfinite(values) & (values != UNDEFINED)
    return iterations[shown], values[shown]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The running mean over a window centered on each value, narrower at the ends."""
    half = int(len(values) * SMOOTHING_FRACTION / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
