"""An analysis as one HTML page that needs nothing beside it: charts are SVG, images are inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

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
CLASS_COLUMNS = (
    *("AP", "AP_50", "AP_75", "AP_s", "AP_m", "AP_l", "AR_100"),
    *("best_f1", "best_f1_threshold", "precision", "recall"),
)
IMAGE_SIDE = 720
MAX_CONFUSIONS = 25


def html_report(
    analysis: dict[str, Any],
    *,
    title: str,
    image_of: Callable[[str], npt.NDArray[np.uint8]] | None = None,
) -> str:
    """The page.

    Args:
        analysis: what `analyze_results` returns.
        title: heading; file names will do.
        image_of: gives the uint8 RGB [H, W, 3] pixels of an image's file name; FileNotFoundError and ValueError
            from it become a line in the page. None: the worst images are listed without images.
    """
    files = resources.files("detection.evaluation")
    page, style, script = (files.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    metrics, errors = analysis["metrics"], analysis["errors"]
    names = [name for name in metrics if name not in ("per_class", "notes")]
    notes = "".join(f"<li>{escape(note)}</li>" for note in metrics["notes"])
    return Template(page).substitute(
        title=escape(title),
        style=style,
        script=script,
        headline=_table(names, [[_figure(metrics[name]) for name in names]]),
        notes=f"<ul>{notes}</ul>" if notes else "",
        error_bars=_error_bars(errors),
        ap_50=_figure(errors["AP_50"]),
        error_meanings=_key({kind: f"{kind}: {meaning}" for kind, meaning in KIND_MEANINGS.items()}, KIND_COLORS, " "),
        curves=_curves(analysis["precision_recall"]),
        classes=_class_table(analysis["classes"]),
        confusions=_confusions(analysis["confusion_matrix"]),
        worst_images="\n".join(_worst_images(analysis["worst_images"], image_of)),
    )


def _key(names: Mapping[str, str], colors: Mapping[str, str], gap: str = "") -> str:
    """What each color means."""
    keys = (f'<span class="key"><i style="background:{colors[key]}"></i>{name}</span>' for key, name in names.items())
    return "".join(key + gap for key in keys)


def _figure(value: float | None) -> str:
    return "–" if value is None or value < 0 else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], sortable: bool = False) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "\n".join(line(row, "td") for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead>{line(head, "th")}</thead><tbody>\n{lines}\n</tbody></table></div>'


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
        f"<p>{_key(CURVE_NAMES, CURVE_COLORS)}</p>"
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
        f'<figure><svg viewBox="0 0 360 245">{grid}{lines}<text x="190" y="242" text-anchor="middle">recall</text>'
        f"</svg><figcaption>{escape(name)}: precision over recall</figcaption></figure>"
    )


def _class_table(classes: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            row["name"],
            str(row["num_boxes"]),
            str(row["num_detections"]),
            *(_figure(row[column]) for column in CLASS_COLUMNS),
            *(str(count) for count in row["errors"].values()),
        ]
        for row in classes
    ]
    errors = classes[0]["errors"] if classes else ()
    return _table(["class", "boxes", "detections", *CLASS_COLUMNS, *errors], rows, sortable=True)


def _confusions(confusion: dict[str, Any]) -> str:
    labels, matrix = confusion["labels"], np.array(confusion["matrix"])
    size = len(labels)
    cell = max(5, min(34, 900 // size))
    margin = 110
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
        if cell >= 26:
            cells.append(
                f'<text x="{x + cell / 2}" y="{y + cell / 2 + 4}" text-anchor="middle">{matrix[row, column]}</text>'
            )
    if cell >= 11:
        for i, label in enumerate(labels):
            middle = margin + cell * (i + 0.5) + 4
            cells.append(f'<text x="{margin - 5}" y="{middle}" text-anchor="end">{escape(label[:16])}</text>')
            cells.append(f'<text transform="translate({middle},{margin - 5}) rotate(-60)">{escape(label[:16])}</text>')
    side = margin + cell * size + 70
    wrong = [
        (int(matrix[r, c]), labels[r], labels[c])
        for r, c in np.argwhere(matrix).tolist()
        if r != c and size - 1 not in (r, c)
    ]
    pairs = [[truth, found, str(n)] for n, truth, found in sorted(wrong, key=lambda w: -w[0])[:MAX_CONFUSIONS]]
    listed = _table(["truth", "found as", "times"], pairs) if pairs else ""
    return f'<svg viewBox="0 0 {side} {side}" width="{min(side, 1000)}">{"".join(cells)}</svg>{listed}'


def _worst_images(
    images: Sequence[dict[str, Any]], image_of: Callable[[str], npt.NDArray[np.uint8]] | None
) -> list[str]:
    if not images:
        return ["<p>No image has an error.</p>"]
    parts = [
        f"<p>{_key({kind: kind for kind in KIND_COLORS}, KIND_COLORS)}</p>",
        '<p class="quiet">Names stand at errors only; every box tells what it is when the mouse is on it. A click makes'
        " an image large.</p>",
        '<div class="row">',
    ]
    for image in images:
        words = (
            f"{image['file_name']} (id {image['image_id']}): {image['correct']} correct, {image['wrong']} wrong,"
            f" {image['missed']} not found"
        )
        parts.append(
            f'<figure class="image">{_image(image, image_of)}<figcaption>{escape(words)}</figcaption></figure>'
        )
    return [*parts, "</div>"]


def _image(image: dict[str, Any], image_of: Callable[[str], npt.NDArray[np.uint8]] | None) -> str:
    if image_of is None:
        return ""
    try:
        pixels = image_of(image["file_name"])
    except (FileNotFoundError, ValueError) as error:
        return f'<p class="quiet">{escape(str(error))}</p>'
    height, width = pixels.shape[:2]
    small = Image.fromarray(pixels)
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
                f'<text x="{x}" y="{max(y - line, 8 * line)}" style="font-size:{6 * line:.1f}px;fill:{color};'
                f'paint-order:stroke;stroke:#fff;stroke-width:{1.5 * line:.1f}px">{escape(box["name"] + score)}</text>'
            )
    encoded = base64.b64encode(data.getvalue()).decode()
    return (
        f'<svg viewBox="0 0 {width} {height}"><image width="{width}" height="{height}"'
        f' href="data:image/jpeg;base64,{encoded}"/>{"".join(frames + names)}</svg>'
    )
