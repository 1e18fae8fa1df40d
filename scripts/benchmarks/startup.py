"""Seconds from the start of the process to its imports, a checked plan, the first iteration; large annotations."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import checkout
from benchmarks.figures import (
    BenchmarkError,
    Samples,
    Say,
    add_common_arguments,
    add_sample,
    figure_rows,
    figure_table,
    format_table,
    in_own_process,
    measured,
)
from benchmarks.scenes import draw_sizes, write_annotations, write_boxes, write_images

_POLYGON = [[round(7.3 * number % 400, 2) for number in range(48)]]
"""Of every box: 24 points, so that a file is as large as train2017's."""
READERS = ("json.loads", "pycocotools.COCO", "ours, first start", "ours, later starts")
_POLL_SECONDS = 0.02
_TIMEOUT_SECONDS = 600.0
_TOY = ["--model", "faster_rcnn_r18_fpn", "--weights", "none", "--min-size", "128", "--max-size", "213",
        "--batch-size", "1", "--max-epochs", "1"]  # fmt: skip
"""A run whose iterations take next to no time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=3)
    parser.add_argument(
        "--annotation-images",
        type=int,
        default=0,
        metavar="N",
        help="also read annotations of N images, e.g. 118000 as train2017 (400 MB, a minute to make) [0: not]",
    )
    parser.add_argument(
        "--boxes-per-image",
        type=float,
        metavar="X",
        help="on average, without polygons; Objects365: 1740000 images of 14.7 (4 GB) [COCO's 7, with polygons]",
    )
    parser.add_argument("--ours-only", action="store_true", help="no json.loads, no pycocotools (700 bytes a box)")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="instead: N processes on this machine find each other and agree, as a run does before it has a model",
    )


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the tables."""
    if arguments.processes:
        return _many_processes(arguments, say)
    samples: Samples = {}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder = Path(name)
        annotations = write_images(folder / "images", [(256, 192)] * 8, seed=0)
        program = [sys.executable, str(checkout.ROOT / "train.py")]
        training = [*program, "--schedule", "1x", *_TOY, "--train-images", str(folder / "images")]
        training += ["--train-annotations", str(annotations)]
        for number in range(arguments.repeats):
            say(f"round {number + 1} of {arguments.repeats}")
            output = folder / f"run_{number}"
            commands: dict[str, tuple[list[str], Path | None]] = {
                "import torch and torchvision (the peer)": ([sys.executable, "-c", "import torch, torchvision"], None),
                "train.py --help": ([*program, "--help"], None),
                "train.py --dry-run": ([*training, "--output-dir", str(output), "--dry-run"], None),
                "train.py to the first iteration's record": ([*training, "--output-dir", str(output)], output),
            }
            for title, (command, waits_in) in commands.items():
                add_sample(samples, title, duration(command, waits_in))
        figures: dict[str, Any] = {"device": "cpu", "startup": figure_rows(samples, [], "seconds")}
        text = figure_table(figures["startup"], "seconds", "s", CPU_s=_cpu)
        if arguments.annotation_images:
            figures["annotations"] = _annotation_figures(arguments, folder, say)
            text += "\n\n" + _annotation_table(figures["annotations"])
    return figures, text


