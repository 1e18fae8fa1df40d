"""The set of images that a benchmark is fed: a COCO-format one of one's own, or one drawn like COCO.

Sizes, numbers and places of boxes are COCO's, and textures compress as photographs do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import checkout  # noqa: F401
from benchmarks.figures import BenchmarkError
from data import CocoDataset, read_coco
from data_path import add_data_path, found_set

# Roughly COCO train2017: (width, height) and the share of images of about that size.
COCO_SIZES = (((640, 480), 0.36), ((640, 427), 0.25), ((480, 640), 0.13), ((427, 640), 0.09), ((500, 375), 0.05),
              ((640, 360), 0.04), ((640, 640), 0.03), ((375, 500), 0.03), ((640, 512), 0.02))  # fmt: skip
NUM_CLASSES = 80
MAX_BOXES = 93
# Log-normal with a median of 4 and a mean of 7 boxes an image, as COCO's counts.
_LOG_COUNT_MEAN, _LOG_COUNT_STD = 1.4, 1.0
# COCO's boxes: side from 2 % of the image's shorter one to nearly all of it, small ones more often.
_MIN_BOX_SHARE = 0.02
_NATIVE_SHARE = 0.6  # 640x480 images are resized by 1.67 to 800 pixels
_JPEG_QUALITY = 88


def add_image_arguments(parser: argparse.ArgumentParser, *, num_images: int) -> None:
    add_data_path(parser)
    parser.add_argument("--images", metavar="DIR", help="images of a COCO-format set, instead of generated ones")
    parser.add_argument("--annotations", metavar="FILE", help="its annotations; needed with --images")
    parser.add_argument("--pictures", type=int, default=num_images, help=f"how many to generate [{num_images}]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images, boxes and order")


def use_data_path(arguments: argparse.Namespace) -> None:
    """Makes --images and --annotations name the training images of --data-path, where that is given."""
    if (found := found_set(arguments)) is not None:
        train = found.splits.get("train") or next(iter(found.splits.values()))
        arguments.images, arguments.annotations = train.images, train.annotations


def open_images(
    arguments: argparse.Namespace, folder: Path, *, network_size: tuple[int, int] | None = None, masks: bool = False
) -> CocoDataset:
    """The set that the arguments ask for, generated into `folder` where they name none.

    Args:
        network_size: (height, width) of all generated images after the usual resize; None draws sizes as COCO's.
        masks: with outlines; generated ones are ellipses in their boxes.
    """
    use_data_path(arguments)
    if (arguments.images is None) != (arguments.annotations is None):
        raise BenchmarkError("--images DIR and --annotations FILE go together")
    if arguments.images is not None:
        annotations = read_coco(arguments.annotations, masks=masks)
        return CocoDataset(arguments.images, annotations, training=True, masks=masks)
    sizes = draw_sizes(arguments.pictures, arguments.seed)
    if network_size is not None:
        height, width = network_size
        sizes = [(round(width * _NATIVE_SHARE), round(height * _NATIVE_SHARE))] * arguments.pictures
    file = write_images(folder, sizes, arguments.seed)
    return CocoDataset(folder, read_coco(file, masks=masks), training=True, masks=masks)


def draw_sizes(number: int, seed: int) -> list[tuple[int, int]]:
    """(width, height) of `number` images, distributed as COCO's."""
    sizes, shares = zip(*COCO_SIZES, strict=True)
    chosen = np.random.default_rng([seed, 1]).choice(len(sizes), size=number, p=np.array(shares) / sum(shares))
    return [sizes[index] for index in chosen]


def write_images(folder: Path, sizes: Sequence[tuple[int, int]], seed: int) -> Path:
    """JPEGs of the given (width, height) with annotations in `folder`; the path of the annotation file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes, start=1):
        pixels = texture(np.random.default_rng([seed, 4, number]), width, height)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=_JPEG_QUALITY)
    write_annotations(folder / "annotations.json", sizes, seed)
    return folder / "annotations.json"


def write_annotations(
    file: Path,
    sizes: Sequence[tuple[int, int]],
    seed: int,
    *,
    crowd_share: float = 0.0,
    file_name: Callable[[int], str] = "{}.jpg".format,
    num_classes: int = NUM_CLASSES,
    **of_each: Any,
) -> dict[str, Any]:
    """COCO annotations of images with the given (width, height), numbered from 1; what was written into `file`.

    Each image has at least one box, so that training takes every one. of_each: more fields of every annotation.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (width, height) in enumerate(sizes, start=1):
        rng = np.random.default_rng([seed, 2, number])
        images.append({"id": number, "file_name": file_name(number), "width": width, "height": height})
        boxes = draw_boxes(rng, width, height)
        labels, crowds = rng.integers(1, num_classes + 1, len(boxes)), rng.random(len(boxes)) < crowd_share
        for box, label, crowd in zip(boxes.tolist(), labels.tolist(), crowds.tolist(), strict=True):
            record = {"id": len(annotations) + 1, "image_id": number, "category_id": label, "bbox": box}
            if not crowd:
                record["segmentation"] = [_ellipse(*box)]
            annotations.append(record | {"area": round(box[2] * box[3], 2), "iscrowd": int(crowd)} | of_each)
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, num_classes + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return content


