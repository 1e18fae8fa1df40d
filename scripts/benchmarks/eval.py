"""COCO metrics by each program that can compute them: seconds, memory, and whether they agree.

Each backend runs in a process of its own: python -m benchmarks.eval BACKEND FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import add_common_arguments
from benchmarks.scenes import MAX_BOXES, NUM_CLASSES, categories, draw_boxes, draw_sizes
from benchmarks.timing import BenchmarkError, format_table, spread
from checkout import ROOT
from detection.evaluation import METRIC_NAMES, CocoEvaluator, Detections, write_results

JUDGE = "pycocotools"
PACKAGES = {JUDGE: "pycocotools", "hotcoco": "hotcoco", "faster-coco-eval": "faster_coco_eval"}
_ANNOTATIONS, _DETECTIONS = "annotations.json", "detections.npz"
_FOUND_SHARE = 0.7  # of the boxes; the other detections lie anywhere
_JITTER = 0.1  # of a box's side

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=1)
    parser.add_argument("--images", type=int, default=5000, help="images [5000, as val2017]")
    parser.add_argument("--detections", type=int, default=100, help="detections an image [100]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", choices=list(PACKAGES), help="[those installed]")


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the table."""
    installed = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is not None]
    backends = arguments.backends or installed
    absent = [name for name in backends if name not in installed]
    if absent:
        raise BenchmarkError(f"not installed: {', '.join(absent)}")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in backends}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        say("making detections")
        num_detections = write_case(Path(folder), arguments.images, arguments.detections, arguments.seed)
        for _ in range(arguments.repeats):
            for name in backends:
                say(name)
                results[name].append(_in_own_process(name, folder))
    rows = [_row(name, runs, results.get(JUDGE)) for name, runs in results.items()]
    figures = {"device": "cpu", "images": arguments.images, "detections": num_detections, "backends": rows}
    return figures, _table(figures)


def write_case(folder: Path, num_images: int, per_image: int, seed: int) -> int:
    """Annotations and detections of a middling detector; the number of detections."""
    rng = np.random.default_rng([seed, 3])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    parts: list[tuple[np.ndarray, ...]] = []
    for number, (width, height) in enumerate(draw_sizes(num_images, seed), start=1):
        images.append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
        boxes = draw_boxes(rng, width, height)
        classes = rng.integers(1, NUM_CLASSES + 1, len(boxes))
        for box, category in zip(boxes.tolist(), classes.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    # A few crowds, as COCO has.
                    "iscrowd": int(rng.random() < 0.01),
                }
            )
        parts.append(_detections_of(rng, number, boxes, classes, per_image, (width, height)))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    np.savez(folder / _DETECTIONS, image_ids=columns[0], category_ids=columns[1], boxes=columns[2], scores=columns[3])
    content = {"images": images, "annotations": annotations, "categories": categories()}
    (folder / _ANNOTATIONS).write_text(json.dumps(content))
    return len(columns[0])


