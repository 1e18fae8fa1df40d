"""A run as one HTML page: configuration, curves, speed, errors, and the command that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from shlex import join, quote
from string import Template
from typing import Any

import numpy as np

from detection.evaluation.html_page import Curve, fraction, html_page, line_chart, table
from detection.evaluation.html_report import METRIC_MEANINGS
from detection.reporting import Run, counted, duration
from detection.reporting.metrics_log import LOSS
from detection.reporting.run_comparison import NUM_LAST_LOSSES, flattened, series

HEADLINE = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "mAP_r", "mAP_c", "mAP_f", "AR_100", "AR_300")


def run_page(run: Run, *, analysis: str = "", missing: Sequence[str] = ()) -> str:
    """The page.

    Args:
        run: what the output directory holds.
        analysis: sections of the last validation's detections, HTML (analysis_sections).
        missing: what could not be shown, and why; a line each.
    """
    template = resources.files("detection.engine.metrics").joinpath("run_page.html").read_text("utf-8")
    missing = [*missing, *([] if run.config else ["config.json is not there: no configuration, no command"])]
    body = Template(template).substitute(
        headline=_headline(run),
        missing="".join(f'<p class="missing">Not shown: {escape(line)}</p>' for line in missing),
        repeat=_repeat(run),
        curves=_curves(run) or "<p>No iteration was logged.</p>",
        validations=_validations(run),
        speed=_speed(run),
        speed_curves=_speed_curves(run),
        analysis=analysis,
        configuration=_configuration(run),
    )
    return html_page(run.name, body)


def _headline(run: Run) -> str:
    best, losses = run.best(), series(run.train, "loss")[1]
    heads, cells = ["iterations", "mean loss"], [f"{_iterations(run):,}", "–"]
    if len(losses):
        cells[1] = f"{losses[-NUM_LAST_LOSSES:].mean():.4f}"
    if best is not None:
        heads += ["best epoch", *(name for name in HEADLINE if name in best)]
        cells += [str(best["epoch"] + 1), *(fraction(best[name]) for name in HEADLINE if name in best)]
    meanings = METRIC_MEANINGS | {
        "mean loss": f"mean over the last {min(NUM_LAST_LOSSES, len(losses))} iterations",
        "best epoch": f"the validation with the best {run.best_metric}, of which best.pt has the weights",
    }
    return table(heads, [cells], meanings=meanings)


def _iterations(run: Run) -> int:
    return run.train[-1]["iteration"] + 1 if run.train else 0


def _repeat(run: Run) -> str:
    starts = run.config.get("starts", [])
    if not starts:
        return "<p>The run's starts are not recorded.</p>"
    first, *later = starts
    # The later of two options counts, and the run's own directory is full.
    parts = [f"<pre>{escape(start_command(first))} --output-dir {escape(quote(run.name + '_again'))}</pre>"]
    facts = [f"{counted(first['world_size'], 'process', 'processes')} on {run.config.get('device', '?')}"]
    if run.config.get("git_commit"):
        facts.append(f"commit {run.config['git_commit']}")
    facts += [f"{name} {version}" for name, version in run.config.get("versions", {}).items()]
    parts.append(f'<p class="quiet">{escape(", ".join(facts))}</p>')
    parts.append("<p>train.py --config with this run's config.json repeats it with the settings of its last start.</p>")
    if later:
        rows = [
            [start["time"], f"{start['iteration']:,}", str(start["world_size"]), start_command(start)]
            for start in starts
        ]
        parts.append(
            f"<p>The run was resumed {counted(len(later), 'time')}; each start counts with its own options:</p>"
        )
        parts.append(table(["start", "from iteration", "processes", "command"], rows, is_text=True))
    return "\n".join(parts)


def start_command(start: dict[str, Any]) -> str:
    """The command of a start in config.json, with torchrun where several processes took part."""
    program, *words = start["command"]
    if start["world_size"] == 1:
        return join([program, *words])
    return join(["torchrun", f"--nproc_per_node={start['world_size']}", *words])


def _curves(run: Run) -> str:
    train = {name: Curve(*series(run.train, name)) for name in _figures(run.train)}
    val = {name: Curve(*series(run.val, name), dots=True) for name in _figures(run.val)}
    parts = [name for name in train if name.startswith("loss_")]
    losses = {"train": train["loss"]} if "loss" in train else {}
    if "loss" in val:
        losses["validation"] = val["loss"]
    charts = [
        line_chart("Loss", losses, x_name="iteration", from_zero=True),
        _chart("mAP", val, ("mAP", "mAP_50", "mAP_75")),
        _chart("Learning rate", train, ("lr",)),
        _chart("Parts of the loss", train, parts),
        _chart("mAP by object size", val, ("mAP_s", "mAP_m", "mAP_l")),
        _chart("Gradient norm", train, ("grad_norm",)),
    ]
    return "\n".join(filter(None, charts))


def _chart(title: str, curves: dict[str, Curve], names: Sequence[str]) -> str:
    shown = {name: curves[name] for name in names if name in curves}
    return line_chart(title, shown, x_name="iteration", from_zero=True)


def _figures(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the numbers in any of the records."""
    named = {name: None for record in records for name, value in record.items() if isinstance(value, (int, float))}
    return [name for name in named if name not in ("iteration", "epoch")]


