"""Averages the weights of several checkpoints of one run, or of runs from one start, into a detector file.

    python scripts/average_checkpoints.py runs/mine/checkpoints/epoch_001[0-2].pt --output average.pt

The output is a stripped weights file for scripts/predict.py, load_detector and --weights. An average of the last
epochs can be a little better than the last one; validate it before you believe so:
train.py --val-only --weights average.pt.
"""

from pathlib import Path

import torch

from checkout import exit_status, program_parser
from detection.export.files import whole_file
from detection.models import WeightsError
from detection.models.weights.stored import average_weights


def main(argv: list[str] | None = None) -> int:
    parser = program_parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="FILE", type=Path, help="checkpoints or stripped weights files")
    parser.add_argument("--output", required=True, metavar="FILE", type=Path, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _average(arguments.inputs, arguments.output, arguments.overwrite), WeightsError, OSError)


def _average(inputs: list[Path], output: Path, overwrite: bool) -> int:
    if output.exists() and not overwrite:
        raise WeightsError(f"{output} exists; give another --output, or --overwrite")
    content, notes = average_weights(inputs)
    with whole_file(output) as partial:
        torch.save(content, partial)
    for note in notes:
        print(f"note: {note}")
    print(f"{output}: the average of {len(inputs)} files, {len(content['model'])} tensors")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
