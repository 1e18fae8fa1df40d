"""Everything that wants a machine with a GPU, in one command: tests, benchmarks, a training that is killed and resumed.

A part that fails or takes too long stops no other. The folder gets results.json (all figures), report.md (what each
part said) and a profiler trace; the exit status is 1 where a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.figures import format_table, full_record, headline, write_json
from checkout import ROOT, empty_folder
from fault_injection.tagged_processes import kill_tagged
from gpu_checks.parts import FAILED, NOT_RUN, OK, PARTS, TIMED_OUT, Outcome, Part, plan

MARK = "CHECK_GPU_PART"
MINUTES = 9.5
LINES_KEPT = 150
"""Of what a part says, in the report."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    with tempfile.TemporaryDirectory(prefix="check_gpu_", ignore_cleanup_errors=True) as temporary:
        parts = plan(arguments, out, Path(temporary))
        if arguments.list:
            for part in parts:
                print(f"{part.name:<14} {part.limit:>4.0f} s  {shlex.join(part.command)}")
            return 0
        chosen = [part for part in parts if arguments.parts is None or part.name in arguments.parts]
        return run_parts(chosen, arguments, out, Path(temporary))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=empty_folder, required=True, metavar="DIR", help="an empty or new folder for the results")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="[cuda]")
    add("--short", action="store_true", help="at toy size: shows that the parts work, measures nothing")
    add("--data-path", type=Path, metavar="DIR", help="COCO's layout, for the training [generated]")
    add("--minutes", type=float, default=MINUTES, help=f"for all parts together [{MINUTES}]")
    add("--parts", nargs="+", metavar="NAME", choices=PARTS, help=f"only these of {', '.join(PARTS)}")
    add("--list", action="store_true", help="print the parts, their time limits and commands")
    return parser


def run_parts(parts: Sequence[Part], arguments: argparse.Namespace, out: Path, work: Path) -> int:
    """Run them one after the other, and write what is known after each; the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.minutes * 60
    outcomes: list[Outcome] = []
    for part in parts:
        left = end - time.monotonic()
        if left <= 0:
            outcomes.append(Outcome(part.name, NOT_RUN, command=shlex.join(part.command), said=["no time was left"]))
        else:
            print(f"{part.name}: {part.text}", file=sys.stderr, flush=True)
            outcomes.append(_run(part, min(part.limit, left), work))
            print(f"{part.name}: {_state(outcomes[-1])}", file=sys.stderr, flush=True)
        _write(outcomes, arguments, out)
    print(_table(outcomes))
    print(f"\n{out / 'results.json'}, {out / 'report.md'}")
    return 1 if any(outcome.state != OK for outcome in outcomes) else 0


def _run(part: Part, limit: float, work: Path) -> Outcome:
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1"}
    # One for all parts: what was compiled for one of them serves the next.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "compiler_cache"))
    log = work / f"{part.name}.log"
    start = time.monotonic()
    status, state = None, TIMED_OUT
    with log.open("wb") as stream:
        process = subprocess.Popen(part.command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            status = process.wait(limit)
            state = FAILED if status else OK
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also what a part that failed has left behind: it would disturb the next.
            kill_tagged(MARK, mark)
            process.wait()
    outcome = Outcome(part.name, state, time.monotonic() - start, status, shlex.join(part.command))
    outcome.said = log.read_text(errors="replace").splitlines()[-LINES_KEPT:]
    if part.record is not None and part.record.is_file():
        with contextlib.suppress(ValueError):  # killed while it wrote them
            outcome.figures = json.loads(part.record.read_text())
    return outcome


def _state(outcome: Outcome) -> str:
    status = f" (exit status {outcome.status})" if outcome.state == FAILED else ""
    return f"{outcome.state}{status} after {outcome.seconds:.0f} s"


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = [[entry.name, entry.state, f"{entry.seconds:.0f}"] for entry in outcomes]
    return format_table(["part", "state", "seconds"], rows)


def _write(outcomes: Sequence[Outcome], arguments: argparse.Namespace, out: Path) -> None:
    found = {"parts": [asdict(outcome) for outcome in outcomes]}
    device = "cuda" if arguments.device == "cuda" and torch.cuda.is_available() else "cpu"
    record = full_record("check_gpu", vars(arguments), found, device)
    write_json(out / "results.json", record)
    lines = ["# Checks", "", headline(record).replace("\n", "\n\n"), "", "```", _table(outcomes), "```", ""]
    for outcome in outcomes:
        lines += [f"## {outcome.name}: {_state(outcome)}", "", f"    {outcome.command}", ""]
        lines += ["```", *outcome.said, "```", ""]
    (out / "report.md").write_text("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
