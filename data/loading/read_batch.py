"""From a plan of a batch to its decoded images and its boxes, in a worker process or in place."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from data.images.decode import ImageError
from data.loading.batch import RawBatch, pad_boxes
from data.loading.dataset import CocoDataset
from data.loading.transport import LoadFailure
from data.loading.unreadable import UnreadableImage, fitted_size, replacement_candidates
from data.transforms.color import ColorChange
from data.transforms.geometry import crop_boxes, flip_boxes, flip_boxes_vertically, resize_boxes, scale_factors


@dataclass(frozen=True)
class BatchPlan:
    """What a worker has to load: b images of one process and micro-step."""

    iteration: int
    epoch: int
    indices: np.ndarray
    """int64 [b], images of the dataset"""
    places: np.ndarray
    """int64 [b], places in the global batch"""
    sample_keys: np.ndarray
    """int64 [b]"""
    sizes: np.ndarray
    """int64 [b, 2] (height, width) after resize and crop"""
    scaled_sizes: np.ndarray
    """int64 [b, 2] (height, width) of the whole image after the resize"""
    offsets: np.ndarray
    """int64 [b, 2] (top, left) of the crop"""
    flips: np.ndarray
    """bool [b], left to right"""
    vertical_flips: np.ndarray
    """bool [b]"""
    padded_size: tuple[int, int]
    """(height, width)"""
    num_box_rows: int
    colors: tuple[ColorChange, ...] | None = None
    """[b]; None: the colors stay"""
    min_visibility: float = 0.0
    """Part of a box's area that a crop must leave of it"""


OnUnreadable = Literal["fail", "replace", "blank"]
"""What becomes of an image that cannot be used: the stream ends; the next of its group takes its place; or a black
image without boxes does, so that it is still counted among the images."""

_BLANK = np.zeros((1, 1, 3), dtype=np.uint8)


