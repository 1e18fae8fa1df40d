"""A made-up batch as large as any that a training meets, for a trial of whether that fits into memory."""

from typing import Any

import numpy as np
import torch

from data.loading.batch import BatchPlan, RawBatch
from data.loading.dataset import CocoDataset
from data.transforms.augmentation import Augmentation
from data.transforms.geometry import Geometry
from data.transforms.hash_rng import hash_key

_BOX_SIDES = np.array([16, 32, 64, 128, 256])
"""Pixels: boxes for every level of the pyramid."""


def largest_batch(
    dataset: CocoDataset,
    augmentation: Augmentation,
    *,
    padded_size: tuple[int, int],
    num_box_rows: int,
    num_images: int,
) -> RawBatch:
    """Black images that fill `padded_size` (height, width), `num_box_rows` boxes in each, with whole masks where the
    set has masks, resized from as many pixels as the largest `num_images` of `dataset` have."""
    stored = np.resize(np.argsort(-dataset.num_bytes(slice(None)), kind="stable")[:num_images], num_images)
    places, none = np.arange(num_images), np.zeros((num_images, 2), dtype=np.int64)
    sizes = np.tile(np.array(padded_size, dtype=np.int64), (num_images, 1))
    jitter = augmentation.jitter
    scaled = sizes if jitter is None else np.maximum(sizes, int(jitter.size * jitter.largest))
    always = np.ones(num_images, dtype=bool)
    geometry = Geometry(
        scaled_sizes=scaled, offsets=none, sizes=sizes, flips=always, vertical_flips=always, padded_size=padded_size
    )
    plan = BatchPlan(
        **vars(geometry),
        iteration=0,
        epoch=0,
        indices=stored,
        places=places,
        sample_keys=hash_key(0, 0, places),
        num_box_rows=num_box_rows,
        colors=augmentation.colors(places, seed=0, epoch=0),
    )
    rows = np.arange(num_box_rows)
    height, width = padded_size
    sides = np.minimum(_BOX_SIDES[rows % len(_BOX_SIDES)], min(padded_size))
    left, top = rows * 37 % (width - sides + 1), rows * 53 % (height - sides + 1)
    boxes = np.stack([left, top, left + sides, top + sides], axis=1).astype(np.float32)
    labels = rows % max(len(dataset.class_names), 1)
    masks: dict[str, Any] = {}
    if dataset.has_masks:
        rectangles = np.stack([left, top, sides, sides], axis=1)[None].repeat(num_images, axis=0)
        areas = np.tile(sides * sides, (num_images, 1))
        masks["mask_bits"] = torch.ones(int(areas.sum()), dtype=torch.uint8)
        masks["mask_offsets"] = torch.from_numpy(np.cumsum(areas).reshape(areas.shape) - areas)
        masks["mask_rectangles"] = torch.from_numpy(rectangles)
    return RawBatch(
        plan=plan,
        pixels=torch.zeros(int(dataset.num_bytes(stored).sum()), dtype=torch.uint8),
        native_sizes=list(zip(dataset.heights[stored].tolist(), dataset.widths[stored].tolist(), strict=True)),
        image_ids=torch.from_numpy(dataset.image_ids[stored]),
        sizes=torch.from_numpy(sizes),
        boxes_xyxy=torch.from_numpy(boxes).repeat(num_images, 1, 1),
        labels=torch.from_numpy(labels).repeat(num_images, 1),
        valid=torch.ones(num_images, num_box_rows, dtype=torch.bool),
        places=torch.from_numpy(places),
        sample_keys=torch.from_numpy(plan.sample_keys),
        scale_factors=torch.ones(num_images, 2),
        **masks,
    )
