"""What stands beside every figure: hardware, versions, date, commit, command; and the JSON file of it all."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkout import ROOT

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
            "gpu_multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": {
                "matmul": torch.backends.cuda.matmul.allow_tf32,
                "convolution": torch.backends.cudnn.allow_tf32,
            },
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
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, Any]:
    """Commit of this checkout, and whether its files differ from it; empty where there is no git."""
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": head, "modified": bool(changed)}


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
