"""Images and boxes drawn like COCO's: sizes, counts, and textures that compress as photographs do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Roughly COCO train2017: (width, height) and the share of images of about that size.
COCO_SIZES = (
    ((640, 480), 0.36),
    ((640, 427), 0.25),
    ((480, 640), 0.13),
    ((427, 640), 0.09),
    ((500, 375), 0.05),
    ((640, 360), 0.04),
    ((640, 640), 0.03),
    ((375, 500), 0.03),
    ((640, 512), 0.02),
)
NUM_CLASSES = 80
MAX_BOXES = 93
# Log-normal with a median of 4 and a mean of 7 boxes an image, as COCO's counts.
_LOG_COUNT_MEAN, _LOG_COUNT_STD = 1.4, 1.0
# COCO's boxes: side from 2 % of the image's shorter one to nearly all of it, small ones more often.
_MIN_BOX_SHARE = 0.02
_NATIVE_SHARE = 0.6  # 640x480 images are resized by 1.67 to 800 pixels
_JPEG_QUALITY = 88


def draw_sizes(number: int, seed: int) -> list[tuple[int, int]]:
    """(width, height) of `number` images, distributed as COCO's."""
    sizes, shares = zip(*COCO_SIZES, strict=True)
    chosen = np.random.default_rng([seed, 1]).choice(len(sizes), size=number, p=np.array(shares) / sum(shares))
    return [sizes[index] for index in chosen]


def native_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of stored images that the usual factor of COCO's brings to a network size."""
    return round(width * _NATIVE_SHARE), round(height * _NATIVE_SHARE)


def write_images(folder: Path, sizes: Sequence[tuple[int, int]], seed: int) -> Path:
    """JPEGs of the given (width, height) with annotations in `folder`; the path of the annotation file.

    Each image has at least one box, so that training takes every one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (width, height) in enumerate(sizes, start=1):
        rng = np.random.default_rng([seed, 2, number])
        name = f"{number:06d}.jpg"
        Image.fromarray(texture(rng, width, height)).save(folder / name, quality=_JPEG_QUALITY)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        boxes = draw_boxes(rng, width, height)
        for box, category in zip(boxes.tolist(), rng.integers(1, NUM_CLASSES + 1, len(boxes)).tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    file = folder / "annotations.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories()}))
    return file


def categories() -> list[dict[str, Any]]:
    return [{"id": number, "name": f"class {number}"} for number in range(1, NUM_CLASSES + 1)]


def texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3] with the spectrum of photographs, whose amplitudes fall as 1 / frequency (Field 1987).

    JPEGs of it are about as large as COCO's and so take about as long to decode.
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(3):
        phase = rng.uniform(0, 2 * np.pi, frequency.shape)
        planes.append(np.fft.irfft2(np.exp(1j * phase) / frequency, s=(height, width)))
    # Colors are mostly shared between the channels.
    shared = planes[0] + planes[1] + planes[2]
    pixels = np.stack([shared + 0.5 * plane for plane in planes], axis=-1)
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
