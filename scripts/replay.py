"""Runs a training step that was not finite again, and names the module where the first NaN or infinity comes up.

    python3 scripts/replay.py runs/mine/nonfinite/iteration_0000123.pt

The file is what train.py leaves when a loss or gradient is not finite. The step is run in the run's precision and in
float32.

Exit status: 0 when everything is finite here, 1 when it is in float32 alone, 3 when it is not in float32 either, 2 for
a wrong command or a file that cannot be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkout import exit_status, program_parser
from detection.engine.replay.captured_step import CapturedStepError, read_captured_step
from detection.engine.replay.replay import Finding, images_alone, remedy, replay

FINITE, ONLY_IN_FLOAT32, NOWHERE = 0, 1, 3


def main(argv: list[str] | None = None) -> int:
    parser = program_parser(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="what the run has left in nonfinite/")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return exit_status(lambda: _replay(arguments.file, torch.device(device)), CapturedStepError)


def _replay(file: Path, device: torch.device) -> int:
    content = read_captured_step(file)
    batches = content["batches"]
    print(f"{file}: {len(batches)} batches of iteration {content['iteration']}, which was run on {content['device']}")
    print(content["message"])
    if content["config"]["model"]["sync_bn"] and content["run"]["world_size"] > 1:
        print("note: batch norm has the statistics of one process here, which were those of all")
    in_run = _first(content, device, content["amp"], "the run's precision")
    in_float32 = in_run if content["amp"] == "off" else _first(content, device, "off", "for comparison")
    print(f"\n{remedy(content, in_run, in_float32)}")
    if in_float32 is not None:
        return NOWHERE
    return FINITE if in_run is None else ONLY_IN_FLOAT32


def _first(content: dict[str, Any], device: torch.device, amp: str, why: str) -> Finding | None:
    """The first finding in any of the batches, shown."""
    print(f"\n{'float32' if amp == 'off' else amp} ({why}), on {device}:")
    for batch in content["batches"]:
        finding = replay(content, batch, device, amp)
        if finding is None:
            continue
        print(f"  {finding}")
        print(f"  process {batch['rank']}, micro-step {batch['micro_step']}, image ids {batch['image_ids']}")
        if finding.phase != "weights":
            alone = [f"{image_id} ({name})" for image_id, name in images_alone(content, batch, device, amp)]
            print(f"  image ids that do it alone: {', '.join(alone) or 'none, only all of them together'}")
        return finding
    print("  every output and every gradient is finite")
    return None


if __name__ == "__main__":
    raise SystemExit(main())
