"""Padded sizes of an epoch's batches, as they come and in the buckets of --compile: how many, how much is padding."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import checkout  # noqa: F401
from benchmarks.figures import Say, add_common_arguments, format_table
from benchmarks.scenes import draw_sizes
from data import plan_epoch, read_coco, resized_sizes
from data.loading.padding_groups import group_size, grouped
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
        number = group_size(batch_size)
        order = grouped(sizes[plan], number, np.zeros(len(plan), dtype=np.int64))
        groups = padded_size(
            np.take_along_axis(sizes[plan], order[..., None], axis=1).reshape(len(plan), -1, number, 2)
        )
        pixels, content = groups.prod(axis=-1), int(sizes[plan].prod(axis=-1).sum())
        # A step waits for the process with the largest group, where each has one; else groups follow each other.
        row["groups"] = {
            "images": number,
            "shapes": len(np.unique(groups.reshape(-1, 2), axis=0)),
            "pixels": int(pixels.sum()) * number,
            "padding": 1 - content / (int(pixels.sum()) * number),
            "pixels_of_the_slowest": int(pixels.max(axis=1).sum()) * batch_size,
        }
        rows.append(row)
        counts = [f"{row[kind]['shapes']} / {row[kind]['padding']:.1%}" for kind in ("natural", "buckets")]
        natural_pixels, of_groups = row["natural"]["pixels"], row["groups"]
        changes = [row["buckets"]["pixels"], of_groups["pixels"], of_groups["pixels_of_the_slowest"]]
        counts.append(f"{of_groups['shapes']} / {of_groups['padding']:.1%}")
        cells.append([str(batch_size), *counts, *(f"{change / natural_pixels - 1:+.1%}" for change in changes)])
    figures = {"device": "cpu", "images": len(widths), "buckets": [list(bucket) for bucket in buckets], "padding": rows}
    headers = [
        "global batch",
        "whole: sizes / padding",
        "its buckets",
        "groups of 16 images",
        "pixels: buckets",
        "groups",
        "groups, one a process",
    ]
    listed = ", ".join(f"{height}x{width}" for height, width in buckets)
    return figures, f"{len(widths)} images; buckets {listed}\n\n{format_table(headers, cells)}"
