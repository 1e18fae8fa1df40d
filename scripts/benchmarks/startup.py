"""Seconds from the start of the process: to its imports, to a checked plan, to the first iteration; large annotations.

Annotations are read in a process of its own: python -m benchmarks.startup READER FILE CACHE_FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import add_common_arguments
from benchmarks.scenes import NUM_CLASSES, categories, draw_sizes, write_images
from benchmarks.timing import BenchmarkError, format_table, spread
from checkout import ROOT

BOXES_PER_IMAGE = 7.3  # of train2017: 860,001 boxes on 117,266 images
_POLYGON_POINTS = 24  # per box, so that a file is as large as train2017's
_POLL_SECONDS = 0.02
_TIMEOUT_SECONDS = 600.0
_TOY = {
    "model": "faster_rcnn_r18_fpn",
    "weights": "none",
    "min-size": "128",
    "max-size": "213",
    "batch-size": "1",
    "max-epochs": "1",
}

Say = Callable[[str], None]


class Duration(NamedTuple):
    """Of a command."""

    seconds: float
    cpu_seconds: float
    """Of all its processes that have ended, and counted where others use the machine too"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=3)
    parser.add_argument(
        "--annotation-images",
        type=int,
        default=0,
        metavar="N",
        help="also read annotations of N images, e.g. 118000 as train2017 (400 MB, a minute to make) [0: not]",
    )
    parser.add_argument("--train-arguments", default="", help="in quotes: what train.py is to run instead of a toy")


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the tables."""
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder = Path(name)
        training = [sys.executable, str(ROOT / "train.py"), "--schedule", "1x"]
        training += arguments.train_arguments.split() or _toy_run(folder / "images")
        durations: dict[str, list[Duration]] = {}
        for number in range(arguments.repeats):
            say(f"round {number + 1} of {arguments.repeats}")
            output = ["--output-dir", str(folder / f"run_{number}")]
            for title, measured in (
                ("import torch and torchvision (the peer)", _finished(_IMPORTS)),
                ("train.py --help", _finished([*training[:2], "--help"])),
                ("train.py --dry-run", _finished([*training, *output, "--dry-run"])),
                ("train.py to the first iteration's record", _first_record([*training, *output], Path(output[1]))),
            ):
                durations.setdefault(title, []).append(measured)
        rows = [
            {
                "name": title,
                "seconds": spread([one.seconds for one in values]),
                "cpu_seconds": spread([one.cpu_seconds for one in values]),
            }
            for title, values in durations.items()
        ]
        figures: dict[str, Any] = {"device": "cpu", "startup": rows}
        text = format_table(["", "s", "min..max", "CPU s"], [_cells(row) for row in rows])
        if arguments.annotation_images:
            figures["annotations"] = _annotation_figures(arguments, folder, say)
            text += "\n\n" + _annotation_table(figures["annotations"])
    return figures, text


_IMPORTS = [sys.executable, "-c", "import torch, torchvision"]


def _toy_run(folder: Path) -> list[str]:
    """Arguments of a run whose iterations take next to no time."""
    annotations = write_images(folder, [(256, 192)] * 8, seed=0)
    settings = {**_TOY, "train-images": str(folder), "train-annotations": str(annotations)}
    return [text for name, value in settings.items() for text in (f"--{name}", value)]


def _finished(command: Sequence[str]) -> Duration:
    """Until the command has ended."""
    start, cpu_start = time.perf_counter(), _cpu_of_children()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Duration(time.perf_counter() - start, _cpu_of_children() - cpu_start)


def _first_record(command: Sequence[str], output: Path) -> Duration:
    """Until metrics.jsonl holds the record of the first iteration; the run is ended then."""
    start, cpu_start = time.perf_counter(), _cpu_of_children()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    metrics = output / "metrics.jsonl"
    try:
        while time.perf_counter() - start < _TIMEOUT_SECONDS:
            if metrics.exists() and '"train"' in metrics.read_text():
                seconds = time.perf_counter() - start
                process.kill()
                process.communicate()
                return Duration(seconds, _cpu_of_children() - cpu_start)
            if process.poll() is not None:
                error = process.stderr.read() if process.stderr else ""
                raise BenchmarkError(f"{' '.join(command)} ended before its first iteration:\n{error[-2000:]}")
            time.sleep(_POLL_SECONDS)
        raise BenchmarkError(f"{' '.join(command)}: no iteration within {_TIMEOUT_SECONDS:.0f} s")
    finally:
        process.kill()
        process.wait()


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _annotation_figures(arguments: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    say(f"making annotations of {arguments.annotation_images} images")
    file = folder / "large.json"
    num_boxes = write_large_annotations(file, arguments.annotation_images)
    rows: dict[str, list[dict[str, float]]] = {}
    for number in range(arguments.repeats):
        say(f"annotations, round {number + 1} of {arguments.repeats}")
        for reader in READERS:
            # The cache of this round is made by the reader before the one that maps it.
            rows.setdefault(reader, []).append(_in_own_process(reader, file, folder / f"cache_{number}"))
    readers = [
        {"name": name, **{key: spread([run[key] for run in runs]) for key in runs[0]}} for name, runs in rows.items()
    ]
    return {
        "images": arguments.annotation_images,
        "boxes": num_boxes,
        "file_mb": file.stat().st_size / 1e6,
        "readers": readers,
    }


def write_large_annotations(file: Path, num_images: int) -> int:
    """A file like instances_train2017.json, polygons included, written piece by piece; the number of its boxes."""
    rng = np.random.default_rng(0)
    sizes = draw_sizes(num_images, 0)
    counts = rng.poisson(BOXES_PER_IMAGE - 1, num_images) + 1
    polygon = rng.uniform(0, 400, 2 * _POLYGON_POINTS).round(2).tolist()
    with file.open("w") as out:
        out.write('{"categories": ' + json.dumps(categories()) + ', "images": [')
        for number, (width, height) in enumerate(sizes, start=1):
            image = {"id": number, "file_name": f"{number:012d}.jpg", "width": width, "height": height, "license": 1}
            out.write((", " if number > 1 else "") + json.dumps(image))
        out.write('], "annotations": [')
        number = 0
        for image_id, (count, (width, height)) in enumerate(zip(counts.tolist(), sizes, strict=True), start=1):
            corners = rng.uniform(0, 0.7, (count, 2)) * [width, height]
            sides = rng.uniform(0.02, 0.3, (count, 2)) * [width, height]
            for box, category in zip(
                np.concatenate([corners, sides], axis=1).round(2).tolist(),
                rng.integers(1, NUM_CLASSES + 1, count).tolist(),
                strict=True,
            ):
                number += 1
                record = {"id": number, "image_id": image_id, "category_id": category, "bbox": box, "iscrowd": 0}
                record |= {"area": round(box[2] * box[3], 2), "segmentation": [polygon]}
                out.write((", " if number > 1 else "") + json.dumps(record))
        out.write("]}")
    return number


def _in_own_process(reader: str, file: Path, cache: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.startup", reader, str(file), str(cache)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise BenchmarkError(f"{reader} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _read_with_json(file: Path, cache: Path) -> None:
    json.loads(file.read_bytes())


def _read_with_pycocotools(file: Path, cache: Path) -> None:
    from pycocotools.coco import COCO

    COCO(str(file))


def _read_with_ours(file: Path, cache: Path) -> None:
    from data import read_coco

    read_coco(file, cache_dir=cache)


READERS: dict[str, Callable[[Path, Path], None]] = {
    "json.loads": _read_with_json,
    "pycocotools.COCO": _read_with_pycocotools,
    "ours, first start": _read_with_ours,
    "ours, later starts": _read_with_ours,
}


def read_once(reader: str, file: Path, cache: Path) -> dict[str, float]:
    """Seconds and memory of one reading, without the imports."""
    import pycocotools.coco  # noqa: F401

    import data  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    wall, cpu = time.perf_counter(), time.process_time()
    READERS[reader](file, cache)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "grown_mb": grown}


def _cells(row: dict[str, Any]) -> list[str]:
    seconds, cpu = row["seconds"], row["cpu_seconds"]
    spread_out = f"{seconds['min']:.2f}..{seconds['max']:.2f}"
    return [row["name"], f"{seconds['median']:.2f}", spread_out, f"{cpu['median']:.2f}"]


def _annotation_table(figures: dict[str, Any]) -> str:
    head = f"annotations of {figures['images']:,} images, {figures['boxes']:,} boxes, {figures['file_mb']:.0f} MB"
    cells = [[*_cells(row), f"{row['grown_mb']['median']:.0f}"] for row in figures["readers"]]
    return head + "\n" + format_table(["", "s", "min..max", "CPU s", "grown MB"], cells)


if __name__ == "__main__":
    print(json.dumps(read_once(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
