"""Detections drawn on their image, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from detection.models.detector import ImageInput, load_pixels
from detection.reporting import draw_boxes

LEGIBLE_SIDE = 640
"""Smaller images are drawn enlarged to it, so that names do not hide what they name."""


def draw_detections(
    image: ImageInput, found: Mapping[str, Any], *, min_score: float = 0.3, longest_side: int | None = None
) -> Image.Image:
    """The image with boxes, class names and scores in percent, as an image that a notebook shows by itself.

    image: as it was given to `Detector.predict`, and found: what that returned for it. min_score: 0..1, boxes below
    are left out. longest_side: pixels to scale to first; default: the image's own size, but at least 640, so that
    names can be read. Raises DetectorError for what is no image.
    """
    pixels = load_pixels(image).permute(1, 2, 0).contiguous().numpy()
    shown = found["scores"] >= min_score
    names: list[str] = found["names"]
    places = shown.nonzero()[:, 0].tolist()
    labels = found["labels"].numpy()
    name_of = {int(label): name for label, name in zip(labels, names, strict=True)}
    class_names = [name_of.get(label, "") for label in range(max(name_of, default=-1) + 1)]
    drawn = draw_boxes(
        pixels,
        found["boxes_xyxy"].numpy()[places],
        labels[places],
        class_names,
        found["scores"].numpy()[places],
        longest_side=longest_side or max(LEGIBLE_SIDE, *pixels.shape[:2]),
    )
    return Image.fromarray(drawn)
