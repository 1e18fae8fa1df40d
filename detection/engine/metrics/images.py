"""Images of a run: what the model is fed, and what it finds on the same validation images each time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import partial

import numpy as np

from data import CocoDataset, ImageError, RawBatch, assemble
from detection.evaluation import Detections
from detection.reporting import draw_boxes, mosaic, side_by_side

NUM_VALIDATION_IMAGES = 4
LONGEST_SIDE = 640
"""Pixels to which images are scaled, so that names can be read on small images too."""
LETTER_FRACTION = 1 / 20
"""Height of letters as a part of an image's mean side: TensorBoard shows images 300 pixels wide."""
NUM_TRAINING_IMAGES = 8
SHOWN_FROM_SCORE = 0.5
MOST_BOXES_SHOWN = 30


def training_mosaic(batches: Iterable[RawBatch], class_names: tuple[str, ...]) -> np.ndarray:
    """Images as the model gets them (resized, flipped, ...), boxes drawn; uint8 RGB [H, W, 3].

    Batches are taken until there are NUM_TRAINING_IMAGES images, or no more batches.
    """
    images: list[np.ndarray] = []
    for batch in batches:
        images += _fed_images(batch, class_names)
        if len(images) >= NUM_TRAINING_IMAGES:
            break
    return mosaic(images[:NUM_TRAINING_IMAGES], columns=min(4, len(images)))


def _fed_images(batch: RawBatch, class_names: tuple[str, ...]) -> list[np.ndarray]:
    fed = assemble(batch, "cpu")
    images = []
    for index, (height, width) in enumerate(batch.resized_sizes):
        image = fed.pixels[index, :, :height, :width].permute(1, 2, 0).contiguous().numpy()
        valid = batch.valid[index].numpy()
        images.append(
            draw_boxes(
                image,
                batch.boxes_xyxy[index].numpy()[valid],
                batch.labels[index].numpy()[valid],
                class_names,
                masks=[mask[:height, :width] for mask in batch.whole_masks(index)],
                longest_side=LONGEST_SIDE,
                letter_fraction=LETTER_FRACTION,
            )
        )
    return images


def validation_images(dataset: CocoDataset, detections: Detections) -> list[np.ndarray]:
    """Ground truth beside detections for a few images of the set, the same ones each time; uint8 RGB each.

    The images are spread evenly over the set, those with boxes first.
    """
    candidates = np.flatnonzero(dataset.box_counts > 0)
    if len(candidates) == 0:
        candidates = np.arange(len(dataset))
    places = np.linspace(0, len(candidates) - 1, min(NUM_VALIDATION_IMAGES, len(candidates)))
    images = []
    for place in places:
        # One that turned unreadable was reported when it was to be detected on.
        with contextlib.suppress(ImageError):
            images.append(_compare(dataset, int(candidates[int(place)]), detections))
    return images


def _compare(dataset: CocoDataset, index: int, detections: Detections) -> np.ndarray:
    image = dataset.image(index)
    true_boxes, true_labels = dataset.boxes(index)
    true_masks = [] if detections.masks is None else dataset.whole_masks(index)
    rows = np.flatnonzero((detections.image_ids == dataset.image_ids[index]) & (detections.scores >= SHOWN_FROM_SCORE))
    rows = rows[np.argsort(-detections.scores[rows], kind="stable")][:MOST_BOXES_SHOWN]
    boxes = detections.boxes_xywh[rows].copy()
    boxes[:, 2:] += boxes[:, :2]
    label_of = {category: label for label, category in enumerate(dataset.annotations.category_ids)}
    labels = np.array([label_of[category] for category in detections.category_ids[rows].tolist()], np.int64)
    masks = [] if detections.masks is None else [detections.masks.decode(row) > 0 for row in rows.tolist()]
    draw = partial(
        draw_boxes, class_names=dataset.class_names, longest_side=LONGEST_SIDE, letter_fraction=LETTER_FRACTION
    )
    return side_by_side(
        draw(image, true_boxes, true_labels, masks=true_masks),
        draw(image, boxes, labels, scores=detections.scores[rows], masks=masks),
        letter_fraction=LETTER_FRACTION,
    )