def write_boxes(
    file: Path,
    sizes: Sequence[tuple[int, int]],
    boxes_per_image: float,
    num_classes: int = 365,
    file_name: Callable[[int], str] = lambda number: f"v1/patch{number % 51}/objects365_v1_{number:08}.jpg",
) -> int:
    """COCO annotations without polygons for images of the given (width, height), written as they are drawn: of any
    number of images. The number of boxes, of which every image has one or more; their order is none.

    file_name: of each image by its number, from 1.
    """
    rng = np.random.default_rng(0)
    image_ids = np.repeat(np.arange(1, len(sizes) + 1), 1 + rng.poisson(boxes_per_image - 1, len(sizes)))
    rng.shuffle(image_ids)
    with file.open("w") as out:
        out.write('{"images": [')
        for number, (width, height) in enumerate(sizes, start=1):
            image = {"id": number, "file_name": file_name(number), "width": width, "height": height}
            out.write((", " if number > 1 else "") + json.dumps(image))
        out.write('], "annotations": [')
        for start in range(0, len(image_ids), 100_000):
            part = image_ids[start : start + 100_000].tolist()
            boxes = (rng.random((len(part), 4)) * 180 + 1).round(2).tolist()
            labels = rng.integers(1, num_classes + 1, len(part)).tolist()
            records = [
                f'{{"id": {start + n}, "image_id": {image}, "category_id": {label}, "bbox": {box}, '
                f'"area": {box[2] * box[3]:.2f}, "iscrowd": 0}}'
                for n, (image, label, box) in enumerate(zip(part, labels, boxes, strict=True), start=1)
            ]
            out.write((", " if start else "") + ", ".join(records))
        categories = [{"id": number, "name": f"class {number}"} for number in range(1, num_classes + 1)]
        out.write(f'], "categories": {json.dumps(categories)}}}')
    return len(image_ids)


def _ellipse(x: float, y: float, width: float, height: float) -> list[float]:
    """A polygon of 24 vertices inside a box, COCO's mean number."""
    angles = np.arange(24) * (2 * np.pi / 24)
    corners = np.stack([x + width * (1 + np.cos(angles)) / 2, y + height * (1 + np.sin(angles)) / 2], axis=1)
    return corners.round(2).ravel().tolist()


def texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3] with the spectrum of photographs, whose amplitudes fall as 1 / frequency (Field 1987).

    JPEGs of it are about as large as COCO's and so take about as long to decode.
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    phases = rng.uniform(0, 2 * np.pi, (3, *frequency.shape))
    planes = np.fft.irfft2(np.exp(1j * phases) / frequency, s=(height, width))
    # Colors are mostly shared between the channels.
    pixels = np.moveaxis(planes.sum(axis=0) + 0.5 * planes, 0, -1)
    pixels = (pixels - pixels.mean()) / pixels.std()
    return np.clip(pixels * 55 + 115, 0, 255).astype(np.uint8)


def draw_boxes(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """float64 [n, 4] xywh inside the image; 1 to MAX_BOXES of them."""
    number = int(np.clip(round(rng.lognormal(_LOG_COUNT_MEAN, _LOG_COUNT_STD)), 1, MAX_BOXES))
    sides = np.exp(rng.uniform(np.log(_MIN_BOX_SHARE), 0, (number, 1))) * min(width, height)
    elongation = np.exp(rng.uniform(-0.5, 0.5, (number, 1)))
    extents = np.minimum(np.concatenate([sides * elongation, sides / elongation], axis=1), [width, height])
    corners = rng.uniform(size=(number, 2)) * ([width, height] - extents)
    return np.concatenate([corners, extents], axis=1).round(2)