class BatchReader(Dataset):
    """Carries out plans, in a worker process or in place.

    max_faults: with "replace", as many unreadable images in a row are passed over; after that a black one is taken
    (a folder that has gone away must not be searched from end to end).
    """

    def __init__(self, dataset: CocoDataset, on_unreadable: OnUnreadable, max_faults: int) -> None:
        self.dataset = dataset
        self._on_unreadable = on_unreadable
        self._max_faults = max_faults

    def __getitem__(self, plan: BatchPlan) -> RawBatch | LoadFailure:
        return self.read(plan, None)

    def read(self, plan: BatchPlan, room: np.ndarray | None) -> RawBatch | LoadFailure:
        """The plan's batch; its pixels are the start of `room` (uint8) where they fit in."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        if room is None:
            room = np.empty(self.dataset.num_bytes(plan.indices).sum(), dtype=np.uint8)
        try:
            plan, images, unreadable = self._read(plan, room)
        except ImageError as error:
            return LoadFailure(str(error))
        native_sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
        if all(np.may_share_memory(image, room) for image in images):
            flat = room[: sum(image.size for image in images)]
        else:
            flat = np.concatenate([image.reshape(-1) for image in images])
        blank = [image is _BLANK for image in images]

        factors = scale_factors(native_sizes, plan.scaled_sizes)
        targets = map(self._targets, itertools.repeat(plan), range(len(images)), factors, blank)
        boxes, labels, valid = zip(*targets, strict=True)
        boxes_xyxy, padded_labels, padded_valid = pad_boxes(boxes, labels, valid, plan.num_box_rows)
        return RawBatch(
            pixels=torch.from_numpy(flat),
            native_sizes=_pairs(native_sizes),
            scaled_sizes=_pairs(plan.scaled_sizes),
            offsets=_pairs(plan.offsets),
            resized_sizes=_pairs(plan.sizes),
            flips=plan.flips.tolist(),
            vertical_flips=plan.vertical_flips.tolist(),
            colors=plan.colors,
            padded_size=plan.padded_size,
            sizes=torch.from_numpy(plan.sizes),
            boxes_xyxy=boxes_xyxy,
            labels=padded_labels,
            valid=padded_valid,
            image_ids=torch.from_numpy(self.dataset.image_ids[plan.indices]),
            places=torch.from_numpy(plan.places),
            sample_keys=torch.from_numpy(plan.sample_keys),
            scale_factors=torch.from_numpy(factors),
            iteration=plan.iteration,
            epoch=plan.epoch,
            unreadable=tuple(unreadable),
            load_seconds=time.perf_counter() - start,
            load_cpu_seconds=time.thread_time() - cpu_start,
        )

    def _read(self, plan: BatchPlan, room: np.ndarray) -> tuple[BatchPlan, list[np.ndarray], list[UnreadableImage]]:
        """The images of `plan`, and the plan as it was carried out. The one place where images are read, and so
        where it is decided what to do about a broken one. They lie in `room` one after another, as far as they fit.

        A replacement is resized to fit into what was planned for its place, so that the batch keeps its shape on
        every process.
        """
        indices, sizes = plan.indices.copy(), plan.sizes.copy()
        scaled_sizes, offsets = plan.scaled_sizes.copy(), plan.offsets.copy()
        images: list[np.ndarray] = []
        unreadable: list[UnreadableImage] = []
        used = 0
        for number, planned in enumerate(plan.indices.tolist()):
            faults: dict[int, str] = {}
            index, image = planned, None
            for index in self._attempts(planned, plan.num_box_rows):
                try:
                    image = self.dataset.image(index, room[used : used + self.dataset.num_bytes(index)])
                    break
                except ImageError as error:
                    if self._on_unreadable == "fail":
                        raise
                    faults[index] = str(error)
                if len(faults) > self._max_faults:
                    break
            if image is None:
                index, image = planned, _BLANK
            if index != planned:
                indices[number] = index
                sizes[number] = fitted_size(image.shape[1], image.shape[0], tuple(sizes[number].tolist()))
                scaled_sizes[number], offsets[number] = sizes[number], 0
            images.append(image)
            used += image.size
            ids = self.dataset.image_ids
            unreadable += [
                UnreadableImage(
                    image_id=int(ids[fault]),
                    message=message,
                    place=int(plan.places[number]) if fault == planned else None,
                    replacement_id=None if image is _BLANK else int(ids[index]),
                )
                for fault, message in faults.items()
            ]
        done = replace(plan, indices=indices, sizes=sizes, scaled_sizes=scaled_sizes, offsets=offsets)
        return done, images, unreadable

    def _attempts(self, planned: int, num_box_rows: int) -> Iterator[int]:
        yield planned
        if self._on_unreadable == "replace":
            dataset = self.dataset
            yield from replacement_candidates(
                planned, dataset.widths, dataset.heights, dataset.box_counts, num_box_rows
            )

    def _targets(
        self, plan: BatchPlan, place: int, factors: np.ndarray, blank: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        boxes, labels = self.dataset.boxes(plan.indices[place])
        if blank:
            boxes, labels = boxes[:0], labels[:0]
        height, width = plan.scaled_sizes[place].tolist()
        boxes, valid = resize_boxes(boxes, factors, (height, width))
        if (plan.sizes[place] != plan.scaled_sizes[place]).any():
            top, left = plan.offsets[place].tolist()
            height, width = plan.sizes[place].tolist()
            boxes, shown = crop_boxes(boxes, (top, left), (height, width), min_visibility=plan.min_visibility)
            valid = valid & shown
        if plan.flips[place]:
            boxes = flip_boxes(boxes, width)
        if plan.vertical_flips[place]:
            boxes = flip_boxes_vertically(boxes, height)
        return boxes, labels, valid


def _pairs(sizes: np.ndarray) -> list[tuple[int, int]]:
    return [(height, width) for height, width in sizes.tolist()]
