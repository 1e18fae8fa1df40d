"""Figures with a peer in the same run, as a table and as JSON: train, traffic, padding, data, memory, eval, startup."""

from __future__ import annotations

import argparse
import importlib
import sys

import checkout  # noqa: F401
from benchmarks.figures import full_record, headline, write_json

BENCHMARKS = {
    "train": "the training step (and inference) beside torchvision's Faster R-CNN",
    "traffic": "bytes and FLOPs of a step on a GPU, by stage, counted without one",
    "padding": "padded sizes of COCO's batches: how many, and how much of them is padding",
    "data": "JPEG to trainer, beside MMDetection's, torchvision's and Pillow's ways",
    "memory": "memory of the main process and the workers, epoch after epoch",
    "eval": "COCO metrics: pycocotools, hotcoco and faster-coco-eval beside each other",
    "startup": "from the start of the process to the first iteration",
}


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, epilog="How to read the figures: docs/benchmarks/README.md")
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(BENCHMARKS))
    for name, text in BENCHMARKS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in given:
            # The others' imports (torchvision, OpenCV, ...) would only cost time and memory.
            importlib.import_module(f"benchmarks.{name}").add_arguments(command)
    arguments = parser.parse_args(given)

    module = importlib.import_module(f"benchmarks.{arguments.benchmark}")
    try:
        figures, text = module.run(arguments, lambda line: print(f"... {line}", file=sys.stderr, flush=True))
    except ValueError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    record = full_record(arguments.benchmark, vars(arguments), figures, figures["device"])
    print(f"{headline(record)}\n\n{text}")
    if arguments.json:
        write_json(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
