"""An analysis as PNG files. Needs matplotlib (the extra "plots")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from detection.evaluation.html_report import CURVE_COLORS, CURVE_NAMES, KIND_COLORS, short_count

MAX_NAMED_CLASSES = 100
MAX_NUMBERED_CLASSES = 60


def save_plots(analysis: dict[str, Any], folder: Path) -> list[Path]:
    """Writes precision_recall.png, error_kinds.png, confusion_matrix.png and class_ap.png.

    Args:
        analysis: what `analyze_results` returns.

    Returns:
        The written files; a plot that has nothing to show is left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no window

    def save(figure: Any, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / name, dpi=110, bbox_inches="tight")
        return folder / name

    files = []
    curves = analysis["precision_recall"]
    if curves["mean"]:
        figure = Figure(figsize=(6, 4.5))
        axes = figure.subplots()
        for key, precision in curves["mean"].items():
            area = f"{CURVE_NAMES[key]}: {np.mean(precision):.3f}"
            axes.plot(curves["recall"], precision, color=CURVE_COLORS[key], label=area)
        axes.set(xlabel="recall", ylabel="precision, mean over classes", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
        files.append(save(figure, "precision_recall.png"))

    gains, counts = analysis["errors"]["AP_50_gain"], analysis["errors"]["counts"]
    figure = Figure(figsize=(6, 3.2))
    axes = figure.subplots()
    bars = axes.barh(list(gains), list(gains.values()), color=[KIND_COLORS[kind] for kind in gains])
    axes.bar_label(bars, [f"+{gain:.3f} ({counts[kind]})" for kind, gain in gains.items()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(xlabel="gain of AP at IoU 0.5 if mended (number of errors)")
    files.append(save(figure, "error_kinds.png"))

    labels = analysis["confusion_matrix"]["labels"]
    matrix = np.array(analysis["confusion_matrix"]["matrix"])
    side = min(24.0, max(4.0, 1.5 + 0.36 * len(labels)))
    figure = Figure(figsize=(side, side))
    axes = figure.subplots()
    axes.imshow(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    if len(labels) <= MAX_NUMBERED_CLASSES:
        for row, column in np.argwhere(matrix).tolist():
            color = "white" if 2 * matrix[row, column] > matrix[row].sum() else "black"
            number = short_count(matrix[row, column])
            axes.text(column, row, number, ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="found as", ylabel="truth")
    files.append(save(figure, "confusion_matrix.png"))

    scored = sorted((row["AP"], row["name"]) for row in analysis["classes"] if row["AP"] >= 0)
    if scored:
        figure = Figure(figsize=(6, max(2.0, 0.22 * len(scored))))
        axes = figure.subplots()
        axes.barh([name for _, name in scored], [ap for ap, _ in scored], color=CURVE_COLORS["iou_50_95"])
        axes.set(xlabel="AP", ylim=(-0.6, len(scored) - 0.4))
        files.append(save(figure, "class_ap.png"))
    return files
