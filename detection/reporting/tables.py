"""Figures as characters: tables of validations, and curves."""

from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = {
    "mAP": "IoU 0.50:0.95",
    "mAP_50": "IoU 0.50",
    "mAP_75": "IoU 0.75",
    "mAP_s": "small, area under 32 x 32",
    "mAP_m": "medium",
    "mAP_l": "large, area over 96 x 96",
    "mAP_r": "rare classes",
    "mAP_c": "common classes",
    "mAP_f": "frequent classes",
    "AR_100": "recall, 100 detections an image",
    "AR_300": "recall, 300 detections an image",
    "voc_mAP": "Pascal VOC's, IoU 0.50",
    "segm_mAP": "masks, IoU 0.50:0.95",
    "segm_mAP_50": "masks, IoU 0.50",
    "segm_mAP_75": "masks, IoU 0.75",
    "segm_mAP_s": "masks, small",
    "segm_mAP_m": "masks, medium",
    "segm_mAP_l": "masks, large",
    "segm_mAP_r": "masks, rare classes",
    "segm_mAP_c": "masks, common classes",
    "segm_mAP_f": "masks, frequent classes",
}
UNDEFINED = -1.0  # COCO's value where the ground truth has nothing of that kind
MAX_CLASSES_LISTED = 20
NUM_EXTREME_CLASSES = 5
_BLOCKS, _ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:#"


def validation_table(
    metrics: Mapping[str, Any],
    previous: Mapping[str, Any] | None = None,
    best: Mapping[str, Any] | None = None,
) -> str:
    """The figures of a validation, with their change since the previous one and against the best one before.

    A figure that the ground truth does not support (COCO's -1) is shown as "-", and metrics["notes"] below
    says why. Per-class AP follows: all classes up to MAX_CLASSES_LISTED, else the best and the worst
    NUM_EXTREME_CLASSES.
    """
    rows = [["", "now"]]
    if previous is not None:
        rows[0].append("change")
    if best is not None:
        rows[0].append("against the best")
    rows[0].append("")
    for name, meaning in FIGURES.items():
        if name in metrics:
            row = [name, figure(metrics[name])]
            row += [change(metrics[name], other.get(name)) for other in (previous, best) if other is not None]
            rows.append([*row, meaning])
    lines = aligned(rows, left_columns={0, len(rows[0]) - 1})
    lines += _class_lines(metrics.get("per_class", {}))
    if sets := metrics.get("sets", {}):
        lines.append("mAP by set: " + ", ".join(f"{name} {figure(each['mAP'])}" for name, each in sets.items()))
    lines += [f"note: {note}" for note in metrics.get("notes", [])]
    if not metrics.get("notes") and any(metrics.get(name) == UNDEFINED for name in FIGURES):
        lines.append('note: "-" is undefined: the ground truth has no object of that kind (COCO writes -1)')
    return "\n".join(lines)


def summary_table(records: Sequence[Mapping[str, Any]], best_epoch: int | None) -> str:
    """One line a validation record (as in metrics.jsonl), the one of best_epoch marked.

    Epochs are shown as they stand in the records.
    """
    if not records:
        return "no validation has been run"
    shown = [name for name in FIGURES if not name.startswith("segm_mAP_")]
    names = [name for name in shown if any(name in record for record in records)]
    rows = [["epoch", *names, ""]]
    for record in records:
        mark = "<- best" if best_epoch is not None and record.get("epoch") == best_epoch else ""
        rows.append([str(record.get("epoch", "")), *(figure(record.get(name)) for name in names), mark])
    return "\n".join(aligned(rows, left_columns={len(rows[0]) - 1}))


def figure(value: float | None) -> str:
    """A figure between 0 and 1 with three decimals; "-" where it is undefined or absent."""
    return "-" if value is None or value == UNDEFINED else f"{value:.3f}"


def change(value: float | None, before: float | None) -> str:
    """The difference to a figure before, with its sign; "-" where either is undefined."""
    if value is None or before is None or UNDEFINED in (value, before):
        return "-"
    return f"{round(value, 3) - round(before, 3):+.3f}"


def _class_lines(per_class: Mapping[str, float]) -> list[str]:
    if not per_class:
        return []
    defined = sorted(((value, name) for name, value in per_class.items() if value != UNDEFINED), reverse=True)
    undefined = [name for name, value in per_class.items() if value == UNDEFINED]
    if len(defined) <= MAX_CLASSES_LISTED:
        lines = ["AP by class: " + _listed(defined)] if defined else []
    else:
        lines = [
            "AP by class, highest: " + _listed(defined[:NUM_EXTREME_CLASSES]),
            "AP by class, lowest:  " + _listed(defined[-NUM_EXTREME_CLASSES:]),
        ]
    if undefined:
        shown = ", ".join(undefined[:NUM_EXTREME_CLASSES])
        more = len(undefined) - NUM_EXTREME_CLASSES
        lines.append(f"AP by class, no ground truth: {shown}" + (f" and {more} more" if more > 0 else ""))
    return lines


def _listed(pairs: Sequence[tuple[float, str]]) -> str:
    return ", ".join(f"{name} {value:.3f}" for value, name in pairs)


def aligned(rows: Sequence[Sequence[str]], left_columns: set[int]) -> list[str]:
    """Rows of equally many cells as lines with columns of equal width, right-aligned but for left_columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def sparkline(values: Sequence[float], width: int = 60, height: int = 1, *, unicode: bool = True) -> str:
    """`values` (finite) as `height` lines of at most `width` characters.

    The lowest value fills the lowest step of a column, the highest the whole column. Each column shows the
    value at its left edge, so that a step in the curve stands where it begins. Without unicode: ASCII
    characters.
    """
    if not values:
        return ""
    num_columns = min(width, len(values))
    columns = [values[column * len(values) // num_columns] for column in range(num_columns)]
    characters = _BLOCKS if unicode else _ASCII_BLOCKS
    num_steps = len(characters) - 1
    low, high = min(columns), max(columns)
    scale = (height * num_steps - 1) / (high - low) if high > low else 0.0
    filled = [1 + round((value - low) * scale) for value in columns]
    lines = []
    for row in reversed(range(height)):
        lines.append("".join(characters[min(max(steps - row * num_steps, 0), num_steps)] for steps in filled))
    return "\n".join(line.rstrip() for line in lines)