def _many_processes(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    rows: list[dict[str, Any]] = []
    for number in arguments.processes:
        say(f"{number} processes")
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Forked, so that the imports, which each machine of a cluster does for itself, are done once.
        context = multiprocessing.get_context("fork")
        said: Any = context.SimpleQueue()
        processes = [context.Process(target=_join, args=(rank, number, port, said)) for rank in range(number)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_TIMEOUT_SECONDS)
        seconds = time.perf_counter() - start
        if failed := [rank for rank, process in enumerate(processes) if process.exitcode != 0]:
            for process in processes:
                process.kill()
            raise BenchmarkError(f"of {number} processes these did not start: {failed}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found = said.get()
        rows.append({"processes": number, "seconds": seconds, "cpu_seconds": cpu_seconds, **found})
    cells = [[f"{row[key]:.2f}" if key != "processes" else str(row[key]) for key in rows[0]] for row in rows]
    table = format_table([key.replace("_", " ") for key in rows[0]], cells)
    return {"device": "cpu", "processes": rows}, table


def _join(rank: int, number: int, port: int, said: Any) -> None:
    """One of the processes: what a run does with the others before it has a model."""
    from detection.engine.distributed.comm import start_processes, stop_processes

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    start = time.perf_counter()
    processes = start_processes("cpu", threads=1)
    joined = time.perf_counter()
    processes.gather_objects({"rank": rank})
    processes.broadcast("a configuration" if processes.is_main else None)
    processes.barrier()
    agreed = time.perf_counter()
    whole = processes.gather_arrays(np.full((1000, 5), float(rank), dtype=np.float32))
    if whole is not None:
        assert len(whole) == 1000 * number
        said.put({"joined_s": joined - start, "agreed_s": agreed - joined, "gathered_s": time.perf_counter() - agreed})
    processes.barrier()
    stop_processes()


def duration(command: list[str], output: Path | None) -> dict[str, float]:
    """Until the command has ended; with `output` until its metrics.jsonl holds the record of an iteration, which ends
    the run. CPU-seconds are those of all its processes."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, cwd=checkout.ROOT)
        try:
            while process.poll() is None and not (output is not None and _has_record(output)):
                if time.perf_counter() - start > _TIMEOUT_SECONDS:
                    raise BenchmarkError(f"{' '.join(command)}: not done within {_TIMEOUT_SECONDS:.0f} s")
                time.sleep(_POLL_SECONDS)
            seconds = time.perf_counter() - start
            if process.returncode or (output is not None and not _has_record(output)):
                said.seek(0)
                raise BenchmarkError(f"{' '.join(command)} failed:\n{said.read()[-2000:]}")
        finally:
            process.kill()
            process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def _has_record(output: Path) -> bool:
    metrics = output / "metrics.jsonl"
    return metrics.exists() and '"train"' in metrics.read_text()


def _cpu(row: Any) -> str:
    return f"{row['cpu_seconds']['median']:.2f}"


def _annotation_figures(arguments: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    say(f"making annotations of {arguments.annotation_images} images")
    file = folder / "large.json"
    sizes = draw_sizes(arguments.annotation_images, 0)
    if arguments.boxes_per_image is None:
        num_boxes = len(write_annotations(file, sizes, 0, segmentation=_POLYGON)["annotations"])
    else:
        num_boxes = write_boxes(file, sizes, arguments.boxes_per_image)
    os.environ["OMP_NUM_THREADS"] = "1"
    samples: Samples = {}
    for number in range(arguments.repeats):
        say(f"annotations, round {number + 1} of {arguments.repeats}")
        for reader in READERS[2:] if arguments.ours_only else READERS:
            # The cache of this round is made by the reader before the one that maps it.
            add_sample(samples, reader, in_own_process(read_once, reader, file, folder / f"cache_{number}"))
    return {
        "images": arguments.annotation_images,
        "boxes": num_boxes,
        "file_mb": file.stat().st_size / 1e6,
        "readers": figure_rows(samples, [], "seconds"),
    }


def read_once(reader: str, file: Path, cache: Path) -> dict[str, float]:
    """Seconds and memory of one reading, without the imports."""
    from pycocotools.coco import COCO

    from data import read_coco

    others: dict[str, Callable[[], object]] = {
        "json.loads": lambda: json.loads(file.read_bytes()),
        "pycocotools.COCO": lambda: COCO(str(file)),
    }
    return measured(others.get(reader, lambda: read_coco(file, cache_dir=cache)))[1]


def _annotation_table(figures: dict[str, Any]) -> str:
    head = f"annotations of {figures['images']:,} images, {figures['boxes']:,} boxes, {figures['file_mb']:.0f} MB"
    table = figure_table(
        figures["readers"], "seconds", "s", CPU_s=_cpu, grown_MB=lambda row: f"{row['grown_mb']['median']:.0f}"
    )
    return f"{head}\n{table}"
