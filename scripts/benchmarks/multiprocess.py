"""Processes that measure the training step together, on one machine, as torchrun would start them."""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

import checkout  # noqa: F401
from benchmarks.inputs import open_images, train_loader
from benchmarks.scenes import native_size
from benchmarks.timing import BenchmarkError
from benchmarks.torchvision_peer import starting_weights
from benchmarks.variants import Variant, Work
from data import CocoDataset, read_coco
from detection.engine.distributed.comm import Processes, start_processes, stop_processes
from detection.process_exit import leave

Measure = Callable[[Processes, Work, Variant, argparse.Namespace], dict[str, Any]]
"""What every process does; rank 0's result counts. It is sent to the processes by its name."""


def measure_together(
    arguments: argparse.Namespace, device: torch.device, say: Callable[[str], None], measures: Sequence[Measure]
) -> list[dict[str, Any]]:
    """The result of each of `measures`, carried out by `--nproc` fresh processes, each with `--batch-size` images.

    On the CPU each process has `--threads` threads, or its share of the cores.
    """
    num_processes = arguments.nproc
    if num_processes < 2:
        raise BenchmarkError("--nproc: scaling takes 2 processes at least")
    if device.type == "cuda" and num_processes > torch.cuda.device_count():
        raise BenchmarkError(f"--nproc {num_processes}: there are {torch.cuda.device_count()} GPUs")
    precision = "fp32" if arguments.amp == "off" else arguments.amp
    how = ("-compile" if arguments.compile else "") + ("-graphs" if arguments.graphs else "")
    names = arguments.variants or [f"ours-{precision}-cl{how}"]
    if len(names) > 1 or Variant.parse(names[0]).owner != "ours":
        raise BenchmarkError("--nproc: one variant of ours at a time")
    size, min_size, max_size = None, arguments.min_size, arguments.max_size
    if arguments.height is not None:
        size = native_size(arguments.height, arguments.width)
        min_size, max_size = sorted((arguments.height, arguments.width))
    results = []
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        arguments.pictures = arguments.pictures or num_processes * arguments.batch_size * arguments.batches
        dataset = open_images(arguments, Path(folder), size=size)
        annotations = arguments.annotations or Path(folder) / "annotations.json"
        first = next(train_loader(arguments, dataset, (min_size, max_size), world_size=num_processes).batches(0, 1))
        with starting_weights(arguments.model, len(dataset.class_names), first) as weights:
            result = Path(folder) / "result.json"
            for measure in measures:
                say(f"starting {num_processes} processes")
                settings = {
                    "arguments": arguments,
                    "images": str(arguments.images or folder),
                    "annotations": str(annotations),
                    "sizes": (min_size, max_size),
                    "weights": str(weights),
                    "variant": names[0],
                    "device": device.type,
                    "port": _free_port(),
                    "result": str(result),
                }
                torch.multiprocessing.start_processes(
                    _process, (settings, measure), num_processes, start_method="spawn"
                )
                results.append(json.loads(result.read_text()))
    return results


def _process(rank: int, settings: dict[str, Any], measure: Measure) -> None:
    arguments = settings["arguments"]
    world_size = arguments.nproc
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(settings["port"]),
    )
    processes = start_processes(settings["device"])
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    elif settings["device"] == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    try:
        figures = measure(processes, _work(processes, settings), Variant.parse(settings["variant"]), arguments)
        if processes.is_main:
            Path(settings["result"]).write_text(json.dumps(figures))
    finally:
        stop_processes()
    leave(0)


def _work(processes: Processes, settings: dict[str, Any]) -> Work:
    arguments, device = settings["arguments"], processes.device
    dataset = CocoDataset(settings["images"], read_coco(settings["annotations"]), training=True)
    min_size, max_size = settings["sizes"]
    loader = train_loader(
        arguments, dataset, (min_size, max_size), rank=processes.rank, world_size=processes.world_size
    )
    batches = tuple(loader.batches(0, arguments.batches))
    if device.type == "cuda":
        batches = tuple(batch.pin_memory() for batch in batches)
    return Work(
        arguments.model,
        len(dataset.class_names),
        min_size,
        max_size,
        device,
        loader,
        batches,
        Path(settings["weights"]),
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
