"""How processes exchange gradients: DistributedDataParallel's settings, each turned round, in time and memory."""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.parallel import DistributedDataParallel

import checkout  # noqa: F401
from benchmarks.multiprocess import measure_together
from benchmarks.peak_memory import PeakMemory
from benchmarks.profilers import synchronize
from benchmarks.steps import OurStep
from benchmarks.timing import format_table, pairwise_ratio, spread
from benchmarks.variants import Variant, Work
from detection.engine.distributed import comm
from detection.engine.distributed.comm import Processes

FULL = "as train.py does"
SETTINGS: dict[str, dict[str, bool]] = {
    FULL: {},
    "gradients copied into buckets": {"gradient_as_bucket_view": False},
    "static graph": {"static_graph": True},
}


def measure_exchange(
    arguments: argparse.Namespace, device: torch.device, say: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """Times of all settings in one interleaved run, and the peak memory of each in processes of its own."""
    figures, *peaks = measure_together(arguments, device, say, [_times, *(partial(_peak, name) for name in SETTINGS)])
    figures["peak_memory_gb"] = {name: peak["gb"] for name, peak in zip(SETTINGS, peaks, strict=True)}
    return figures, _table(figures)


def _step(name: str, variant: Variant, work: Work, processes: Processes) -> OurStep:
    def wrapper(*args: Any, **kwargs: Any) -> DistributedDataParallel:
        return DistributedDataParallel(*args, **{**kwargs, **SETTINGS[name]})

    # The engine looks there for the names of arguments.
    wrapper.__signature__ = inspect.signature(DistributedDataParallel)  # type: ignore[attr-defined]
    with mock.patch.object(comm, "DistributedDataParallel", wrapper):
        return OurStep(variant, work, processes)


def _times(processes: Processes, work: Work, variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    steps = {name: _step(name, variant, work, processes) for name in SETTINGS}
    next(iter(steps.values())).settle(lambda: None)  # the first round, which is not counted, fills the memory
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(arguments.repeats + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            processes.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            steps[name].train(work.batches)
            synchronize(work.device)
            took = time.perf_counter() - start, time.process_time() - start_cpu
            everybody = processes.gather_objects(took)
            if number:  # the first round is not counted
                wall[name].append(max(seconds for seconds, _ in everybody) / len(work.batches))
                cpu[name].append(sum(seconds for _, seconds in everybody) / len(work.batches))
    return {
        "device": work.device.type,
        "variant": variant.name,
        "processes": processes.world_size,
        "threads": torch.get_num_threads(),
        "batch_size": arguments.batch_size,
        "shapes": [list(batch.padded_size) for batch in work.batches],
        "clock": arguments.clock,
        "seconds": {name: spread(values) for name, values in wall.items()},
        "cpu_seconds": {name: spread(values) for name, values in cpu.items()},
        "ratio": {
            name: pairwise_ratio(values[FULL], values[name])
            for values in (wall if arguments.clock == "wall" else cpu,)
            for name in names
        },
        "losses": {name: step.losses() for name, step in steps.items()},
    }


def _peak(
    name: str, processes: Processes, work: Work, variant: Variant, arguments: argparse.Namespace
) -> dict[str, Any]:
    memory = PeakMemory(work.device)
    step = _step(name, variant, work, processes)
    run = partial(step.train, work.batches)
    step.settle(run)
    run()
    memory.reset()
    run()
    return {"gb": max(processes.gather_objects(memory.bytes_added())) / 2**30}


def _table(figures: Mapping[str, Any]) -> str:
    cells = []
    key = "seconds" if figures["clock"] == "wall" else "cpu_seconds"
    for name, seconds in figures[key].items():
        ratio = figures["ratio"][name]
        cells.append(
            [name, f"{seconds['median'] * 1e3:.1f}", f"{seconds['min'] * 1e3:.1f}..{seconds['max'] * 1e3:.1f}"]
            + [f"{ratio['median']:.3f} ({ratio['min']:.3f}..{ratio['max']:.3f})"]
            + [f"{figures['peak_memory_gb'][name]:.3f}"]
        )
    of = "the slowest's wall clock" if figures["clock"] == "wall" else "CPU of all processes together"
    return "\n".join(
        [
            f"{figures['variant']}: {figures['processes']} processes, {figures['batch_size']} images each; {of}",
            "",
            format_table(["gradients exchanged", "ms a step", "min..max", "x time", "peak GB a process"], cells),
        ]
    )
