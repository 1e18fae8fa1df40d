"""For the day a GPU is there: is every acceleration right, and what is it worth; in eight minutes.

    python scripts/gpu_checks/candidates.py --out candidates

Each part has a process of its own with a time limit, and one that fails stops no other. What must be right comes first.
results.json holds the figures of all parts that are done, and is written after each of them. --device cpu tries
everything at toy size and measures nothing.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where checkout.py and the other parts are

from benchmarks.steps import SWITCHES
from check_gpu import run_parts
from checkout import empty_folder
from gpu_checks.card import MEASURED
from gpu_checks.correctness import CHECKS
from gpu_checks.parts import Part

MINUTES = 8.0
_CHECK_LIMIT, _CARD_LIMIT, _STEP_LIMIT, _SWITCH_LIMIT, _SANITIZER_LIMIT = 60, 60, 150, 60, 90
"""Seconds"""


def plan(device: str, out: Path, work: Path) -> list[Part]:
    """The parts: what must be right, the steps, each switch, the card; `work` is a folder for what is not kept."""
    on_gpu = device == "cuda"
    correctness, card = "scripts/gpu_checks/correctness.py", "scripts/gpu_checks/card.py"
    step = "scripts/benchmark.py train --batches 8 --height 800 --width 1344"
    whole, rounds, sizes = "ours-bf16-cl", "--repeats 5", {"16-images": 16, "2-images": 2}
    variants = [whole, f"{whole}-graphs", f"{whole}-compile", f"{whole}-compile-graphs"]
    if not on_gpu:
        # A C++ compiler takes minutes for what a GPU's takes seconds for.
        step = "scripts/benchmark.py train --batches 2 --height 64 --width 96 --model faster_rcnn_r18_fpn"
        whole, rounds, sizes = "ours-fp32-cl", "--repeats 1", {"16-images": 1, "2-images": 1}
        variants = [whole]
    trace = shlex.quote(str(out / "trace.json.gz"))
    rows = [
        (name, f"{(CHECKS[name].__doc__ or '').splitlines()[0]}", _CHECK_LIMIT, f"{correctness} {name}")
        for name in CHECKS
    ]
    for name, batch_size in sizes.items():
        more = f"--inference --no-probes --profile {trace}" if name == "2-images" else "--no-probes"
        text = f"training step of {name.replace('-', ' ')}" + (
            ", and detections one by one" if "inference" in more else ""
        )
        command = f"{step} --batch-size {batch_size} {rounds} {more} --variants {' '.join(variants)}"
        rows.append((name, text, _STEP_LIMIT, command))
    for name, switch in SWITCHES.items():
        if switch.device in (None, device):
            command = f"{step} --batch-size {sizes['16-images']} {rounds} --no-probes --ablation"
            step_with = f"{whole}-compile" if switch.of_compiled else whole
            pair = f"--variants {step_with} {step_with}-without-{name}"
            rows.append((f"without-{name}", f"training step without {switch.text}", _SWITCH_LIMIT, f"{command} {pair}"))
    rows += [
        (name, f"{(MEASURED[name].__doc__ or '').splitlines()[0]}", _CARD_LIMIT, f"{card} {name}") for name in MEASURED
    ]
    parts = []
    for name, text, limit, command in rows:
        record = work / f"{name}.json"
        own = (sys.executable, *shlex.split(command), "--device", device, "--json", str(record))
        parts.append(Part(name, text, own, limit, record))
    if on_gpu and (sanitizer := shutil.which("compute-sanitizer")) is not None:
        record = work / "sanitizer.json"
        own = (sanitizer, "--error-exitcode", "1", sys.executable, correctness, "kernels", "--json", str(record))
        parts.append(Part("sanitizer", "the kernels' accesses to memory", own, _SANITIZER_LIMIT, record))
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=empty_folder, required=True, metavar="DIR", help="an empty or new folder for the results")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="[cuda]")
    add("--minutes", type=float, default=MINUTES, help=f"for all parts together [{MINUTES:g}]")
    add("--parts", nargs="+", metavar="NAME", help="only these of the parts that --list names")
    add("--list", action="store_true", help="print the parts, their time limits and commands")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="candidates_", ignore_cleanup_errors=True) as work:
        parts = plan(arguments.device, arguments.out, Path(work))
        if unknown := set(arguments.parts or ()) - {part.name for part in parts}:
            parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in parts)}")
        if arguments.list:
            for part in parts:
                print(f"{part.name:<28} {part.limit:>4.0f} s  {shlex.join(part.command)}")
            return 0
        chosen = [part for part in parts if arguments.parts is None or part.name in arguments.parts]
        return run_parts(chosen, arguments, arguments.out, Path(work))


if __name__ == "__main__":
    sys.exit(main())
