"""Writes a trained detector for use elsewhere, and compares what it finds with PyTorch's.

    python scripts/export.py --weights runs/mine/checkpoints/best.pt --format onnx --output detector.onnx photos/
    python scripts/export.py --weights best.pt --format torch --size 1080 1920 --batch-size 1 --output detector.pt2
    python scripts/export.py --weights best.pt --format weights --output detector.pt

onnx, torch: images in (uint8 [batch, height, width, 3], RGB, all of one size), boxes in their own pixels out;
resizing, normalizing, padding, score threshold, suppression and the limit on detections are inside. onnx needs
the extra "export". weights: a small file that predict.py and load_detector take without any other flag.

IMAGES are looked at by the written file and by PyTorch; without any, three generated ones are. Exit status 1: they
differ by more than the tolerance (the file is left for you to examine).
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkout import exit_status, program_parser
from data import read_image
from data.errors import DataError
from data.images.files import find_images
from data.tools.shape_scenes import draw_scene
from detection.config.arg_types import fraction, positive_int
from detection.errors import DetectionError
from detection.export import (
    ONNX_OPSET,
    ExportError,
    InputShape,
    compare_detections,
    graph_model,
    open_onnx,
    open_program,
    save_onnx,
    save_program,
    save_weights,
)
from detection.models import Detector, load_detector
from detection.reporting import Console, counted

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "weights": ".pt"}
MOST_IMAGES = 16
OPSETS = range(18, 24)  # what PyTorch's exporter can write


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    stopped = "stopped; nothing was written"
    return exit_status(lambda: _export(arguments, Console()), DataError, DetectionError, OSError, stopped=stopped)


def _parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGES", help="files, folders, glob patterns to compare on")
    add("--weights", required=True, metavar="FILE", type=Path, help="a checkpoint of training, or a stripped file")
    add("--format", required=True, choices=list(SUFFIXES), help="what to write")
    add("--output", required=True, metavar="FILE", type=Path, help="the file to write")
    add("--overwrite", action="store_true", help="replace the output file if it exists")
    add = parser.add_argument_group(
        "shape of the input, for onnx and torch (default: any, chosen at each call)"
    ).add_argument
    add("--batch-size", metavar="N", type=positive_int, help="always this many images a call")
    add("--size", nargs=2, metavar=("HEIGHT", "WIDTH"), type=positive_int, help="this size in pixels, always")
    add = parser.add_argument_group("settings of the detector (default: as in the weights)").add_argument
    add("--score-threshold", metavar="X", type=fraction, help="lowest score of a detection, 0..1")
    add("--nms-iou", metavar="X", type=fraction, help="overlap from which the weaker of a class goes")
    add("--max-detections", metavar="N", type=positive_int, help="most detections of an image")
    add("--min-size", metavar="N", type=positive_int, help="shorter side at the network's scale, pixels")
    add("--max-size", metavar="N", type=positive_int, help="limit of the longer side, pixels")
    add = parser.add_argument_group("the rest").add_argument
    add("--opset", metavar="N", type=int, choices=OPSETS, default=ONNX_OPSET, help=f"of ONNX, default {ONNX_OPSET}")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="for torch: where it is to run (cpu)")
    add("--no-compare", action="store_true", help="only write")
    add("--score-tolerance", metavar="X", type=float, default=1e-3, help="default 0.001")
    add("--box-tolerance", metavar="X", type=float, default=0.5, help="pixels, default 0.5")
    return parser


def _export(arguments: argparse.Namespace, console: Console) -> int:
    kind, output = arguments.format, arguments.output
    if output.suffix != SUFFIXES[kind]:
        raise ExportError(f"--output {output}: --format {kind} writes files that end in {SUFFIXES[kind]}")
    if output.exists() and not arguments.overwrite:
        raise ExportError(f"{output} exists; give another --output, or --overwrite")
    if kind == "weights" and (arguments.batch_size or arguments.size or arguments.images):
        raise ExportError("--format weights holds no graph: --batch-size, --size and IMAGES have no meaning for it")
    if kind != "torch" and arguments.device != "cpu":
        raise ExportError("--device goes with --format torch; an .onnx file runs wherever its runtime does")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ExportError("--device cuda: PyTorch sees no CUDA device here")
    if arguments.no_compare and arguments.images:
        raise ExportError("IMAGES are for comparing, which --no-compare forbids")

    shape = InputShape(arguments.batch_size, *(arguments.size or (None, None)))
    detector = _with_settings(load_detector(arguments.weights), arguments)
    if kind == "weights":
        save_weights(detector, output)
        load_detector(output)
        _say_written(
            console, output, f"{counted(len(detector.class_names), 'class', 'classes')}, input {_sides(detector)}"
        )
        return 0

    images = [] if arguments.no_compare else _images(arguments.images, shape, console)
    console.say("exporting; this takes about a minute ...")
    if kind == "onnx":
        save_onnx(detector, shape, output, arguments.opset)
    else:
        on_device = dataclasses.replace(detector, model=detector.model.to(arguments.device))
        save_program(on_device, shape, output)
    batch, size = shape.batch_size or "any", f"{shape.height} x {shape.width}" if shape.height else "any size"
    _say_written(console, output, f"batch: {batch}; images: {size}; network input {_sides(detector)}")
    return 0 if arguments.no_compare else _compare(detector, shape, images, arguments, console)


def _with_settings(detector: Detector, arguments: argparse.Namespace) -> Detector:
    names = {"score_threshold": "score_threshold", "nms_iou": "nms_iou", "max_detections": "detections_per_image"}
    changes = {key: value for name, key in names.items() if (value := getattr(arguments, name)) is not None}
    model = graph_model(detector)
    model.config = dataclasses.replace(model.config, **changes)
    min_size = arguments.min_size or detector.min_size
    max_size = arguments.max_size or detector.max_size
    if min_size > max_size:
        raise ExportError(f"the shorter side, {min_size}, is above the limit of the longer, {max_size}")
    return dataclasses.replace(detector, min_size=min_size, max_size=max_size)


def _images(sources: list[str], shape: InputShape, console: Console) -> list[np.ndarray]:
    """What to compare on, uint8 RGB [H, W, 3] each, at the fixed size where there is one."""
    if sources:
        files = find_images(sources)
        if len(files) > MOST_IMAGES:
            console.say(f"comparing on the first {MOST_IMAGES} of {len(files)} images")
        images = [read_image(file) for file in files[:MOST_IMAGES]]
    else:
        console.say("comparing on three generated images; name some of yours for a comparison that means more")
        sizes = ((640, 480), (375, 500), (333, 120))
        images = [draw_scene((number,), *size).pixels for number, size in enumerate(sizes)]
    if shape.height is None or shape.width is None:
        return images
    size = (shape.width, shape.height)
    return [np.asarray(Image.fromarray(image).resize(size)) for image in images]


def _compare(
    detector: Detector,
    shape: InputShape,
    images: list[np.ndarray],
    arguments: argparse.Namespace,
    console: Console,
) -> int:
    run = (
        open_onnx(arguments.output) if arguments.format == "onnx" else open_program(arguments.output, arguments.device)
    )
    ours, theirs = [], []
    with console.progress(len(images), description="comparing", unit="images") as bar:
        for image in images:
            ours.append(detector.predict(image))
            theirs.append(run(np.repeat(image[None], shape.batch_size or 1, axis=0))[-1])
            bar.update(1)
    difference = compare_detections(
        ours,
        theirs,
        score_threshold=graph_model(detector).config.score_threshold,
        detections_per_image=detector.model.config.detections_per_image,
        score_tolerance=arguments.score_tolerance,
    )
    console.say(f"against PyTorch on {len(images)} images: {difference}")
    if difference.within(arguments.score_tolerance, arguments.box_tolerance):
        return 0
    console.warn(f"that is more than {arguments.score_tolerance:g} and {arguments.box_tolerance:g} pixels")
    return 1


def _say_written(console: Console, path: Path, details: str) -> None:
    console.say(f"written: {path} ({path.stat().st_size / 2**20:.1f} MiB; {details})")


def _sides(detector: Detector) -> str:
    return f"{detector.min_size} to {detector.max_size} pixels"


if __name__ == "__main__":
    raise SystemExit(main())