def _validations(run: Run) -> str:
    if not run.val:
        return "<p>No validation has been run.</p>"
    names = [name for name in (*METRIC_MEANINGS, LOSS) if any(name in record for record in run.val)]
    best = run.best()
    rows = [
        [
            f"{record['epoch'] + 1}{' (best)' if record is best else ''}",
            f"{record['iteration'] + 1:,}",
            *(fraction(record.get(name)) for name in names),
            duration(record.get("seconds", -1)),
        ]
        for record in run.val
    ]
    head = ["epoch", "iterations", *names, "time"]
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.val[-1].get("notes", []))
    listed = table(head, rows, sortable=True, meanings=METRIC_MEANINGS) + (f"<ul>{notes}</ul>" if notes else "")
    shown = best if best is not None else run.val[-1]
    classes = [[name, fraction(value)] for name, value in shown.get("per_class", {}).items()]
    if classes:
        words = f"AP of each class in epoch {shown['epoch'] + 1}"
        listed += f"<details><summary>{words}</summary>{table(['class', 'AP'], classes, sortable=True)}</details>"
    return listed


def _speed(run: Run) -> str:
    rows = []
    paces, waits = series(run.train, "images_per_second")[1], series(run.train, "idle_share")[1]
    if len(paces):
        low, middle, high = np.quantile(paces, [0.1, 0.5, 0.9]).tolist()
        rows.append(["training", f"{middle:.1f} images/s (median; {low:.1f} to {high:.1f} in eight of ten iterations)"])
    if (batch := _global_batch(run)) and len(paces):
        rows.append(["training, all iterations", duration(float((batch / np.maximum(paces, 1e-9)).sum()))])
    if len(waits):
        rows.append(["waiting for data", f"{waits.mean():.1%} of the training time"])
    memory = series(run.train, "memory_gb")[1]
    if len(memory):
        rows.append(["GPU memory", f"{memory.max():.1f} GB at most"])
    seconds, val_paces = series(run.val, "seconds")[1], series(run.val, "images_per_second")[1]
    if len(seconds) and len(val_paces):
        rows.append(["validation", f"{np.median(val_paces):.1f} images/s, {duration(float(np.median(seconds)))} each"])
        rows.append(["validation, all", duration(float(seconds.sum()))])
    if not rows:
        return "<p>No times are recorded.</p>"
    return table(["what", "figure"], [*rows, ["device", str(run.config.get("device", "–"))]], is_text=True)


def _global_batch(run: Run) -> int | None:
    """Images of an iteration, by config.json."""
    try:
        accumulate = run.config["schedule"]["optim_wrapper"]["accumulative_counts"]
        return run.config["config"]["train"]["batch_size"] * run.config["starts"][-1]["world_size"] * accumulate
    except (KeyError, IndexError, TypeError):
        return None


def _speed_curves(run: Run) -> str:
    train = {name: Curve(*series(run.train, name)) for name in ("images_per_second", "idle_share")}
    pace = _chart("Images per second", train, ("images_per_second",))
    return pace + _chart("Part of the time in which the device waits for data", train, ("idle_share",))


def _configuration(run: Run) -> str:
    settings = {**run.config.get("config", {}), "schedule": run.config.get("schedule", {})}
    rows = [[key, value] for key, value in flattened(settings).items() if value not in ("null", "[]", "{}", "none")]
    if not rows:
        return "<p>config.json is not there.</p>"
    return table(["setting", "value"], rows, is_text=True)
