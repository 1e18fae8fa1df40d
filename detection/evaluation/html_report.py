"""An analysis as one HTML page that needs nothing beside it: charts are SVG, images are inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from data.coco.run_lengths import RunLengths
from detection.evaluation.html_page import color_key, fraction, html_page, meanings_list, table

# Colors of Okabe and Ito's palette, told apart by the color-blind as well.
KIND_COLORS = {
    "correct": "#009e73",
    "class": "#cc79a7",
    "localisation": "#e69f00",
    "both": "#d55e00",
    "duplicate": "#56b4e9",
    "background": "#c0392b",
    "missed": "#0072b2",
}
KIND_MEANINGS = {
    "class": "well placed, wrong class",
    "localisation": "right class, IoU between 0.1 and 0.5",
    "both": "wrong class, IoU between 0.1 and 0.5",
    "duplicate": "a surer detection has the box",
    "background": "no box there (IoU up to 0.1)",
    "missed": "a box that nothing answers to",
}
CURVE_COLORS = {"iou_50": "#0072b2", "iou_75": "#e69f00", "iou_50_95": "#009e73"}
CURVE_NAMES = {"iou_50": "IoU 0.50", "iou_75": "IoU 0.75", "iou_50_95": "IoU 0.50 to 0.95"}
SIZE_NAMES = {"s": "small (up to 32 x 32 pixels)", "m": "medium", "l": "large (from 96 x 96 pixels)"}
METRIC_MEANINGS = {
    "mAP": "average precision, mean over the classes and IoU 0.50 to 0.95",
    "mAP_50": "average precision at IoU 0.50, mean over the classes",
    "mAP_75": "average precision at IoU 0.75, mean over the classes",
    **{f"mAP_{size}": f"mAP of {name} boxes" for size, name in SIZE_NAMES.items()},
    **{f"AR_{number}": f"average recall with {number} detections an image at most" for number in (1, 10, 100, 300)},
    **{f"mAP_{name[0]}": f"mAP of LVIS's {name} classes" for name in ("rare", "common", "frequent")},
    **{f"AR_{size}": f"average recall of {name} boxes" for size, name in SIZE_NAMES.items()},
}
METRIC_MEANINGS |= {f"segm_{name}": f"{meaning}; of masks" for name, meaning in METRIC_MEANINGS.items()}
# Heading -> key of a class's row, and meaning.
CLASS_COLUMNS = {
    "boxes": ("num_boxes", "annotated boxes of the class, crowds left out"),
    "found": ("num_detections", "detections of the class, whatever their score"),
    "AP": ("AP", "average precision, mean over IoU 0.50 to 0.95"),
    "AP 50": ("AP_50", "average precision at IoU 0.50"),
    "AP 75": ("AP_75", "average precision at IoU 0.75"),
    "AP s": ("AP_s", f"AP of {SIZE_NAMES['s']} boxes"),
    "AP m": ("AP_m", f"AP of {SIZE_NAMES['m']} boxes"),
    "AP l": ("AP_l", f"AP of {SIZE_NAMES['l']} boxes"),
    "AR": ("AR_100", "recall, mean over IoU 0.50 to 0.95, with 100 detections an image at most"),
    "best F1": ("best_f1", "highest F1 (harmonic mean of precision and recall) at IoU 0.50 over all score thresholds"),
    "from score": ("best_f1_threshold", "the score threshold of the best F1: a good choice where one is needed"),
    "precision": ("precision", "part of the detections from that score on that are correct"),
    "recall": ("recall", "part of the boxes that are found from that score on"),
}
IMAGE_SIDE = 720
MASK_OPACITY = 0.45
MAX_CONFUSIONS = 25
LEAST_NUMBERED_CELL, LEAST_NAMED_CELL = 18, 10
"""Pixels. Smaller cells of the confusion matrix tell their number, or their classes, by a tooltip alone."""
MAX_LABEL = 17
_COLUMN_MEANINGS = {
    **{heading: meaning for heading, (_, meaning) in CLASS_COLUMNS.items()},
    **{kind: f"errors of this kind, whatever their score: {meaning}" for kind, meaning in KIND_MEANINGS.items()},
}
ImageOf = Callable[[str], npt.NDArray[np.uint8]]


def html_report(analysis: dict[str, Any], *, title: str, image_of: ImageOf | None = None) -> str:
    """The page of an analysis; arguments as `analysis_sections`. title: heading; file names will do."""
    return html_page(title, analysis_sections(analysis, image_of=image_of))


def analysis_sections(analysis: dict[str, Any], *, image_of: ImageOf | None = None) -> str:
    """The part of a page that shows an analysis, as HTML.

    Args:
        analysis: what `analyze_results` returns.
        image_of: gives the uint8 RGB [H, W, 3] pixels of an image's file name; FileNotFoundError and ValueError
            from it become a line in the page. None: the worst and best images are listed without images.
    """
    metrics, errors = analysis["metrics"], analysis["errors"]
    names = [name for name in metrics if not name.endswith(("per_class", "notes"))]
    notes = "".join(f"<li>{escape(note)}</li>" for note in metrics["notes"])
    template = resources.files("detection.evaluation").joinpath("analysis.html").read_text("utf-8")
    return Template(template).substitute(
        headline=table(names, [[fraction(metrics[name]) for name in names]], meanings=METRIC_MEANINGS),
        notes=f"<ul>{notes}</ul>" if notes else "",
        error_bars=_error_bars(errors),
        ap_50=fraction(errors["AP_50"]),
        error_meanings=color_key(
            {kind: f"{kind}: {meaning}" for kind, meaning in KIND_MEANINGS.items()}, KIND_COLORS, " "
        ),
        curves=_curves(analysis["precision_recall"]),
        classes=_class_table(analysis["classes"]),
        column_meanings=meanings_list("What the columns mean", _COLUMN_MEANINGS),
        confusions=_confusions(analysis["confusion_matrix"]),
        box_key=color_key({kind: kind for kind in KIND_COLORS}, KIND_COLORS),
        worst_images=_images(analysis["worst_images"], image_of) or "<p>No image has an error.</p>",
        best_images=_images(analysis["best_images"], image_of) or "<p>No image has a correct detection.</p>",
    )


def _error_bars(errors: dict[str, Any]) -> str:
    gains, counts = errors["AP_50_gain"], errors["counts"]
    highest = max(*gains.values(), 1e-9)
    bars = []
    for i, (kind, gain) in enumerate(gains.items()):
        y, width = 8 + 30 * i, 330 * gain / highest
        bars.append(
            f'<text x="98" y="{y + 15}" text-anchor="end">{kind}</text>'
            f'<rect x="105" y="{y}" width="{width:.1f}" height="21" fill="{KIND_COLORS[kind]}"/>'
            f'<text x="{112 + width:.1f}" y="{y + 15}">+{gain:.3f} ({counts[kind]})</text>'
        )
    return f'<svg viewBox="0 0 560 {16 + 30 * len(gains)}" width="560" role="img">{"".join(bars)}</svg>'


def _curves(curves: dict[str, Any]) -> str:
    if not curves["mean"]:
        return "<p>No class has boxes.</p>"
    every = "".join(_curve_figure(curves["recall"], values, name) for name, values in curves["per_class"].items())
    return (
        f'<div class="row">{_curve_figure(curves["recall"], curves["mean"], "mean over classes")}</div>'
        f"<p>{color_key(CURVE_NAMES, CURVE_COLORS)}</p>"
        f'<details><summary>each class</summary><div class="row">{every}</div></details>'
    )


def _curve_figure(recall: Sequence[float], values: dict[str, Sequence[float]], name: str) -> str:
    def points(precision: Sequence[float]) -> str:
        return " ".join(f"{40 + 300 * r:.0f},{210 - 200 * p:.1f}" for r, p in zip(recall, precision, strict=True))

    grid = "".join(
        f'<path d="M40 {210 - 200 * t}H340M{40 + 300 * t} 10V210" stroke="#ddd"/>'
        f'<text x="34" y="{214 - 200 * t}" text-anchor="end">{t}</text>'
        f'<text x="{40 + 300 * t}" y="226" text-anchor="middle">{t}</text>'
        for t in (0, 0.5, 1)
    )
    lines = "".join(
        f'<polyline points="{points(values[key])}" fill="none" stroke="{color}" stroke-width="2"/>'
        for key, color in CURVE_COLORS.items()
    )
    return (
        f'<figure class="chart"><svg viewBox="0 0 360 245">{grid}{lines}'
        '<text x="190" y="242" text-anchor="middle">recall</text></svg>'
        f"<figcaption>{escape(name)}: precision over recall</figcaption></figure>"
    )


def _class_table(classes: Sequence[dict[str, Any]]) -> str:
    rows = []
    for row in classes:
        figures = [row[key] for key, _ in CLASS_COLUMNS.values()]
        cells = [f"{each:,}" if isinstance(each, int) else fraction(each) for each in figures]
        rows.append([row["name"], *cells, *(f"{count:,}" for count in row["errors"].values())])
    errors = classes[0]["errors"] if classes else ()
    return table(["class", *CLASS_COLUMNS, *errors], rows, sortable=True, meanings=_COLUMN_MEANINGS)


def _confusions(confusion: dict[str, Any]) -> str:
    labels, matrix = confusion["labels"], np.array(confusion["matrix"])
    size = len(labels)
    cell = max(7, min(40, 1050 // size))
    margin = 120
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cells = []
    for row, column in np.argwhere(matrix).tolist():
        x, y, share = margin + cell * column, margin + cell * row, shares[row, column]
        words = f"{labels[row]} found as {labels[column]}: {matrix[row, column]} ({share:.0%})"
        color = "0,114,178" if row == column else "213,94,0"
        cells.append(
            f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="rgba({color},{0.08 + 0.92 * share:.2f})">'
            f"<title>{escape(words)}</title></rect>"
        )
        if cell >= LEAST_NUMBERED_CELL:
            number = short_count(matrix[row, column])
            style = f"font-size:{min(12.0, 1.6 * cell / max(len(number), 2)):.1f}px;pointer-events:none"
            style += ";fill:#fff" if share > 0.5 else ""
            place = f'x="{x + cell / 2}" y="{y + cell / 2 + 4}" text-anchor="middle"'
            cells.append(f'<text {place} style="{style}">{number}</text>')
    if cell >= LEAST_NAMED_CELL:
        style = f'style="font-size:{min(12, cell - 2)}px"'
        for i, label in enumerate(labels):
            middle = margin + cell * (i + 0.5) + 4
            name = escape(label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…")
            cells.append(f'<text x="{margin - 5}" y="{middle}" text-anchor="end" {style}>{name}</text>')
            cells.append(f'<text transform="translate({middle},{margin - 5}) rotate(-60)" {style}>{name}</text>')
    side = margin + cell * size + 30
    wrong = [
        (int(matrix[r, c]), labels[r], labels[c])
        for r, c in np.argwhere(matrix).tolist()
        if r != c and size - 1 not in (r, c)
    ]
    pairs = [[truth, found, str(n)] for n, truth, found in sorted(wrong, key=lambda w: -w[0])[:MAX_CONFUSIONS]]
    listed = table(["truth", "found as", "times"], pairs) if pairs else ""
    return f'<div class="row"><svg viewBox="0 0 {side} {side}" width="{side}">{"".join(cells)}</svg>{listed}</div>'


def short_count(number: int) -> str:
    """A count in four characters at most: 987, 1.2k, 45k, 3.1M."""
    if number < 1000:
        return str(number)
    value, unit = (number / 1e3, "k") if number < 999_500 else (number / 1e6, "M")
    return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"


def _images(images: Sequence[dict[str, Any]], image_of: ImageOf | None) -> str:
    parts = []
    for image in images:
        words = (
            f"{image['file_name']} (id {image['image_id']}): {image['correct']} correct, {image['wrong']} wrong,"
            f" {image['missed']} not found"
        )
        parts.append(
            f'<figure class="image">{_image(image, image_of)}<figcaption>{escape(words)}</figcaption></figure>'
        )
    return '<div class="row">' + "\n".join(parts) + "</div>" if parts else ""


def _with_masks(pixels: npt.NDArray[np.uint8], boxes: Sequence[dict[str, Any]]) -> npt.NDArray[np.uint8]:
    """The image with the masks of the boxes that have one, in the colors of their kinds."""
    painted = pixels.copy()
    for box in boxes:
        if "segmentation" in box:
            size, counts = box["segmentation"]["size"], box["segmentation"]["counts"]
            inside = RunLengths.of([counts.encode("ascii")], [size]).decode(0).astype(bool)
            if inside.shape == pixels.shape[:2]:  # the file on disk may be another one
                color = np.array(ImageColor.getrgb(KIND_COLORS[box["kind"]])[:3])
                painted[inside] = ((1 - MASK_OPACITY) * painted[inside] + MASK_OPACITY * color).astype(np.uint8)
    return painted


def _image(image: dict[str, Any], image_of: ImageOf | None) -> str:
    if image_of is None:
        return ""
    try:
        pixels = image_of(image["file_name"])
    except (FileNotFoundError, ValueError) as error:
        return f'<p class="quiet">{escape(str(error))}</p>'
    height, width = pixels.shape[:2]
    small = Image.fromarray(_with_masks(pixels, image["boxes"]))
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=82)
    line = max(width, height) / 280
    frames: list[str] = []
    names: list[str] = []  # above all frames
    for box in image["boxes"]:
        x, y, w, h = box["box_xywh"]
        score = "" if box["score"] is None else f" {box['score']:.2f}"
        truth = f", truth: {box['truth']}" if box["truth"] not in (None, box["name"]) else ""
        color = KIND_COLORS[box["kind"]]
        words = box["kind"] + ": " + box["name"] + score + truth
        dashes = f' stroke-dasharray="{3 * line} {2 * line}"' if box["kind"] == "missed" else ""
        is_correct = box["kind"] == "correct"
        stroke = line / 2 if is_correct else line
        frames.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="transparent" stroke="{color}"'
            f' stroke-width="{stroke:.1f}"{dashes}><title>{escape(words)}</title></rect>'
        )
        if not is_correct:  # the names of all boxes would hide the image
            names.append(
                f'<text x="{x}" y="{max(y - line, 9 * line)}" style="font-size:{8 * line:.1f}px;fill:{color};'
                f'font-weight:600;paint-order:stroke;stroke:#fff;stroke-width:{2 * line:.1f}px">'
                f"{escape(box['name'] + score)}</text>"
            )
    encoded = base64.b64encode(data.getvalue()).decode()
    return (
        f'<svg viewBox="0 0 {width} {height}"><image width="{width}" height="{height}"'
        f' href="data:image/jpeg;base64,{encoded}"/>{"".join(frames + names)}</svg>'
    )
