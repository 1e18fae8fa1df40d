"""What a model costs, part by part: parameters, operations, memory.

    python scripts/summarize_model.py --model faster_rcnn_r50_fpn --height 800 --width 1333 --batch-size 2

A multiplication and an addition count as two operations (many tools print half of it and call it FLOPs as well);
convolutions and matrix products are counted. "saved" is what one image keeps in memory for the backward pass, "a batch"
what is kept once whatever the number of images. The RPN saves nothing where it is run, and at its sampled anchors
under "rest".
"""

import dataclasses
import sys

import torch

from checkout import program_parser
from detection.config.arg_types import positive_int
from detection.models import MODELS, ModelError, build_model
from detection.models.summary import PartSummary, summarize_model
from detection.reporting.tables import aligned

COLUMNS = ("part", "parameters", "trained", "weights MB", "GFLOP/image", "saved MB/image", "a batch")
BYTES_PER_VALUE = 4


def main(argv: list[str] | None = None) -> int:
    parser = program_parser(__doc__)
    add, default = parser.add_argument, "faster_rcnn_r50_fpn"
    add("--model", metavar="NAME", default=default, help=f"one of {', '.join(sorted(MODELS))} (default {default})")
    add("--num-classes", metavar="N", type=positive_int, default=80, help="default 80")
    add("--height", metavar="N", type=positive_int, default=800, help="of the input, default 800")
    add("--width", metavar="N", type=positive_int, default=1333, help="of the input, default 1333")
    add("--batch-size", metavar="N", type=positive_int, default=2, help="images of the training memory (default 2)")
    add("--from-scratch", action="store_true", help="nothing frozen and batch norm trained, as with --weights none")
    arguments = parser.parse_args(argv)
    overrides = {"norm": "bn", "frozen_stages": -1} if arguments.from_scratch else {}
    try:
        model = build_model(arguments.model, arguments.num_classes, **overrides)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = summarize_model(model, arguments.height, arguments.width)
    print(f"{arguments.model}, {arguments.num_classes} classes, {arguments.height}x{arguments.width}")
    print(table(parts))
    print(training_memory(parts, arguments.batch_size))
    return 0


def table(parts: list[PartSummary]) -> str:
    total = PartSummary(
        "total", *(sum(values) for values in zip(*(dataclasses.astuple(part)[1:] for part in parts), strict=True))
    )
    rows = [COLUMNS]
    for part in (*parts, total):
        weights, saved, folded = (f"{n / 1e6:.1f}" for n in (part.state_bytes, part.saved_bytes, part.folded_bytes))
        counts = f"{part.parameters:,}", f"{part.trained:,}"
        rows.append((part.name, *counts, weights, f"{part.flops / 1e9:.2f}", saved, folded))
    return "\n".join(aligned(rows, {0}))


def training_memory(parts: list[PartSummary], batch_size: int) -> str:
    weights = sum(part.state_bytes for part in parts)
    trained = BYTES_PER_VALUE * sum(part.trained for part in parts)
    saved = sum(batch_size * part.saved_bytes + part.folded_bytes for part in parts)
    return (
        f"training in float32 with SGD, {batch_size} images: weights {weights / 1e9:.2f} GB + gradients and momentum "
        f"{2 * trained / 1e9:.2f} GB + saved {saved / 1e9:.2f} GB = {(weights + 2 * trained + saved) / 1e9:.2f} GB, "
        "and what the kernels need while they work"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main())
