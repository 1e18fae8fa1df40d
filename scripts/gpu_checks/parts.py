"""The parts of scripts/check_gpu.py: which commands they are, how long they may take, and what became of them."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkout import ROOT

OK, FAILED, TIMED_OUT, NOT_RUN = "ok", "failed", "timed out", "not run"
PARTS = ("tests", "train", "training", "compiled", "faults", "deterministic")


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


def plan(arguments: argparse.Namespace, out: Path, work: Path) -> list[Part]:
    """The parts, those first that tell most. `work` is a folder for what is not kept."""
    on_gpu, short = arguments.device == "cuda", arguments.short
    # A C++ compiler would take minutes for what a GPU's takes seconds for.
    compiled, graphs = ("--compile", "--graphs") if on_gpu else ("", "")
    benchmark = "scripts/benchmark.py train"
    usual = "--batch-size 16 --batches 5 --repeats 3"
    # One padded size: each takes the compiler a minute.
    one_size = "--batch-size 16 --batches 1 --repeats 7 --height 800 --width 1088"
    training, num_kills = "scripts/gpu_checks/training.py", 4
    if short:
        usual = one_size = (
            "--model faster_rcnn_r18_fpn --min-size 64 --max-size 96 --batch-size 1 --batches 1 --repeats 1"
        )
        training, num_kills = f"{training} --short", 1
    if arguments.data_path is not None:
        # The parts run in the checkout's folder, wherever this program was started.
        training += f" --data-path {shlex.quote(str(arguments.data_path.resolve()))}"
    # torchvision's float32 step and graphs, which keep their memory, do not fit into a GPU together.
    variants = "--variants torchvision-bf16-cl torchvision-bf16-cl-compile ours-bf16-cl ours-bf16-cl-compile"
    variants = f"{variants} ours-bf16-cl-compile-graphs" if on_gpu else ""
    place, trace = shlex.quote(str(work)), shlex.quote(str(out / "trace.json.gz"))
    kills = f"--kills {num_kills} --corruptions 0 --no-signals --no-disk --epochs 2 --trainings 1 loader"
    rows = (
        ("train", "training step and inference beside torchvision's, COCO's sizes", 150,
         f"{benchmark} {usual} --inference"),
        ("training", "a training in bf16, killed, stopped and resumed", 150, f"{training} --work-dir {place}/training"),
        ("compiled", "training step, compiled too, and what the GPU does in it", 240,
         f"{benchmark} {one_size} {compiled} {graphs} {variants} --profile {trace}"),
        ("faults", "kills at random moments, bit-equal ends", 150, f"scripts/fault_test.py {kills}"),
        ("deterministic", "bit-equal repeats (--deterministic), at the size of a real training", 90,
         f"{training} --repeat-deterministic --work-dir {place}/deterministic"),
    )  # fmt: skip
    # Named one by one: files without such tests may want packages that a GPU machine does not have.
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    tests = [str(file.relative_to(ROOT)) for file in files if "mark.cuda" in file.read_text()]
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", *tests)
    parts = [Part("tests", "tests that need a GPU", pytest, 90)]
    for name, text, limit, command in rows:
        record = work / f"{name}.json"
        own = (sys.executable, *shlex.split(command), "--device", arguments.device, "--json", str(record))
        parts.append(Part(name, text, own, limit, record))
    return parts
