"""Scaling of the training step: N processes together, beside one of them alone, in the same run."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import checkout  # noqa: F401
from benchmarks.multiprocess import measure_together
from benchmarks.profilers import synchronize
from benchmarks.steps import OurStep
from benchmarks.timing import format_table, spread
from benchmarks.variants import Variant, Work
from detection.engine.distributed.comm import Processes, without_gradient_exchange

ALONE, APART, TOGETHER = "one process alone", "all, gradients kept apart", "all, gradients exchanged"


def measure_scaling(
    arguments: argparse.Namespace, device: torch.device, say: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """Seconds of a step of `--nproc` processes, each with `--batch-size` images, and of one of them alone.

    Always on the wall clock: waiting for the others is what is to be seen.
    """
    (figures,) = measure_together(arguments, device, say, [_measure])
    return figures, _table(figures)


def _measure(processes: Processes, work: Work, variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    device, batches = work.device, work.batches
    shared = OurStep(variant, work, processes)
    single = OurStep(variant, work) if processes.is_main else None

    def apart() -> None:
        with without_gradient_exchange(shared.gradients.model):
            shared.train(batches)

    runs: dict[str, Callable[[], None]] = {ALONE: lambda: None, APART: apart, TOGETHER: partial(shared.train, batches)}
    if variant.graphs:  # their exchange is the loop's own, after the passes
        del runs[APART]
    if single is not None:
        runs[ALONE] = partial(single.train, batches)
    shared.settle(runs[TOGETHER])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(arguments.repeats + 1):
        for name, run in runs.items():
            processes.barrier()
            start = time.perf_counter()
            run()
            synchronize(device)
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
        "scaling_efficiency": spread([alone / run_on_all_ranks for alone, run_on_all_ranks in pairs]),
    }


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
