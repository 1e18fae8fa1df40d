"""COCO metrics by each program that can compute them: seconds, memory, and whether they agree."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask

import checkout  # noqa: F401
from benchmarks.figures import (
    BenchmarkError,
    Samples,
    Say,
    add_common_arguments,
    add_sample,
    figure_rows,
    figure_table,
    in_own_process,
    measured,
)
from benchmarks.scenes import MAX_BOXES, NUM_CLASSES, draw_boxes, draw_sizes, write_annotations
from data.coco.annotations import read_coco
from data.coco.federated import FREQUENCIES
from data.coco.run_lengths import RunLengths
from detection.evaluation import (
    LVIS_METRIC_NAMES,
    METRIC_NAMES,
    CocoEvaluator,
    Detections,
    metric_names,
    write_mask_results,
    write_results,
)

JUDGE = "pycocotools"
PACKAGES = {JUDGE: "pycocotools", "hotcoco": "hotcoco", "faster-coco-eval": "faster_coco_eval"}
_ANNOTATIONS, _DETECTIONS = "annotations.json", "detections.npz"
_FOUND_SHARE = 0.7  # of the boxes; the other detections lie anywhere
_JITTER = 0.1  # of a box's side
_CROWD_SHARE = 0.01
_CORNERS = 24
LVIS_CLASSES = 1203
_NUM_NEGATIVE, _PARTLY_SHARE = 12, 0.1
"""Of LVIS, about: classes that an image was searched for in vain, and the part of its classes annotated in part"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=1)
    parser.add_argument("--images", type=int, default=5000, help="images [5000, as val2017]")
    parser.add_argument("--detections", type=int, help="detections an image [100; LVIS's: 300]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masks", action="store_true", help="masks besides boxes: an ellipse in each box")
    parser.add_argument("--lvis", action="store_true", help="LVIS's rules: 1,203 classes, 300 detections an image")
    parser.add_argument("--classes", type=int, help="classes [80, or LVIS's 1,203]")
    parser.add_argument("--backends", nargs="+", choices=list(PACKAGES), help="[those installed]")


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the table."""
    installed = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is not None]
    backends = arguments.backends or installed
    if absent := [name for name in backends if name not in installed]:
        raise BenchmarkError(f"not installed: {', '.join(absent)}")
    if arguments.masks or arguments.lvis:
        backends = [name for name in backends if name != "faster-coco-eval"]
    per_image = arguments.detections or (300 if arguments.lvis else 100)
    num_classes = arguments.classes or (LVIS_CLASSES if arguments.lvis else NUM_CLASSES)
    names = LVIS_METRIC_NAMES if arguments.lvis else METRIC_NAMES
    os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    samples: Samples = {}
    stats: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        say("making detections")
        num_detections = write_case(Path(folder), arguments.images, per_image, arguments.seed, num_classes)
        if arguments.lvis:
            write_federated(Path(folder), arguments.seed)
        if arguments.masks:
            say("making masks")
            write_masks(Path(folder))
        for _ in range(arguments.repeats):
            for name in backends:
                say(name)
                quantities, stats[name] = in_own_process(evaluate_once, name, Path(folder))
                add_sample(samples, name, quantities)
    rows = figure_rows(samples, [JUDGE], "cpu_seconds")
    for row in rows:
        row["stats"] = dict(zip(names, stats[row["name"]], strict=True))
        if JUDGE in stats:
            differences = np.abs(np.subtract(stats[row["name"]], stats[JUDGE]))
            row["equal_figures"] = int((differences == 0).sum())
            row["largest_difference"] = float(differences.max())
    figures = {"device": "cpu", "images": arguments.images, "detections": num_detections, "backends": rows}
    return figures, _table(figures)


def write_case(folder: Path, num_images: int, per_image: int, seed: int, num_classes: int = NUM_CLASSES) -> int:
    """Annotations and detections of a middling detector; the number of detections."""
    sizes = draw_sizes(num_images, seed)
    content = write_annotations(folder / _ANNOTATIONS, sizes, seed, crowd_share=_CROWD_SHARE, num_classes=num_classes)
    of_image: dict[int, list[dict[str, Any]]] = {}
    for record in content["annotations"]:
        of_image.setdefault(record["image_id"], []).append(record)
    rng = np.random.default_rng([seed, 3])
    columns: list[tuple[np.ndarray, ...]] = []
    for number, size in enumerate(sizes, start=1):
        boxes = np.array([record["bbox"] for record in of_image[number]])
        classes = np.array([record["category_id"] for record in of_image[number]])
        # Some of the boxes, moved a little and with better scores; the rest anywhere.
        found = rng.permutation(len(boxes))[: min(per_image, round(_FOUND_SHARE * len(boxes)))]
        sides = np.tile(boxes[found, 2:], 2)
        near = boxes[found] + rng.normal(0, _JITTER, sides.shape) * sides
        near[:, 2:] = np.maximum(near[:, 2:], 1)
        num_far = per_image - len(found)
        far = np.resize(np.concatenate([draw_boxes(rng, *size) for _ in range(MAX_BOXES)]), (num_far, 4))
        scores = np.concatenate([rng.beta(5, 2, len(found)), rng.beta(1, 6, num_far)])
        labels = np.concatenate([classes[found], rng.integers(1, num_classes + 1, num_far)])
        columns.append((np.full(per_image, number), labels, np.concatenate([near, far]), scores))
    ids, labels, boxes, scores = (np.concatenate(column) for column in zip(*columns, strict=True))
    np.savez(folder / _DETECTIONS, ids, labels, boxes.astype(np.float32), scores.astype(np.float32))
    return len(ids)


def write_federated(folder: Path, seed: int) -> None:
    """What makes the annotations LVIS's: as many classes that an image was searched for, and frequencies."""
    file = folder / _ANNOTATIONS
    content = json.loads(file.read_bytes())
    rng = np.random.default_rng([seed, 4])
    ids = [category["id"] for category in content["categories"]]
    of_image: dict[int, set[int]] = {image["id"]: set() for image in content["images"]}
    for record in content["annotations"]:
        of_image[record["image_id"]].add(record["category_id"])
    for image in content["images"]:
        has = of_image[image["id"]]
        image["neg_category_ids"] = sorted(set(rng.choice(ids, _NUM_NEGATIVE).tolist()) - has)
        image["not_exhaustive_category_ids"] = [number for number in sorted(has) if rng.random() < _PARTLY_SHARE]
    for category in content["categories"]:
        category["frequency"] = str(rng.choice(list(FREQUENCIES)))
    file.write_text(json.dumps(content))


