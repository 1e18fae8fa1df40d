"""The parts of scripts/check_gpu.py: which commands they are, how long they may take, and what became of them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkout import ROOT

OK, FAILED, TIMED_OUT, NOT_RUN = "ok", "failed", "timed out", "not run"


@dataclass(frozen=True)
class Part:
    """One thing to check: a command of this checkout, which succeeds with exit status 0."""

    name: str
    text: str
    command: tuple[str, ...]
    limit: float
    """Seconds"""
    record: Path | None = None
    """JSON file that it writes"""


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    state: str
    seconds: float = 0.0
    status: int | None = None
    command: str = ""
    said: list[str] = field(default_factory=list)
    figures: Any = None


PARTS = ("tests", "train", "training", "compiled", "few-images", "ablation", "faults", "deterministic")


def plan(arguments: argparse.Namespace, out: Path, work: Path) -> list[Part]:
    """The parts, those first that tell most. `work` is a folder for what is not kept."""
    on_gpu, short = arguments.device == "cuda", arguments.short
    device = ("--device", arguments.device)
    # A C++ compiler would take minutes for what a GPU's takes seconds for.
    compiled = ("--compile",) if on_gpu else ()
    graphs = ("--graphs",) if on_gpu else ()
    toy: tuple[str, ...] = (
        "--model",
        "faster_rcnn_r18_fpn",
        "--min-size",
        "64",
        "--max-size",
        "96",
        "--batch-size",
        "1",
    )
    toy += ("--batches", "1", "--repeats", "1")
    usual: tuple[str, ...] = toy if short else ("--batch-size", "16", "--batches", "5", "--repeats", "3")
    # One padded size: each takes the compiler a minute.
    of_one_size: tuple[str, ...] = toy if short else ("--batch-size", "16", "--batches", "1", "--repeats", "7")
    of_one_size += () if short else ("--height", "800", "--width", "1088")
    # torchvision's float32 step and graphs, which keep their memory, do not fit into a GPU together.
    variants = (
        "torchvision-bf16-cl",
        "torchvision-bf16-cl-compile",
        "ours-bf16-cl",
        "ours-bf16-cl-compile",
        "ours-bf16-cl-compile-graphs",
    )
    of_one_precision = ("--variants", *variants) if on_gpu else ()
    # The parts run in the checkout's folder, wherever this program was started.
    data = ("--data-path", str(arguments.data_path.resolve())) if arguments.data_path is not None else ()
    length = ("--short",) if short else ()
    kills = ("--kills", "1" if short else "4", "--corruptions", "0", "--no-signals", "--no-disk", "--epochs", "2")
    commands: dict[str, tuple[str, float, tuple[str, ...]]] = {
        "tests": ("tests that need a GPU", 90, ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda")),
        "train": (
            "training step and inference beside torchvision's, COCO's sizes",
            150,
            ("scripts/benchmark.py", "train", *device, *usual, "--inference"),
        ),
        "training": (
            "a training in bf16, killed, stopped and resumed",
            150,
            ("scripts/check_gpu_training.py", *device, *length, *data, "--work-dir", str(work / "training")),
        ),
        "compiled": (
            "training step, compiled too, and what the GPU does in it",
            240,
            ("scripts/benchmark.py", "train", *device, *of_one_size, *compiled, *graphs, *of_one_precision)
            + ("--profile", str(out / "trace.json.gz")),
        ),
        "few-images": (
            "training step with as few images as the schedule has on eight GPUs, where the host launches too slowly",
            90,
            ("scripts/benchmark.py", "train", *device, *of_one_size, *graphs, "--no-probes")
            + (() if short else ("--batch-size", "2")),
        ),
        "ablation": (
            "each optimization taken out in turn",
            120,
            ("scripts/benchmark.py", "train", *device, *of_one_size, *compiled, "--ablation"),
        ),
        "faults": (
            "kills at random moments, bit-equal ends",
            150,
            ("scripts/fault_test.py", *device, "--processes", "1", *kills),
        ),
        "deterministic": (
            "bit-equal repeats (--deterministic), at the size of a real training",
            90,
            ("scripts/check_gpu_training.py", *device, *length, *data, "--repeat-deterministic")
            + ("--work-dir", str(work / "deterministic")),
        ),
    }
    parts = []
    for name, (text, limit, words) in commands.items():
        record = None if name == "tests" else work / f"{name}.json"
        if record is None:
            words += tuple(_files_with_gpu_tests())
        else:
            words += ("--json", str(record))
        parts.append(Part(name, text, (sys.executable, *words), limit, record))
    return parts


def _files_with_gpu_tests() -> list[str]:
    # Named one by one: files without such tests may want packages that a GPU machine does not have.
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.cuda" in file.read_text()]
