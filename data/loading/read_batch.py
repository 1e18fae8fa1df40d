"""From a plan of a batch to its decoded images and its boxes, in a worker process or in place."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from data.images.decode import ImageError
from data.loading.batch import BatchPlan, RawBatch
from data.loading.dataset import CocoDataset
from data.loading.shared_buffers import SharedBuffers
from data.loading.unreadable import UnreadableImage, fitted_size, replacement_candidates
from data.transforms.copy_paste import MaskedObjects, chosen_objects, paste
from data.transforms.geometry import mask_bounds, scale_factors

Job = tuple[BatchPlan, int | None]
"""A plan, and the number of the shared buffer for its pixels and masks; None where there is none free."""

OnUnreadable = Literal["fail", "replace", "blank"]
"""What becomes of an image that cannot be used: the stream ends; the next of its group takes its place; or a black
image without boxes does, so that it is still counted among the images."""

_BLANK = np.zeros((1, 1, 3), dtype=np.uint8)


class BatchReader(Dataset):
    """Carries out plans, in a worker process or in place.

    max_faults: with "replace", as many unreadable images in a row are passed over; after that a black one is taken
    (a folder that has gone away must not be searched from end to end). buffers: made before the worker was forked.
    """

    def __init__(
        self, dataset: CocoDataset, on_unreadable: OnUnreadable, max_faults: int, buffers: SharedBuffers | None
    ) -> None:
        self.dataset = dataset
        self._on_unreadable = on_unreadable
        self._max_faults = max_faults
        self._buffers = buffers

    def __getitem__(self, job: Job) -> tuple[RawBatch, int | None] | ImageError:
        """The batch, without its pixels where they are in the job's buffer, and its masks where they are behind them,
        and the number of that buffer.

        An image that cannot be used is a value: raised here, the error would come wrapped in a worker's traceback.
        """
        plan, number = job
        room = None if number is None or self._buffers is None else self._buffers.view(number)
        try:
            batch = self.read(plan, room)
        except ImageError as error:
            return error
        for name in ("pixels", "mask_bits"):
            tensor = getattr(batch, name)
            if room is not None and tensor is not None and np.may_share_memory(tensor.numpy(), room):
                setattr(batch, name, torch.empty(0, dtype=torch.uint8))
        return batch, number

    def read(self, plan: BatchPlan, room: np.ndarray | None = None) -> RawBatch:
        """The plan's batch; its pixels, and its masks behind them, are the start of `room` (uint8) where they fit in.

        Raises ImageError for an image that cannot be used, with "fail".
        """
        if plan.sources is None:
            return self._read(plan, room)
        whole = plan.with_sources()
        if room is None:
            room = np.empty(self.dataset.num_bytes(whole.indices).sum(), dtype=np.uint8)
        return _pasted(self._read(whole, room), len(plan.indices), room)

    def _read(self, plan: BatchPlan, room: np.ndarray | None) -> RawBatch:
        start, cpu_start = time.perf_counter(), time.thread_time()
        if room is None:
            room = np.empty(self.dataset.num_bytes(plan.indices).sum(), dtype=np.uint8)
        changeable = ("indices", "sizes", "scaled_sizes", "offsets")
        plan = replace(plan, **{name: getattr(plan, name).copy() for name in changeable})
        num_images, num_rows = len(plan.indices), plan.num_box_rows
        boxes_xyxy = np.zeros((num_images, num_rows, 4), dtype=np.float32)
        labels = np.zeros((num_images, num_rows), dtype=np.int64)
        valid = np.zeros((num_images, num_rows), dtype=bool)
        factors = np.zeros((num_images, 2), dtype=np.float32)
        images: list[np.ndarray] = []
        rectangles = np.zeros((num_images, num_rows, 4), dtype=np.int64)
        bitmaps: list[np.ndarray] = []
        unreadable: list[UnreadableImage] = []
        used = 0
        for i, planned in enumerate(plan.indices.tolist()):
            index, image, faults = self._image_for(planned, num_rows, room[used:])
            images.append(image)
            used += image.size
            if index != planned:
                # It fits into what was planned for its place, so that the batch keeps its shape on every process.
                size = fitted_size(image.shape[1], image.shape[0], plan.sizes[i].tolist())
                plan.indices[i], plan.sizes[i], plan.scaled_sizes[i], plan.offsets[i] = index, size, size, 0
            unreadable += self._told(faults, planned, int(plan.places[i]), None if image is _BLANK else index)
            factors[i] = scale_factors(np.array(image.shape[:2]), plan.scaled_sizes[i])
            if image is not _BLANK:
                native_boxes, its_labels = self.dataset.boxes(index)
                moved, usable = plan.move_boxes(i, native_boxes, factors[i])
                rows = slice(len(usable))
                boxes_xyxy[i, rows] = np.where(usable[:, None], moved, 0)
                labels[i, rows] = np.where(usable, its_labels, 0)
                valid[i, rows] = usable
                if self.dataset.has_masks:
                    every = self.dataset.bitmaps(index)
                    shown = plan.move_bitmaps(i, image.shape[:2], [every[row] for row in np.flatnonzero(usable)])
                    for row, (rectangle, bits) in zip(np.flatnonzero(usable), shown, strict=True):
                        if plan.boxes_of_masks and not bits.any():
                            boxes_xyxy[i, row], labels[i, row], valid[i, row] = 0, 0, False
                            continue
                        if plan.boxes_of_masks:
                            boxes_xyxy[i, row] = np.array(mask_bounds(bits)) + rectangle[:2] * 2
                        rectangles[i, row] = rectangle
                        bitmaps.append(bits.reshape(-1))
        if all(np.may_share_memory(image, room) for image in images):
            pixels, rest = room[:used], room[used:]
        else:
            pixels, rest = np.concatenate([image.reshape(-1) for image in images]), room[:0]
        return RawBatch(
            plan=plan,
            pixels=torch.from_numpy(pixels),
            native_sizes=[(image.shape[0], image.shape[1]) for image in images],
            image_ids=torch.from_numpy(self.dataset.image_ids[plan.indices]),
            sizes=torch.from_numpy(plan.sizes),
            boxes_xyxy=torch.from_numpy(boxes_xyxy),
            labels=torch.from_numpy(labels),
            valid=torch.from_numpy(valid),
            places=torch.from_numpy(plan.places),
            sample_keys=torch.from_numpy(plan.sample_keys),
            scale_factors=torch.from_numpy(factors),
            **(_masks(bitmaps, rectangles, rest) if self.dataset.has_masks else {}),
            unreadable=tuple(unreadable),
            load_seconds=time.perf_counter() - start,
            load_cpu_seconds=time.thread_time() - cpu_start,
        )

    def _image_for(self, planned: int, num_box_rows: int, room: np.ndarray) -> tuple[int, np.ndarray, dict[int, str]]:
        """What is put in the place of image `planned`: index and pixels, at the start of `room` where they fit in; and
        what is wrong with those that could not be used. The one place where images are read."""
        faults: dict[int, str] = {}
        for index in self._attempts(planned, num_box_rows):
            try:
                return index, self.dataset.image(index, room[: self.dataset.num_bytes(index)]), faults
            except ImageError as error:
                if self._on_unreadable == "fail":
                    raise
                faults[index] = str(error)
            if len(faults) > self._max_faults:
                break
        return planned, _BLANK, faults

    def _attempts(self, planned: int, num_box_rows: int) -> Iterator[int]:
        yield planned
        if self._on_unreadable == "replace":
            dataset = self.dataset
            yield from replacement_candidates(
                planned, dataset.widths, dataset.heights, dataset.box_counts, num_box_rows
            )

    def _told(
        self, faults: dict[int, str], planned: int, place: int, replacement: int | None
    ) -> Iterator[UnreadableImage]:
        ids = self.dataset.image_ids
        for index, message in faults.items():
            yield UnreadableImage(
                image_id=int(ids[index]),
                message=message,
                place=place if index == planned and place >= 0 else None,
                replacement_id=None if replacement is None else int(ids[replacement]),
            )


def _pasted(whole: RawBatch, count: int, room: np.ndarray) -> RawBatch:
    """A batch of `count` images, of one of twice as many: with objects of the others on top. room: where the pixels
    are, if they fitted in."""
    plan, rest = whole.plan, whole.plan.part(slice(count, None))
    valid, boxes_xyxy = np.zeros_like(whole.valid[:count].numpy()), np.zeros_like(whole.boxes_xyxy[:count].numpy())
    labels, rectangles = np.zeros_like(whole.labels[:count].numpy()), np.zeros((*valid.shape, 4), dtype=np.int64)
    bitmaps: list[np.ndarray] = []
    first_pasted = []
    for i in range(count):
        own, others = _objects(whole, i), _objects(whole, count + i)
        chosen = chosen_objects(int(rest.sample_keys[i]), np.ones(len(others.labels), dtype=bool))
        height, width = plan.sizes[i].tolist()
        # A replaced image may have more boxes than the rows were planned for.
        objects, num_own = paste(own, others.take(chosen[: valid.shape[1] - len(own.labels)]), (height, width))
        rows = slice(len(objects.labels))
        valid[i, rows], boxes_xyxy[i, rows], labels[i, rows] = True, objects.boxes_xyxy, objects.labels
        rectangles[i, rows] = np.array(objects.rectangles, dtype=np.int64).reshape(-1, 4)
        bitmaps += [bits.reshape(-1) for bits in objects.bits]
        first_pasted.append(num_own)
    masks = _masks(bitmaps, rectangles, room[:0])
    end, bits = whole.pixels.numel(), masks["mask_bits"].numpy()
    if np.may_share_memory(whole.pixels.numpy(), room) and end + len(bits) <= len(room):
        room[end : end + len(bits)] = bits
        masks["mask_bits"] = torch.from_numpy(room[end : end + len(bits)])
    kept = ("image_ids", "sizes", "places", "sample_keys", "scale_factors")
    return replace(
        whole,
        plan=replace(plan.part(slice(count)), sources=rest),
        native_sizes=whole.native_sizes[:count],
        source_sizes=whole.native_sizes[count:],
        first_pasted=first_pasted,
        boxes_xyxy=torch.from_numpy(boxes_xyxy),
        labels=torch.from_numpy(labels),
        valid=torch.from_numpy(valid),
        **{name: getattr(whole, name)[:count].clone() for name in kept},
        **masks,
    )


def _objects(batch: RawBatch, i: int) -> MaskedObjects:
    """Those of an image of the batch."""
    assert batch.masks is not None
    bits, offsets, rectangles = (tensor.numpy() for tensor in batch.masks)
    rows = np.flatnonzero(batch.valid[i].numpy())
    places = [tuple(rectangles[i, row].tolist()) for row in rows]
    crops = [
        bits[start : start + width * height].reshape(height, width)
        for start, (_, _, width, height) in zip(offsets[i, rows].tolist(), places, strict=True)
    ]
    return MaskedObjects(batch.boxes_xyxy[i].numpy()[rows], batch.labels[i].numpy()[rows], places, crops)


def _masks(bitmaps: list[np.ndarray], rectangles: np.ndarray, room: np.ndarray) -> dict[str, Any]:
    """The tensors of OF_MASKS: bitmaps (uint8 [n] each, of the rectangles int64 [B, G, 4] that are not empty or
    skipped), at the start of `room` where they fit in."""
    areas = rectangles[..., 2] * rectangles[..., 3]
    ends = np.cumsum(areas).reshape(areas.shape)
    # Never empty, so that a place in it can be read whatever a batch holds.
    size = max(int(ends[-1, -1]), 1)
    bits = room[:size] if size <= len(room) else np.empty(size, dtype=np.uint8)
    bits[-1] = 0
    np.concatenate(bitmaps or [bits[:0]], out=bits[: int(ends[-1, -1])])
    return {
        "mask_bits": torch.from_numpy(bits),
        "mask_offsets": torch.from_numpy(ends - areas),
        "mask_rectangles": torch.from_numpy(rectangles),
    }
