"""Scaling of the training step: N processes together, beside one of them alone, in the same run."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

import checkout  # noqa: F401
from benchmark_inputs import open_pictures
from benchmark_probes import synchronise
from benchmark_scenes import native_size
from benchmark_steps import OurStep, Variant, Work, starting_weights
from benchmark_timing import BenchmarkError, format_table, spread
from data import CocoDataset, TrainLoader, read_coco
from detection.engine.distributed import Processes, start_processes, stop_processes, without_gradient_exchange

ALONE, APART, TOGETHER = "one process alone", "all, gradients kept apart", "all, gradients exchanged"


def measure_scaling(
    arguments: argparse.Namespace, device: torch.device, say: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """Seconds of a step of `--nproc` processes, each with `--batch-size` images, and of one of them alone.

    On the CPU each process has `--threads` threads, or its share of the cores. Always on the wall clock: waiting for
    the others is what is to be seen.
    """
    num_processes = arguments.nproc
    if num_processes < 2:
        raise BenchmarkError("--nproc: scaling takes 2 processes at least")
    if device.type == "cuda" and num_processes > torch.cuda.device_count():
        raise BenchmarkError(f"--nproc {num_processes}: there are {torch.cuda.device_count()} GPUs")
    precision = "fp32" if arguments.amp == "off" else arguments.amp
    compiled = "-compile" if arguments.compile else ""
    names = arguments.variants or [f"ours-{precision}-cl{compiled}"]
    if len(names) > 1 or Variant.parse(names[0]).owner != "ours":
        raise BenchmarkError("--nproc: one variant of ours at a time")
    size, min_size, max_size = None, arguments.min_size, arguments.max_size
    if arguments.height is not None:
        size = native_size(arguments.height, arguments.width)
        min_size, max_size = sorted((arguments.height, arguments.width))
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        arguments.pictures = arguments.pictures or num_processes * arguments.batch_size * arguments.batches
        dataset = open_pictures(arguments, Path(folder), size=size)
        annotations = arguments.annotations or Path(folder) / "annotations.json"
        first = next(_loader(dataset, arguments, min_size, max_size, 0, num_processes).batches(0, 1))
        say(f"starting {num_processes} processes")
        with starting_weights(arguments.model, len(dataset.class_names), first) as weights:
            result = Path(folder) / "scaling.json"
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
            torch.multiprocessing.start_processes(_process, (settings,), num_processes, start_method="spawn")
        figures = json.loads(result.read_text())
    return figures, _table(figures)


def _process(rank: int, settings: dict[str, Any]) -> None:
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
        figures = _measure(processes, settings)
        if processes.is_main:
            Path(settings["result"]).write_text(json.dumps(figures))
    finally:
        stop_processes()


def _measure(processes: Processes, settings: dict[str, Any]) -> dict[str, Any]:
    arguments, device = settings["arguments"], processes.device
    dataset = CocoDataset(settings["images"], read_coco(settings["annotations"]), training=True)
    min_size, max_size = settings["sizes"]
    loader = _loader(dataset, arguments, min_size, max_size, processes.rank, processes.world_size)
    batches = tuple(loader.batches(0, arguments.batches))
    if device.type == "cuda":
        batches = tuple(batch.pin_memory() for batch in batches)
    work = Work(
        arguments.model,
        len(dataset.class_names),
        min_size,
        max_size,
        device,
        loader,
        batches,
        Path(settings["weights"]),
    )
    variant = Variant.parse(settings["variant"])
    shared = OurStep(variant, work, processes)
    single = OurStep(variant, work) if processes.is_main else None

    def apart() -> None:
        with without_gradient_exchange(shared.loop.model):
            shared.train(batches)

    runs: dict[str, Callable[[], None]] = {ALONE: lambda: None, APART: apart, TOGETHER: partial(shared.train, batches)}
    if single is not None:
        runs[ALONE] = partial(single.train, batches)
    shared.settle(runs[TOGETHER])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(arguments.repeats + 1):
        for name, run in runs.items():
            processes.barrier()
            start = time.perf_counter()
            run()
            synchronise(device)
            slowest = max(processes.gather_objects(time.perf_counter() - start))
            if number:  # the first round is not counted
                seconds[name].append(slowest / len(batches))
    gradients = sum(p.numel() * p.element_size() for p in shared.model.parameters() if p.requires_grad)
    pairs = zip(seconds[ALONE], seconds[TOGETHER], strict=True)
    return {
        "device": device.type,
        "variant": variant.name,
        "processes": processes.world_size,
        "threads": torch.get_num_threads(),
        "batch_size": arguments.batch_size,
        "shapes": [list(batch.padded_size) for batch in batches],
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "gradient_mb": gradients / 1e6,
        "scaling_efficiency": spread([alone / together for alone, together in pairs]),
    }


def _loader(
    dataset: CocoDataset, arguments: argparse.Namespace, min_size: int, max_size: int, rank: int, world_size: int
) -> TrainLoader:
    return TrainLoader(
        dataset,
        min_size=min_size,
        max_size=max_size,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        rank=rank,
        world_size=world_size,
        few_shapes=arguments.compile,
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _table(figures: dict[str, Any]) -> str:
    cells = []
    for name, seconds in figures["seconds"].items():
        images = figures["batch_size"] * (1 if name == ALONE else figures["processes"])
        middle = statistics.median(seconds["values"])
        cells.append(
            [name, f"{middle * 1e3:.1f}", f"{seconds['min'] * 1e3:.1f}..{seconds['max'] * 1e3:.1f}"]
            + [f"{images / middle:.2f}"]
        )
    efficiency = figures["scaling_efficiency"]
    threads = f", {figures['threads']} threads each" if figures["device"] == "cpu" else ""
    return "\n".join(
        [
            f"{figures['variant']}: {figures['processes']} processes{threads}, {figures['batch_size']} images each, "
            f"{figures['gradient_mb']:.0f} MB of gradients a step",
            "",
            format_table(["", "ms a step (wall)", "min..max", "images/s"], cells),
            "",
            f"scaling efficiency {efficiency['median']:.0%} ({efficiency['min']:.0%}..{efficiency['max']:.0%})",
        ]
    )
