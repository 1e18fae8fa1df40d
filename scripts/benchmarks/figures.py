"""How figures are made and shown: interleaved timing, medians with their spread, ratios to a peer; and their record.

Every variant runs once a round, and ratios come from pairs of the same round. Hardware, versions, date, commit and
command stand beside the figures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from checkout import ROOT
from detection.reporting.tables import aligned

T = TypeVar("T")
Say = Callable[[str], None]
"""Tells on stderr how far a benchmark is."""
Samples = dict[str, dict[str, list[float]]]
"""name -> quantity ("seconds", "cpu_seconds", ...) -> its value in each round."""
CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
"""--clock -> the quantity that ratios are taken of."""


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as asked for."""


def rotated(names: Sequence[str], repeats: int) -> Iterator[list[str]]:
    """The names once a round, in an order that rotates: what slows the machine for a while slows all of them."""
    for number in range(repeats):
        shift = number % len(names)
        yield [*names[shift:], *names[:shift]]


def interleave(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    wait: Callable[[], None] = lambda: None,
    say: Say = lambda text: None,
) -> Samples:
    """Time each of `runs` once a round, `repeats` rounds, after one untimed round.

    `wait` ends when the device has done all it was given.
    """
    samples: Samples = {name: {"seconds": [], "cpu_seconds": []} for name in runs}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        wait()
        say(f"warm: {name} ({time.perf_counter() - start:.1f} s)")
    for number, names in enumerate(rotated(list(runs), repeats), start=1):
        for name in names:
            gc.collect()
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            wait()
            samples[name]["cpu_seconds"].append(time.process_time() - cpu)
            samples[name]["seconds"].append(time.perf_counter() - wall)
        say(f"round {number} of {repeats}")
    return samples


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a fresh process: its memory and imports are the call's alone."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def measured(call: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """The result of a call, and its seconds, CPU-seconds, and the memory of this process: peak_mb, grown_mb."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result, seconds | {"peak_mb": peak / 1e3, "grown_mb": (peak - before) / 1e3}


def add_sample(samples: Samples, name: str, quantities: Mapping[str, float]) -> None:
    """One more round of `name`."""
    for quantity, value in quantities.items():
        samples.setdefault(name, {}).setdefault(quantity, []).append(value)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """median, min, max and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def pairwise_ratio(values: Sequence[float], peer: Sequence[float]) -> dict[str, Any]:
    """How many times faster than the peer: the peer's seconds over ours, round by round."""
    return spread([theirs / ours for ours, theirs in zip(values, peer, strict=True)])


def figure_rows(samples: Samples, peers: Sequence[str], key: str, *, units: float = 1.0) -> list[dict[str, Any]]:
    """JSON rows: the spread of each quantity, and by `key` the ratio to each of `peers`.

    A round holds `units` (steps, images, ...): quantities in seconds are given for one of them.
    """
    rows: list[dict[str, Any]] = []
    for name, quantities in samples.items():
        row: dict[str, Any] = {"name": name}
        for quantity, values in quantities.items():
            per_unit = units if quantity.endswith("seconds") else 1.0
            row[quantity] = spread([value / per_unit for value in values])
        known = [peer for peer in peers if peer in samples]
        row["ratios"] = {peer: pairwise_ratio(quantities[key], samples[peer][key]) for peer in known}
        rows.append(row)
    return rows


def figure_table(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    heading: str,
    scale: float = 1.0,
    **more: Callable[[Mapping[str, Any]], str],
) -> str:
    """The rows as a table: median and spread of `key` times `scale`, columns of `more`, ratios to the peers.

    more: heading, with _ for a space, and what makes the cell from the row.
    """
    peers = list(rows[0]["ratios"])
    headers = ["", heading, "min..max", *(name.replace("_", " ") for name in more), *(f"x {peer}" for peer in peers)]
    cells = []
    for row in rows:
        middle, low, high = (row[key][which] * scale for which in ("median", "min", "max"))
        line = [row["name"], f"{middle:.2f}", f"{low:.2f}..{high:.2f}", *(cell(row) for cell in more.values())]
        cells.append(line + [ratio_cell(row["ratios"][peer]) for peer in peers])
    return format_table(headers, cells)


def ratio_cell(ratio: Mapping[str, Any], digits: int = 2) -> str:
    return f"{ratio['median']:.{digits}f} ({ratio['min']:.{digits}f}..{ratio['max']:.{digits}f})"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    rules = ["-" * max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    return "\n".join(aligned([headers, rules, *rows], {0}))


def nested_table(title: str, cells: Mapping[str, Mapping[str, str]]) -> str:
    """A column for each name, a row for each key of what the names have."""
    keys = dict.fromkeys(key for column in cells.values() for key in column)
    rows = [[key, *(column.get(key, "-") for column in cells.values())] for key in keys]
    return f"{title}\n{format_table(['', *cells], rows)}"


PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "opencv-python-headless", "opencv-python",
            "pycocotools", "hotcoco", "faster-coco-eval")  # fmt: skip
_MATRIX_FEATURES = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "amx_fp16"}
"""Those that decide how fast a CPU multiplies matrices."""


def add_common_arguments(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds of the interleaved run [{repeats}]")


def machine_record(device: str = "cpu") -> dict[str, Any]:
    """The machine as it is now; load_average tells whether others were using it."""
    record: dict[str, Any] = {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_features": sorted(_MATRIX_FEATURES & set(_cpu_field("flags").split())),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        }
    return record


def full_record(benchmark: str, settings: Mapping[str, Any], figures: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Everything that goes into the JSON file."""
    program = Path(sys.argv[0])
    if program.is_absolute() and program.is_relative_to(ROOT):
        program = program.relative_to(ROOT)
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", str(program), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git": _commit(),
        "hardware": machine_record(device),
        "versions": _versions(),
        "settings": dict(settings),
        **figures,
    }


def headline(record: Mapping[str, Any]) -> str:
    """Two lines over a table: machine, versions, date and commit."""
    hardware, git = record["hardware"], record["git"]
    name = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cpu_cores']} cores"
    state = f"commit {git['commit'][:10]}{' (modified)' if git['modified'] else ''}" if git else "no commit"
    packages = ", ".join(f"{key} {value}" for key, value in record["versions"].items() if key.startswith("torch"))
    return f"{name}; {packages}\n{record['date']}, {state}, load average {hardware['load_average'][0]}"


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1, default=str) + "\n")


def _versions() -> dict[str, str]:
    installed = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {key: installed[key] for key in PACKAGES if key in installed}


def _commit() -> dict[str, Any]:
    """Commit of this checkout, and whether its files differ from it; empty where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": text.removesuffix("-dirty"), "modified": text.endswith("-dirty")}


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
