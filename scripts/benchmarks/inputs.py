"""The set of images that a benchmark is fed: a COCO-format one of one's own, or one drawn like COCO."""

from __future__ import annotations

import argparse
from pathlib import Path

import checkout  # noqa: F401
from benchmarks.scenes import draw_sizes, write_images
from benchmarks.timing import BenchmarkError
from data import CocoDataset, TrainLoader, read_coco


def add_image_arguments(parser: argparse.ArgumentParser, *, num_images: int) -> None:
    parser.add_argument("--images", metavar="DIR", help="images of a COCO-format set, instead of generated ones")
    parser.add_argument("--annotations", metavar="FILE", help="its annotations; needed with --images")
    parser.add_argument("--pictures", type=int, default=num_images, help=f"how many to generate [{num_images}]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images, boxes and order")


def open_images(arguments: argparse.Namespace, folder: Path, *, size: tuple[int, int] | None = None) -> CocoDataset:
    """The set that the arguments ask for, generated into `folder` where they name none.

    Args:
        size: (width, height) of all generated images; None draws sizes as COCO's.
    """
    if (arguments.images is None) != (arguments.annotations is None):
        raise BenchmarkError("--images DIR and --annotations FILE go together")
    if arguments.images is not None:
        return CocoDataset(arguments.images, read_coco(arguments.annotations), training=True)
    sizes = [size] * arguments.pictures if size is not None else draw_sizes(arguments.pictures, arguments.seed)
    return CocoDataset(folder, read_coco(write_images(folder, sizes, arguments.seed)), training=True)


def train_loader(
    arguments: argparse.Namespace,
    dataset: CocoDataset,
    sizes: tuple[int, int],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """A training's loader without workers; sizes: shorter side and longest side of the resize."""
    return TrainLoader(
        dataset,
        min_size=sizes[0],
        max_size=sizes[1],
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        rank=rank,
        world_size=world_size,
        # The same batches for all variants; more sizes than the buckets would be compiled in vain.
        few_shapes=arguments.compile or arguments.graphs,
    )