def write_masks(folder: Path) -> None:
    """Polygons for the annotations and masks for the detections: an ellipse in each box."""
    file = folder / _ANNOTATIONS
    content = json.loads(file.read_bytes())
    for record in content["annotations"]:
        record["segmentation"] = [_ellipse(record["bbox"])]
    file.write_text(json.dumps(content))
    size_of = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    with np.load(folder / _DETECTIONS) as stored:
        columns = [stored[name] for name in stored.files]
    sizes = [size_of[image] for image in columns[0].tolist()]
    rings = map(_ellipse, columns[2].tolist())
    counts = [mask.frPyObjects([ring], *size)[0]["counts"] for ring, size in zip(rings, sizes, strict=True)]
    masks = RunLengths.of(counts, sizes)
    np.savez(folder / _DETECTIONS, *columns, masks.text, masks.offsets, masks.sizes)


def _ellipse(box_xywh: Sequence[float]) -> list[float]:
    x, y, w, h = box_xywh
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    points = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], axis=1)
    return points.round(2).reshape(-1).tolist()


def evaluate_once(backend: str, folder: Path) -> tuple[dict[str, float], list[float]]:
    """Seconds and memory of one evaluation, and the twelve figures.

    Evaluation alone: annotations are read and detections in memory before the clocks start. And what a run does
    besides: annotations read at its start, and the results file written at each validation.
    """
    with np.load(folder / _DETECTIONS) as stored:
        images, labels, boxes, scores, *of_masks = (stored[name] for name in stored.files)
        detections = Detections(images, labels, boxes, scores, RunLengths(*of_masks) if of_masks else None)
    besides: dict[str, float] = {}
    if backend == "faster-coco-eval":
        call = _faster_coco_eval(folder / _ANNOTATIONS, detections)
    else:
        start = time.process_time()
        has_masks = detections.masks is not None
        annotations = read_coco(folder / _ANNOTATIONS, masks=has_masks)
        evaluator = CocoEvaluator(annotations, backend=backend)
        besides["annotations_cpu_seconds"] = time.process_time() - start
        start = time.process_time()
        write_results(detections, folder / f"{backend}.json")
        if has_masks:
            write_mask_results(detections, folder / f"{backend}_segm.json")
        besides["results_file_cpu_seconds"] = time.process_time() - start
        importlib.import_module(PACKAGES[backend])

        def call() -> Sequence[float]:
            metrics = evaluator.evaluate(detections)
            names = metric_names(annotations)
            return [metrics[f"segm_{name}" if has_masks else name] for name in names]

    stats, quantities = measured(call)
    return quantities | besides, [float(value) for value in stats]


def _faster_coco_eval(annotations: Path, detections: Detections) -> Callable[[], Sequence[float]]:
    """The peer as its documentation uses it, from COCO result dictionaries, which are made beforehand."""
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    columns = (detections.image_ids, detections.category_ids, detections.boxes_xywh, detections.scores)
    names = ("image_id", "category_id", "bbox", "score")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def evaluate() -> Sequence[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval_faster(truth, truth.loadRes(rows), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return list(evaluation.stats[:12])

    return evaluate


def _table(figures: dict[str, Any]) -> str:
    rows = figures["backends"]
    head = f"{figures['images']:,} images, {figures['detections']:,} detections, one thread each"
    table = figure_table(
        rows,
        "cpu_seconds",
        "CPU s",
        wall_s=lambda row: f"{row['seconds']['median']:.2f}",
        peak_MB=lambda row: f"{row['peak_mb']['median']:.0f}",
        grown_MB=lambda row: f"{row['grown_mb']['median']:.0f}",
        equal_figures=lambda row: f"{row['equal_figures']} of {len(row['stats'])}" if "equal_figures" in row else "-",
        mAP=lambda row: f"{row['stats']['mAP']:.4f}",
    )
    texts = [head, "", table]
    if ours := [row for row in rows if "results_file_cpu_seconds" in row]:
        read, written = (ours[-1][key]["median"] for key in ("annotations_cpu_seconds", "results_file_cpu_seconds"))
        texts += ["", f"besides, CPU s: annotations read once a run {read:.2f}, results file written {written:.2f}"]
    return "\n".join(texts)