def _detections_of(
    rng: np.random.Generator, image: int, boxes: np.ndarray, classes: np.ndarray, number: int, size: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """`number` detections: some of the boxes, moved a little and with better scores, the rest anywhere."""
    found = rng.permutation(len(boxes))[: min(number, round(_FOUND_SHARE * len(boxes)))]
    sides = np.tile(boxes[found, 2:], 2)
    near = boxes[found] + rng.normal(0, _JITTER, sides.shape) * sides
    near[:, 2:] = np.maximum(near[:, 2:], 1)
    others = [draw_boxes(rng, *size) for _ in range(MAX_BOXES)] if len(found) < number else []
    far = np.concatenate([np.empty((0, 4)), *others])[: number - len(found)]
    far = np.resize(far, (number - len(found), 4))
    scores = np.concatenate([rng.beta(5, 2, len(found)), rng.beta(1, 6, len(far))])
    labels = np.concatenate([classes[found], rng.integers(1, NUM_CLASSES + 1, len(far))])
    ids = np.full(number, image, np.int64)
    return ids, labels.astype(np.int64), np.concatenate([near, far]).astype(np.float32), scores.astype(np.float32)


def _in_own_process(backend: str, folder: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.eval", backend, folder],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        raise BenchmarkError(f"{backend} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def evaluate_once(backend: str, folder: Path) -> dict[str, Any]:
    """Evaluation alone: annotations are read and detections in memory before the clocks start. And what a run does
    besides: annotations read at its start, and the results file written at each validation."""
    with np.load(folder / _DETECTIONS) as stored:
        detections = Detections(stored["image_ids"], stored["category_ids"], stored["boxes"], stored["scores"])
    call: Callable[[], Sequence[float]]
    besides: dict[str, float] = {}
    if backend == "faster-coco-eval":
        call = _faster_coco_eval(folder / _ANNOTATIONS, detections)
    else:
        start = time.process_time()
        evaluator = CocoEvaluator(folder / _ANNOTATIONS, backend=backend)
        besides["annotations_cpu_seconds"] = time.process_time() - start
        start = time.process_time()
        write_results(detections, folder / f"{backend}.json")
        besides["results_file_cpu_seconds"] = time.process_time() - start

        def call() -> Sequence[float]:
            metrics = evaluator.evaluate(detections)
            return [metrics[name] for name in METRIC_NAMES]

        importlib.import_module(PACKAGES[backend])
    before = _resident_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    stats = call()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "grown_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before / 1e6,
        "stats": [float(value) for value in stats],
        **besides,
    }


def _faster_coco_eval(annotations: Path, detections: Detections) -> Callable[[], Sequence[float]]:
    """The peer as its documentation uses it, from COCO result dictionaries, which are made beforehand."""
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    rows = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in zip(
            detections.image_ids.tolist(),
            detections.category_ids.tolist(),
            detections.boxes_xywh.astype(np.float64).tolist(),
            detections.scores.astype(np.float64).tolist(),
            strict=True,
        )
    ]

    def evaluate() -> Sequence[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval_faster(truth, truth.loadRes(rows), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return list(evaluation.stats[:12])

    return evaluate


def _row(name: str, runs: Sequence[dict[str, Any]], judge: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "seconds": spread([one["seconds"] for one in runs]),
        "cpu_seconds": spread([one["cpu_seconds"] for one in runs]),
        "peak_mb": spread([one["peak_mb"] for one in runs]),
        "grown_mb": spread([one["grown_mb"] for one in runs]),
        "stats": dict(zip(METRIC_NAMES, runs[0]["stats"], strict=True)),
    }
    for key in ("annotations_cpu_seconds", "results_file_cpu_seconds"):
        if key in runs[0]:
            row[key] = spread([one[key] for one in runs])
    if judge is not None:
        differences = np.abs(np.subtract(runs[0]["stats"], judge[0]["stats"]))
        row["equal_figures"] = int((differences == 0).sum())
        row["largest_difference"] = float(differences.max())
        pairs = zip(runs, judge, strict=True)
        row["ratios"] = {JUDGE: spread([theirs["cpu_seconds"] / ours["cpu_seconds"] for ours, theirs in pairs])}
    return row


def _table(figures: dict[str, Any]) -> str:
    cells = []
    for row in figures["backends"]:
        cpu, ratio = row["cpu_seconds"], row.get("ratios", {}).get(JUDGE)
        equal = f"{row['equal_figures']} of {len(METRIC_NAMES)}" if "equal_figures" in row else "-"
        cells.append(
            [
                row["name"],
                f"{cpu['median']:.2f}",
                f"{cpu['min']:.2f}..{cpu['max']:.2f}",
                f"{row['seconds']['median']:.2f}",
                f"{row['peak_mb']['median']:.0f}",
                f"{row['grown_mb']['median']:.0f}",
                equal,
                f"{ratio['median']:.1f}" if ratio else "-",
                f"{row['stats']['mAP']:.4f}",
            ]
        )
    headers = ["", "CPU s", "min..max", "wall s", "peak MB", "grown MB", "equal figures", f"x {JUDGE}", "mAP"]
    head = f"{figures['images']:,} images, {figures['detections']:,} detections, one thread each"
    texts = [head, "", format_table(headers, cells)]
    ours = [row for row in figures["backends"] if "results_file_cpu_seconds" in row]
    if ours:
        read, written = (ours[-1][key]["median"] for key in ("annotations_cpu_seconds", "results_file_cpu_seconds"))
        texts += ["", f"besides, CPU s: annotations read once a run {read:.2f}, results file written {written:.2f}"]
    return "\n".join(texts)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    print(json.dumps(evaluate_once(sys.argv[1], Path(sys.argv[2]))))
