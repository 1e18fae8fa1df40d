"""Padded sizes of an epoch's batches, as they come and in the buckets of --compile: how many, how much is padding."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import checkout  # noqa: F401
from benchmarks.figures import Say, add_common_arguments, format_table
from benchmarks.scenes import draw_sizes
from data import plan_epoch, read_coco, resized_sizes
from data.loading.shape_buckets import bucket_of, shape_buckets
from data.transforms.geometry import padded_size

TRAIN2017_IMAGES = 117_266  # those with boxes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=1)
    parser.add_argument("--annotations", metavar="FILE", help="sizes of this COCO-format file, instead of drawn ones")
    parser.add_argument(
        "--pictures", type=int, help="how many sizes to draw, from the file's where one is given [all of it, 117266]"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--max-size", type=int, default=1333)
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[2, 16, 64, 128], help="global batch sizes [2 16 64 128]"
    )


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the table. Nothing is timed: every figure is a count."""
    if arguments.annotations is None:
        widths, heights = np.array(draw_sizes(arguments.pictures or TRAIN2017_IMAGES, arguments.seed)).T
    else:
        annotations = read_coco(arguments.annotations)
        widths, heights = annotations.widths, annotations.heights
        if arguments.pictures is not None:
            drawn = np.random.default_rng(arguments.seed).integers(len(widths), size=arguments.pictures)
            widths, heights = widths[drawn], heights[drawn]
    sizes = resized_sizes(widths, heights, min_size=arguments.min_size, max_size=arguments.max_size)
    buckets = shape_buckets(arguments.min_size, arguments.max_size)
    rows, cells = [], []
    for batch_size in arguments.batch_sizes:
        plan = plan_epoch(widths, heights, seed=arguments.seed, epoch=0, global_batch_size=batch_size)
        natural = [(int(height), int(width)) for height, width in padded_size(sizes[plan])]
        row: dict[str, Any] = {"batch_size": batch_size}
        for kind, shapes in (("natural", natural), ("buckets", [bucket_of(size, buckets) for size in natural])):
            pixels = sum(height * width for height, width in shapes) * batch_size
            padding = 1 - int(sizes[plan].prod(axis=-1).sum()) / pixels
            row[kind] = {"shapes": len(set(shapes)), "pixels": pixels, "padding": padding}
        rows.append(row)
        counts = [f"{row[kind]['shapes']} / {row[kind]['padding']:.1%}" for kind in ("natural", "buckets")]
        cells.append([str(batch_size), *counts, f"{row['buckets']['pixels'] / row['natural']['pixels'] - 1:+.1%}"])
    figures = {"device": "cpu", "images": len(widths), "buckets": [list(bucket) for bucket in buckets], "padding": rows}
    headers = ["global batch", "as they come: sizes / padding", "buckets: sizes / padding", "pixels computed"]
    listed = ", ".join(f"{height}x{width}" for height, width in buckets)
    return figures, f"{len(widths)} images; buckets {listed}\n\n{format_table(headers, cells)}"
