"""Scaling of the training: train.py in N processes together, beside one of them alone, in the same run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import checkout
from benchmarks.figures import BenchmarkError, Say, figure_rows, figure_table, pairwise_ratio, rotated
from benchmarks.scenes import use_data_path
from benchmarks.steps import Variant, load_work

ALONE, APART, TOGETHER = "one process alone", "all, gradients kept apart", "all, gradients exchanged"
_WARM_ITERATIONS, _TIMED_ITERATIONS = 2, 5


def measure_scaling(
    arguments: argparse.Namespace, variant: Variant, device: torch.device, folder: Path, say: Say
) -> tuple[dict[str, Any], str]:
    """Seconds of an iteration of `--nproc` processes, each with `--batch-size` images, and of one of them alone.

    Each is a training of its own; its metrics.jsonl tells the seconds. Always on the wall clock: waiting for the others
    is what is to be seen. Gradients kept apart: as many trainings of one process side by side. On the CPU each process
    has `--threads` threads, or its share of the cores.
    """
    number = arguments.nproc
    if number < 2:
        raise BenchmarkError("--nproc: scaling takes 2 processes at least")
    if device.type == "cuda" and number > torch.cuda.device_count():
        raise BenchmarkError(f"--nproc {number}: there are {torch.cuda.device_count()} GPUs")
    if variant.owner != "ours" or len(arguments.variants or [1]) > 1:
        raise BenchmarkError("--nproc: one variant of ours at a time")
    train = _train_command(arguments, variant, device, folder)
    threads = arguments.threads or max(1, len(os.sched_getaffinity(0)) // number)
    together = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    runs: dict[str, list[list[str]]] = {ALONE: [train], APART: [train] * number, TOGETHER: [together + train]}
    samples: dict[str, dict[str, list[float]]] = {name: {"seconds": []} for name in runs}
    for round_number, names in enumerate(rotated(list(runs), arguments.repeats), start=1):
        for name in names:
            outputs = [folder / f"run_{place}" for place in range(len(runs[name]))]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            trainings = []
            for place, (command, output) in enumerate(zip(runs[name], outputs, strict=True)):
                if name == APART and device.type == "cuda":
                    environment["CUDA_VISIBLE_DEVICES"] = str(place)
                words = [sys.executable, *command, "--output-dir", str(output)]
                streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
                trainings.append(subprocess.Popen(words, env=environment, text=True, **streams))
            for training in trainings:
                _, said = training.communicate()
                if training.returncode != 0:
                    raise BenchmarkError(f"a training of {name} failed:\n{said[-2000:]}")
            images = arguments.batch_size * (number if name == TOGETHER else 1)
            samples[name]["seconds"].append(max(images / _images_per_second(output) for output in outputs))
            for output in outputs:
                shutil.rmtree(output)
        say(f"round {round_number} of {arguments.repeats}")
    rows = figure_rows(samples, [], "seconds")
    for row in rows:
        images = arguments.batch_size * (1 if row["name"] == ALONE else number)
        row["images_per_second"] = images / row["seconds"]["median"]
    efficiency = pairwise_ratio(samples[TOGETHER]["seconds"], samples[ALONE]["seconds"])
    figures = {
        "device": device.type,
        "variant": variant.name,
        "processes": number,
        "threads": threads,
        "batch_size": arguments.batch_size,
        "scaling": rows,
        "scaling_efficiency": efficiency,
    }
    rate = {"images/s": lambda row: f"{row['images_per_second']:.2f}"}
    threads_of_each = f", {threads} threads each" if device.type == "cpu" else ""
    return figures, (
        f"{variant.name}: {number} processes{threads_of_each}, {arguments.batch_size} images each\n\n"
        f"{figure_table(rows, 'seconds', 'ms a step (wall)', 1e3, **rate)}\n\n"
        f"scaling efficiency {efficiency['median']:.0%} ({efficiency['min']:.0%}..{efficiency['max']:.0%})"
    )


def _train_command(arguments: argparse.Namespace, variant: Variant, device: torch.device, folder: Path) -> list[str]:
    """train.py and its arguments, on a set that lasts for the iterations."""
    use_data_path(arguments)
    num_iterations = _WARM_ITERATIONS + _TIMED_ITERATIONS
    pictures = num_iterations * arguments.nproc * arguments.batch_size
    work = load_work(argparse.Namespace(**{**vars(arguments), "pictures": pictures}), folder, torch.device("cpu"))
    settings = {
        "--schedule": "1x",
        "--train-images": arguments.images or folder,
        "--train-annotations": arguments.annotations or folder / "annotations.json",
        "--model": arguments.model,
        "--weights": work.weights,
        "--device": device.type,
        "--amp": variant.amp,
        "--min-size": work.min_size,
        "--max-size": work.max_size,
        "--batch-size": arguments.batch_size,
        "--max-epochs": 1,
        "--limit-train-batches": num_iterations,
        "--log-interval": 1,
    }
    words = [str(checkout.ROOT / "train.py"), *(str(word) for pair in settings.items() for word in pair)]
    words += [] if variant.channels_last else ["--no-channels-last"]
    return words + ["--compile"] * variant.compiled + ["--cuda-graphs" if variant.graphs else "--no-cuda-graphs"]


def _images_per_second(output: Path) -> float:
    """Of a training's later iterations, in the median."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rates = [record["images_per_second"] for record in records if record["kind"] == "train"]
    return statistics.median(rates[_WARM_ITERATIONS:])
